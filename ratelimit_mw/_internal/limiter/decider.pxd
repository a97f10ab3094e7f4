cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.model.reservation cimport new_lease_id
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.lease.manager cimport Leases
from ratelimit_mw._internal.policy.policy cimport Policy
from ratelimit_mw._internal.cache.prefetch cimport Prefetch
from ratelimit_mw._internal.cache.refusals cimport RefusalCache, CachedRefusal
from ratelimit_mw._internal.observe.decision_counts cimport DecisionCounts

@cython.final
cdef class Decider:
    cdef Leases _leases
    cdef object _backend, _budget_warnings, _live
    cdef Prefetch _prefetch
    cdef RefusalCache _refusals
    cdef DecisionCounts _counts
    cdef dict _refused
    cdef public object local, log_refusal
    cdef public bint remembers
    cdef public object observers
    @cython.locals(charge=Charge, lease=Lease, known=CachedRefusal)
    cpdef decide(self, Policy policy, identity, price=*, units=*, bint may_wait=*)
    cdef object _ask(self, Policy policy, Charge charge, bytes lease_id, object price)
    @cython.locals(policy=Policy, charge=Charge)
    cpdef Lease answered(self, Lease lease, Outcome outcome, double sent)
    @cython.locals(policy=Policy, charge=Charge)
    cpdef Lease without_backend(self, Lease lease, error)
    @cython.locals(known=CachedRefusal)
    cdef CachedRefusal _known_refusal(self, Charge charge)
    @cython.locals(policy=Policy)
    cdef void _admit(self, Lease lease, Outcome outcome) except *
    cdef void _repeat(self, Lease lease, CachedRefusal known) except *
    cdef void _refuse(self, Lease lease, decision) except *
    @cython.locals(policy=Policy)
    cdef void _count(self, Lease lease) except *
    cdef void _tell_of_refusal(self, Lease lease) except *

@cython.final
@cython.freelist(16)
cdef class PendingDecision:
    cdef Decider _decider
    cdef Lease _lease
    cdef object _pending
    cdef double _sent

cdef _decision_of(Lease lease, Outcome outcome)
@cython.locals(charge=Charge)
cdef Charge _charge_of(Policy policy, price, units)
cdef _too_small_budget(Charge charge, price)
