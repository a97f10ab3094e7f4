cimport cython
from ratelimit_mw._internal.backends.memory.counts cimport CountedState, CounterRef, WindowLog
from ratelimit_mw._internal.model.charge cimport Charge, Reservation, Outcome

ctypedef long long i64

cdef class Places:
    cdef readonly object owner
    cdef readonly i64 since, until
    cdef list _refs, _states
    cdef tuple _periods
    @cython.locals(cost=i64, amount=i64, admitted=bint, has_new=bint, row=list, at=Py_ssize_t, ref=CounterRef, state=CountedState)
    cpdef Outcome decide(self, Charge charge, i64 now, bytes lease_id, object price)
    @cython.locals(outcome=Outcome, at=Py_ssize_t, ref=CounterRef, log=WindowLog)
    cpdef Outcome take_ahead(self, Charge charge, i64 now)
    @cython.locals(ref=CounterRef)
    cdef CountedState _find(self, Py_ssize_t at)
    @cython.locals(row=list, at=Py_ssize_t, ref=CounterRef, state=CountedState)
    cdef list _row(self, i64 now, i64 cost, i64 price)
    @cython.locals(at=Py_ssize_t, ref=CounterRef, state=CountedState)
    cdef void _keep_new(self, i64 now) except *
    cdef Reservation _hold(self, Charge charge, bytes lease_id, object price)
