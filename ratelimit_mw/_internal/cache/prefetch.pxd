cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

@cython.final
cdef class PrefetchBatch:
    cdef public object units, era
    cdef public i64 size, low, decided
    cdef public list windows
    cdef public double received, until

@cython.final
cdef class PrefetchState:
    cdef public Charge charge
    cdef public PrefetchBatch block, spare
    cdef public double life, asking_until
    cdef public i64 ahead
    cdef public double _period, _began, _marked
    cdef public i64 _spent, _lost, _started
    cdef public tuple _before, _now
    cpdef PrefetchBatch after(self, PrefetchBatch block)

@cython.final
cdef class Prefetch:
    cdef object __weakref__
    cdef object _backend, _tasks
    cdef public object era, now
    @cython.locals(block=PrefetchBatch, left=i64, now=double)
    cpdef Outcome spend(self, PrefetchState stock)
    cpdef void take(self, PrefetchState stock, double now) except *

@cython.locals(age=i64, unspent=i64, used=i64, reset_after=i64, row=Numbers)
cdef Outcome _outcome(Charge charge, PrefetchBatch block, i64 left, double now)
