cimport cython
from ratelimit_mw._internal.backends.redis.lines cimport OrderedOperation
from ratelimit_mw._internal.backends.redis.operations cimport Operation, Template
from ratelimit_mw._internal.model.reservation cimport Metering, Reservation

cdef class MeterTemplate(Template):
    cdef readonly bytes windows
    cdef readonly str line
    cdef bytes _remove
    @cython.locals(
        first=UnitsOperation, template=MeterTemplate, keys=list, arguments=list, by_meter=dict, pieces=list,
        n_keys=Py_ssize_t,
    )
    cpdef bytes call_apart(self, list operations, bint by_digest)
    @cython.locals(operation=UnitsOperation, left=list, sent=list, number=Py_ssize_t, at=Py_ssize_t, end=Py_ssize_t)
    cpdef list take_reply(self, list operations, reply)

cdef class UnitsOperation(OrderedOperation):
    cdef readonly object mode, units
    cdef readonly Reservation reservation
    cdef public list pieces
    cdef object _way
    cdef bint _is_done_perhaps
    @cython.locals(metering=Metering)
    cpdef bint take_closed(self, bytes codes) except -1

@cython.locals(found=dict)
cdef dict _by_meter(list operations)
