cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Operation, Template
from ratelimit_mw._internal.backends.redis.packing cimport ChargeOperation, ChargeTemplate, Layout
from ratelimit_mw._internal.model.charge cimport Charge, Reservation, Outcome

ctypedef long long i64

cdef class RedisBackend:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict batchers, releases
    cdef public object _clock
    cdef public i64 _skew
    cpdef ChargeOperation ask(self, Charge charge, bytes lease_id, object price=*)
    cpdef ChargeOperation _ask(self, bytes kind, Charge charge, bytes lease_id, object price)
    @cython.locals(charge=Charge, layout=Layout)
    cpdef void _pack_into(self, ChargeOperation operation) except *
    cpdef ChargeTemplate prepare(self, Charge charge)
    cpdef object finish(self, Reservation hold, object money)
    @cython.locals(operation=Operation)
    cpdef object _owe_finish(self, Reservation hold, object money)
    cpdef Operation _submit(self, Operation operation, bint must_arrive=*)
