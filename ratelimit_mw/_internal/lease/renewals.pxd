from ratelimit_mw._internal.lease.lease_record cimport LeaseRecord

cdef class Renewals:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict leases
    cdef public double covers
    cpdef void add(self, LeaseRecord lease) except *
    cpdef bint remove(self, LeaseRecord lease) except -1
