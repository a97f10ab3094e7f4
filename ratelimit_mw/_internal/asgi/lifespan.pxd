cdef class Lifespan:
    cdef public Py_ssize_t active
    cdef object _limiter, _on_started
    cdef bint _reported
