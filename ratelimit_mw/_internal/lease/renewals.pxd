cimport cython
from ratelimit_mw._internal.model.reservation cimport Reservation
from ratelimit_mw._internal.lease.lease cimport Lease

cdef double _RENEW_AFTER

@cython.final
cdef class Renewals:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict leases
    cdef public double covers
    @cython.locals(reservation=Reservation, now=double)
    cpdef void add(self, Lease lease) except *
    cpdef bint remove(self, Lease lease) except -1
