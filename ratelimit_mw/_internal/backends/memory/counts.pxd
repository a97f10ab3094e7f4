cimport cython
from ratelimit_mw._internal.backends.memory.bounded_store cimport StoredState
from ratelimit_mw._internal.runtime.leaf cimport Entries, Numbers

ctypedef long long i64

cdef class CountedState

@cython.final
cdef class CounterRef:
    cdef public object store, name, make
    cdef public CountedState state
    cdef public i64 quota, length, granule, cost, need
    cpdef CountedState find(self)

cdef class CountedState(StoredState):
    cpdef bint admits(self, CounterRef ref, i64 now, i64 cost, i64 price) except -1
    cpdef void charge(self, Numbers row, CounterRef ref, i64 now, bytes lease_id, i64 cost, i64 price) except *
    cpdef void append_status(self, Numbers row, CounterRef ref, i64 now, i64 cost, i64 price) except *

cdef class WindowLog(CountedState):
    cdef public i64 length, used
    cdef Entries _entries
    cdef i64 _oldest, _newest, _ahead, _empty
    @cython.locals(newest=i64, granule=i64, at=i64)
    cpdef void charge(self, Numbers row, CounterRef ref, i64 now, bytes lease_id, i64 cost, i64 price) except *
    @cython.locals(granule=i64)
    cpdef void add(self, CounterRef ref, i64 now, i64 cost) except *
    @cython.locals(granule=i64, last=i64, taken=i64)
    cpdef void give_back(self, CounterRef ref, i64 now, i64 at, i64 cost) except *
    cpdef void take_ahead(self, CounterRef ref, i64 now, i64 cost, i64 ahead) except *
    @cython.locals(time=i64)
    cdef i64 _wait(self, i64 needed, i64 now) except? -1
    @cython.locals(entries=Entries)
    cdef void _expire(self, i64 now) except *

cdef class SlotSet(CountedState):
    cdef public dict leases
    cdef public i64 soonest
    @cython.locals(expires=i64)
    cpdef void charge(self, Numbers row, CounterRef ref, i64 now, bytes lease_id, i64 cost, i64 price) except *
    cdef void _expire(self, i64 now) except *
