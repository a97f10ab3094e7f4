cdef class Identifier:
    cdef dict __dict__
    cdef object __weakref__
    cdef bint _unknown_are_anonymous, _unknown_by_address
    cdef readonly bint blocks_networks, blocks_plans
    cdef readonly object _read_address
    cdef readonly dict _by_key, _unlisted
    cdef readonly dict listed
    cdef dict _listed
    cdef object _registered
    cpdef object caller(self, api_key, scope)
    cpdef bint remembers(self, api_key)
    cpdef object counted_address_key(self, identity, scope)
    cpdef object address_key(self, scope)
    cpdef object blocked_caller(self, scope)
    cpdef object of_key(self, api_key_hash)
    cpdef object of_unknown(self, api_key_hash, hop)
    cpdef object of_address(self, address)
    cpdef object at_hop(self, hop)
    cdef object _remember(self, identity, api_key_hash, hop)
    cdef object _look_up(self, api_key)
