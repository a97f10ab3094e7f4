from ratelimit_mw._internal.policy.lookup cimport PolicyLookup

cdef class Rules:
    cdef readonly object settings, code_limits, identify, policies, registered, networks, version
    cdef readonly PolicyLookup lookup
    cdef dict _adopted
