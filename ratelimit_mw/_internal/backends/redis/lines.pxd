cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Operation

cdef class OrderedOperation(Operation):
    cdef public tuple line
    cdef public Lines lines
    cdef public OrderedOperation behind
    cpdef bint prepare(self) except -1

cdef class Lines:
    cdef object _submit, _loop
    cdef dict _under_way
    @cython.locals(last=OrderedOperation)
    cpdef object submit(self, OrderedOperation operation)
    @cython.locals(behind=OrderedOperation)
    cpdef object go_on(self, OrderedOperation operation)
