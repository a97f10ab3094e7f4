cimport cython
from ratelimit_mw._internal.cache.prefetch_state cimport PrefetchedBlock, PrefetchedUnit, PrefetchState
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome

ctypedef long long i64

@cython.final
cdef class Prefetch:
    cdef object __weakref__
    cdef object _backend, _tasks
    cdef public object era, now
    @cython.locals(unit=PrefetchedUnit)
    cpdef Outcome spend(self, PrefetchState state)
    @cython.locals(block=PrefetchedBlock, left=i64, now=double)
    cpdef PrefetchedUnit draw(self, PrefetchState state)
    cpdef void take(self, PrefetchState state, double now) except *
