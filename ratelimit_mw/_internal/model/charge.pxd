cimport cython
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.model.reservation cimport Reservation

ctypedef long long i64

cdef class Charge:
    cdef public object cost, max_hold, prepared
    cdef public i64 ahead
    cdef public double lease_seconds
    cdef public str caller, address, currency
    cdef public bint is_held, is_of_one, is_recorded
    cdef public tuple slots, allowances, meters, meter_places, estimates, costs
    cdef public list windows, warn_amounts
    cdef public dict unit_windows, parts
    cdef public Charge model, base
    cdef public Outcome last
    cdef public tuple keys
    cdef tuple _counters
    cdef dict _own_costs
    @cython.locals(made=Charge)
    cpdef Charge for_caller(self, str caller, str address, tuple keys=*)
    cpdef str partition_of(self, str partition)
    cpdef Charge with_estimates(self, units)
    cpdef object cost_at(self, Py_ssize_t place)
    cpdef bint counts(self, str unit) except -1
    @cython.locals(amount=i64, place=Py_ssize_t)
    cpdef bint nears_budget(self, Outcome outcome) except -1
    cpdef Reservation recorded_reservation(self, bytes lease_id, tuple periods, object price)
