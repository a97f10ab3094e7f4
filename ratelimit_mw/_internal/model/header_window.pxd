cimport cython
from ratelimit_mw._internal.model.outcome cimport Outcome

ctypedef long long i64

@cython.final
cdef class HeaderWindow:
    cdef readonly object window
    cdef readonly tuple limit_header
    cdef readonly Py_ssize_t place
    cdef readonly i64 quota, length, cost

@cython.locals(best=HeaderWindow, window=HeaderWindow, fewest=i64, left=i64)
cpdef HeaderWindow nearest_of(list windows, Outcome outcome)
