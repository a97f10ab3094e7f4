cimport cython
from ratelimit_mw._internal.backends.redis.estimate_operation cimport MeterTemplate, UnitsOperation
from ratelimit_mw._internal.backends.redis.loops cimport LoopSenders
from ratelimit_mw._internal.backends.redis.operations cimport Template
from ratelimit_mw._internal.model.reservation cimport Metering, Reservation

cdef class UnitOperations:
    cdef object _names, _most, _templates
    cdef LoopSenders _loops
    cdef dict _known
    cpdef UnitsOperation settle(self, Reservation reservation, units, bint replace)
    cpdef UnitsOperation finish(self, Reservation reservation, bint keeps)
    cpdef UnitsOperation hold(self, Reservation reservation)
    cpdef UnitsOperation _send(self, object mode, Reservation reservation, units)
    @cython.locals(reservation=Reservation, metering=Metering, meters=tuple, place=Py_ssize_t, template=MeterTemplate)
    cpdef bint prepare(self, UnitsOperation operation) except -1
    cpdef Template script_template(self, UnitsOperation operation, otherwise)
    cpdef MeterTemplate _of(self, object meter)
