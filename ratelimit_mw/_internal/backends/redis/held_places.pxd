cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Template

cdef class HeldPlaces:
    cdef bytes _slot_keys, _period_keys, _record
    cdef Py_ssize_t _n_slots
    cdef tuple _period_ends
    cdef list _ends
    cdef readonly Template release
    cpdef Template end(self, object money)
