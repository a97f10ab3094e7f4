cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.model.reservation cimport Reservation
from ratelimit_mw._internal.policy.policy cimport Policy

@cython.final
@cython.freelist(16)
cdef class Lease:
    cdef object __weakref__
    cdef readonly Policy policy
    cdef readonly Charge initial_charge
    cdef readonly object identity, price, unsatisfiable
    cdef public Reservation reservation, local_estimate
    cdef public object backend, give_up_at, repeats, token, opening, renewals, same_job, scope
    cdef public tuple late
    cdef object _decision
    cdef readonly object _leases
    cdef public Outcome outcome
    cdef public double renew_at, repeated_at
    cdef public bint is_acquired, is_detached, is_ended, is_lost, is_metered_out, may_wait
    cpdef void repeat(self, refused, double now) except *
    cpdef void decide(self, decision) except *
    cpdef void stop_renewing(self) except *
