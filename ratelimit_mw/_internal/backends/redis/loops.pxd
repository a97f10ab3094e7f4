cimport cython
from ratelimit_mw._internal.backends.redis.lines cimport Lines, OrderedOperation
from ratelimit_mw._internal.backends.redis.operations cimport Operation, Template
from ratelimit_mw._internal.model.reservation cimport Reservation

cdef class LoopSenders:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict senders
    cdef dict _lines
    cpdef Operation submit(self, Operation operation, bint is_awaited=*)
    @cython.locals(operation=OrderedOperation)
    cpdef OrderedOperation submit_in_line(self, OrderedOperation operation)
    cpdef Lines _running_lines(self)
