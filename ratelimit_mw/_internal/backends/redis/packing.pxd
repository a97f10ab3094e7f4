cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Operation, Template
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome, row_before
from ratelimit_mw._internal.model.reservation cimport Metering, Reservation
from ratelimit_mw._internal.runtime.leaf cimport Numbers, numbers_in

ctypedef long long i64

cdef class Layout:
    cdef readonly object keys
    cdef readonly bytes body, head, limits
    cdef readonly Py_ssize_t n_keys, n_meters
    cdef Charge _own
    cdef public i64 since, until
    cdef object _cost
    cdef dict _bodies
    cdef bint _has_periods
    cdef bytes _limits
    cdef list _steps
    cdef Py_ssize_t _numbers, _size
    cpdef bint holds(self, i64 now)
    cpdef tuple body_of(self, bytes kind, object price, object lease_us)
    @cython.locals(code=int, admitted=Py_ssize_t, row=Numbers)
    cpdef tuple read(self, bytes answer, Py_ssize_t number)
    @cython.locals(admitted=Py_ssize_t, row=Numbers, place=Py_ssize_t, operation=ChargeOperation)
    cpdef void deliver(self, list operations, i64 now, tuple read) except *

cdef class ChargeTemplate(Template):
    cdef readonly object owner, price
    cdef readonly Layout layout
    cdef public tuple periods
    cdef public bytes records, units
    cdef readonly bytes kind
    cdef ChargeTemplate _priced
    @cython.locals(template=ChargeTemplate)
    cpdef ChargeTemplate priced(self, bytes kind, object price, object lease_us)
    cpdef ChargeTemplate with_units(self, bytes lease_id)

cdef class ChargeOperation(Operation):
    cdef readonly object backend, price
    cdef readonly bytes kind
    cdef readonly Charge charge
    cdef public Reservation reservation
    @cython.locals(reservation=Reservation, metering=Metering)
    cpdef void decided(self, bint admitted, i64 now, Numbers row) except *
    cpdef void ask_again(self, i64 now) except *
