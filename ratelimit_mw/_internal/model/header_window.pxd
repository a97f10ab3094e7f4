cimport cython

ctypedef long long i64

@cython.final
cdef class HeaderWindow:
    cdef readonly object window
    cdef readonly tuple limit_header
    cdef readonly Py_ssize_t place
    cdef readonly i64 quota, length, cost
