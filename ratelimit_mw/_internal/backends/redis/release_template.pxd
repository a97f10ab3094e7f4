cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Template

cdef class ReleaseTemplate(Template):
    cdef bytes _period_keys, _records
    cdef tuple _period_ends
    cdef dict _ends
    @cython.locals(template=Template)
    cpdef Template end(self, object action)
