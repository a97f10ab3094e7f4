cimport cython
from ratelimit_mw._internal.lease.background cimport Arrival
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.model.reservation cimport Reservation

cdef class Settling:
    cdef dict __dict__
    cdef object __weakref__
    cdef object _backend, _background, _notify
    @cython.locals(arrival=Arrival, late=Lease, late_used=list)
    cpdef Arrival settle(self, Lease lease, amount, units, bint replace)
    cdef dict _units_of(self, Lease lease, units, tuple others)
    cdef void _settle_units(self, Arrival arrival, Lease lease, units, bint replace) except *
    @cython.locals(reservation=Reservation)
    cpdef void _take_in_units(self, Lease lease, units, met) except *
