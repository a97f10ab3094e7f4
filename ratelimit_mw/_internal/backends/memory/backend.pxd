cimport cython
from ratelimit_mw._internal.backends.memory.counts cimport SlotSet
from ratelimit_mw._internal.backends.memory.prepared cimport PreparedCharge
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.model.reservation cimport Reservation
from ratelimit_mw._internal.runtime.leaf cimport Lock

ctypedef long long i64

@cython.locals(now=i64)
cpdef i64 wall_clock() except? -1

cdef class MemoryBackend:
    cdef dict __dict__
    cdef object __weakref__
    cdef public Lock lock
    cdef public object clock, slots
    @cython.locals(now=i64, outcome=Outcome, prepared=PreparedCharge, reservation=Reservation)
    cpdef Outcome decide(self, Charge charge, bytes lease_id, object price)
    cpdef Outcome ask(self, Charge charge, bytes lease_id, object price=*)
    @cython.locals(slots=SlotSet)
    cpdef object finish(self, Reservation reservation, object action)
