from ratelimit_mw._internal.responses.headers cimport HeaderWriter

cdef class Writers:
    cdef readonly object settings, refusals
    cdef readonly HeaderWriter headers
    cdef readonly bint has_own_paths
