from ratelimit_mw._internal.backends.redis.backlog cimport Backlog
from ratelimit_mw._internal.backends.redis.operations cimport Operation

cdef class Batcher:
    cdef dict __dict__
    cdef object __weakref__
    cdef public Backlog _backlog
    cdef public object _error, _time
    cdef public bint _is_closed, _flush_is_due
    cpdef void submit(self, Operation operation) except *
