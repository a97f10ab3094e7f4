cimport cython
from ratelimit_mw._internal.backends.memory.counts cimport CountedState, CounterRef, WindowLog
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

@cython.final
cdef class PreparedCharge:
    cdef readonly object owner
    cdef readonly i64 since, until
    cdef list _refs
    cdef tuple _periods
    @cython.locals(
        amount=i64, admitted=bint, has_new=bint, row=Numbers, ref=CounterRef, state=CountedState,
    )
    cpdef Outcome decide(self, Charge charge, i64 now, bytes lease_id, object price)
    @cython.locals(outcome=Outcome, ref=CounterRef, log=WindowLog)
    cpdef Outcome take_ahead(self, Charge charge, i64 now)
    @cython.locals(row=Numbers, ref=CounterRef)
    cdef Numbers _row(self, i64 now, bint waits, i64 price)
    @cython.locals(ref=CounterRef)
    cdef void _keep_new(self, i64 now) except *
