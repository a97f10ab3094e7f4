cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.lease.lease_record cimport LeaseRecord
from ratelimit_mw._internal.lease.renewals cimport Renewals

cdef class Leases:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict renewals
    cpdef void keep(self, LeaseRecord lease, Charge charge) except *
    cdef void _leave(self, LeaseRecord lease) except *
    cpdef void end(self, LeaseRecord lease, bint failed) except *
    @cython.locals(renewals=Renewals)
    cpdef Renewals renewing(self)
