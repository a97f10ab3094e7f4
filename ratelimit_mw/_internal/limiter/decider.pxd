cimport cython
from ratelimit_mw._internal.model.charge cimport Charge, Outcome
from ratelimit_mw._internal.lease.lease_record cimport LeaseRecord, LimitedRequest
from ratelimit_mw._internal.lease.manager cimport Leases
from ratelimit_mw._internal.policy.policy cimport Policy

cdef class Decider:
    cdef Leases _leases
    cdef object _backend, _tally, _prefetch, _refusals, _budget_warnings, _live
    cdef public object local, log_refusal
    cdef public bint remembers
    cdef public object observers
    @cython.locals(charge=Charge, request=LimitedRequest)
    cpdef decide(self, Policy policy, identity, price=*)
    @cython.locals(policy=Policy, charge=Charge)
    cpdef answered(self, LimitedRequest request, Outcome outcome, double sent)
    @cython.locals(policy=Policy, charge=Charge)
    cpdef without_backend(self, LimitedRequest request, error)
    cdef _known_refusal(self, Charge charge)
    @cython.locals(policy=Policy, lease=LeaseRecord)
    cdef _admit(self, LimitedRequest request, Outcome outcome)
    @cython.locals(lease=LeaseRecord)
    cdef _repeat(self, LimitedRequest request, known)
    cdef _refuse(self, LimitedRequest request, decision)
    @cython.locals(policy=Policy)
    cdef void _count(self, LimitedRequest request, LeaseRecord lease) except *
    cdef void _tell_of_refusal(self, LimitedRequest request, LeaseRecord lease) except *

cdef class PendingDecision:
    cdef Decider _decider
    cdef LimitedRequest _request
    cdef object _asked
    cdef double _sent

cdef _decision_of(LimitedRequest request, Outcome outcome)
cdef _too_small_budget(Charge charge, price)
