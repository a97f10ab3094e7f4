cimport cython
from ratelimit_mw._internal.model.header_window cimport HeaderWindow
from ratelimit_mw._internal.model.reservation cimport Reservation
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

cdef Py_ssize_t _WIDTH, _RESET_AFTER, _HELD, _REFUSES

@cython.locals(before=Numbers, place=Py_ssize_t, at=Py_ssize_t, step=i64)
cpdef Numbers row_before(Numbers row, list steps, i64 others)

@cython.freelist(16)
cdef class Outcome:
    cdef readonly bint admitted
    cdef readonly i64 now
    cdef readonly Reservation reservation
    cdef public tuple times
    cdef public object drawn
    cdef Numbers _row
    @cython.locals(row=Numbers, at=Py_ssize_t)
    cpdef object status(self, Py_ssize_t place, limit)
    @cython.locals(at=Py_ssize_t)
    cpdef void append_status(self, Numbers row, Py_ssize_t place) except *
    cpdef i64 used(self, Py_ssize_t place) except? -1
    @cython.locals(best=HeaderWindow, window=HeaderWindow, row=Numbers, fewest=i64, left=i64)
    cpdef HeaderWindow nearest_of(self, list windows)
    cpdef i64 reset_after(self, Py_ssize_t place) except? -1
    cpdef i64 held(self, Py_ssize_t place) except? -1
    cpdef tuple _values(self)
