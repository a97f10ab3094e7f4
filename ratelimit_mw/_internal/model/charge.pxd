cimport cython
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

cdef list _fresh_ids

cpdef bytes new_lease_id()

@cython.final
@cython.freelist(16)
cdef class Reservation:
    cdef readonly bytes id
    cdef readonly tuple slots, periods, meters, estimates
    cdef readonly double lease
    cdef readonly object price
    cdef readonly str currency
    cdef readonly bint has_price, has_estimate, is_leased
    cpdef Reservation with_places(self, tuple slots, tuple periods, tuple meters, tuple estimates)
    cpdef Reservation without_slots(self)
    cpdef Reservation without_meters(self)
    cpdef tuple _values(self)

@cython.final
cdef class HeaderWindow:
    cdef readonly object window
    cdef readonly tuple limit_header
    cdef readonly Py_ssize_t place
    cdef readonly i64 quota, length, cost

cdef class Charge:
    cdef public object cost, max_hold, prepared
    cdef public i64 ahead
    cdef public double lease
    cdef public str caller, address, currency
    cdef public bint is_held, is_of_one, is_recorded
    cdef public tuple slots, allowances, meters, meter_places, estimates, costs
    cdef public list windows, warn_amounts
    cdef public dict unit_windows
    cdef public Charge model, base
    cdef public Outcome last
    cdef tuple _counters
    @cython.locals(made=Charge)
    cpdef Charge for_caller(self, str caller, str address)
    cpdef str partition_of(self, str partition)
    cpdef Charge with_estimates(self, units)
    cpdef object cost_at(self, Py_ssize_t place)
    cpdef HeaderWindow nearest_window(self, Outcome outcome)
    @cython.locals(amount=i64, place=Py_ssize_t)
    cpdef bint nears_budget(self, Outcome outcome) except -1
    cpdef Reservation recorded_hold(self, bytes lease_id, tuple periods, object price)

@cython.locals(best=HeaderWindow, window=HeaderWindow, fewest=i64, left=i64)
cpdef HeaderWindow nearest_of(list windows, Outcome outcome)

cdef Py_ssize_t _WIDTH, _RESET_AFTER, _HELD, _REFUSES

@cython.locals(before=Numbers, place=Py_ssize_t, at=Py_ssize_t, step=i64)
cpdef Numbers row_before(Numbers row, list steps, i64 others)

@cython.freelist(16)
cdef class Outcome:
    cdef readonly bint admitted
    cdef readonly i64 now
    cdef readonly Reservation hold
    cdef Numbers _row
    @cython.locals(row=Numbers, at=Py_ssize_t)
    cpdef object status(self, Py_ssize_t place, limit)
    cpdef i64 used(self, Py_ssize_t place) except? -1
    cpdef i64 reset_after(self, Py_ssize_t place) except? -1
    cpdef i64 held(self, Py_ssize_t place) except? -1
    cpdef tuple _values(self)
