from ratelimit_mw._internal.live.rules cimport Rules

cdef class Live:
    cdef dict __dict__
    cdef object __weakref__
    cdef public Rules rules
    cdef public object resolver
    cdef public object watch
    cdef public set ready
