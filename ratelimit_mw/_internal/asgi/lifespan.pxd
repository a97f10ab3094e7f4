cdef class Lifespan:
    cdef public Py_ssize_t active
    cdef object _limiter
    cdef bint _reported
