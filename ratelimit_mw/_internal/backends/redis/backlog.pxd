cdef class Backlog:
    cdef public list queue, upkeep
    cdef public object sent, doubtful
