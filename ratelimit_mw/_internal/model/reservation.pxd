cimport cython

cdef list _fresh_ids

cpdef bytes new_lease_id()

@cython.final
@cython.freelist(16)
cdef class Metering:
    cdef readonly dict times, settled
    cdef public object by_script
    cdef public bint is_restored

@cython.final
@cython.freelist(16)
cdef class Reservation:
    cdef readonly bytes id
    cdef readonly tuple slots, periods, meters, estimates
    cdef readonly double lease_seconds
    cdef readonly object price
    cdef readonly str currency
    cdef readonly Metering metering
    cdef readonly bint has_price, has_estimate, is_leased
    cpdef Reservation with_keys(self, tuple slots, tuple periods, tuple meters, tuple estimates)
    cpdef Reservation without_slots(self)
    cpdef Reservation without_meters(self)
    cpdef tuple _values(self)
