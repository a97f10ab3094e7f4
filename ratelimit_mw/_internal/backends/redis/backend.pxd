cimport cython
from ratelimit_mw._internal.backends.redis.release_template cimport ReleaseTemplate
from ratelimit_mw._internal.backends.redis.loops cimport LoopSenders
from ratelimit_mw._internal.backends.redis.operations cimport Template
from ratelimit_mw._internal.backends.redis.packing cimport ChargeOperation, ChargeTemplate, Layout
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.model.reservation cimport Reservation

ctypedef long long i64

cdef class RedisBackend:
    cdef dict __dict__
    cdef object __weakref__
    cdef public LoopSenders loops
    cdef dict _release_templates
    cdef public object _clock
    cdef public i64 _skew
    cpdef ChargeOperation ask(self, Charge charge, bytes lease_id, object price=*)
    cpdef ChargeOperation _ask(self, bytes kind, Charge charge, bytes lease_id, object price)
    @cython.locals(charge=Charge, packed=ChargeTemplate)
    cpdef void _pack_into(self, ChargeOperation operation) except *
    @cython.locals(packed=ChargeTemplate)
    cpdef ChargeTemplate prepare(self, Charge charge)
    cpdef object finish(self, Reservation reservation, object action)
    @cython.locals(template=Template)
    cpdef object _owe_finish(self, Reservation reservation, object action)
    cpdef ReleaseTemplate _template_of(self, Reservation reservation)
