cpdef str route_path(scope)

cdef class RouteTable:
    cdef Py_ssize_t _none, _depth
    cdef readonly bint has_rules
    cdef set _methods
    cdef object _index
    cdef readonly dict literal
    cpdef match(self, str method, str path)
    cpdef of_scope(self, scope)
    cdef tuple _by_method(self, str path)
    cdef _search(self, str method, str path)
