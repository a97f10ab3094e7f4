from ratelimit_mw._internal.backends.memory.bounded_store cimport StoredState
from ratelimit_mw._internal.backends.memory.counts cimport CountedState, CounterRef
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

cdef class BudgetState(CountedState):
    cdef public i64 ends, spent, held, lapsed
    cdef public dict _open
    cdef public i64 _next
    cpdef void lapse(self, i64 now) except *

cdef class Record(StoredState):
    cdef public i64 estimate, dies, lapses
    cdef public object settled
