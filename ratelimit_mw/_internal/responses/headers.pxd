cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.header_window cimport HeaderWindow
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.runtime.leaf cimport digits
from ratelimit_mw._internal.lease.lease cimport Lease

ctypedef long long i64

cdef class HeaderWriter:
    cdef bint _classic, _ietf
    cdef readonly bint is_absolute, is_classic_only, is_unix
    @cython.locals(outcome=Outcome, charge=Charge, window=HeaderWindow)
    cpdef list of_admitted(self, Lease lease)
    cpdef i64 reset(self, i64 now, i64 reset_after) except? -1
    cdef list _with_units(self, Charge charge, Outcome outcome, HeaderWindow window)
    @cython.locals(left=i64)
    cdef list _figures(self, HeaderWindow window, Outcome outcome)
    cdef list _x_ratelimit(self, tuple limit, i64 left, i64 now, i64 reset_after)

@cython.locals(headers=list, first=int)
cpdef list add_headers(present, list ours)
cdef i64 _seconds(i64 microseconds) except? -1
