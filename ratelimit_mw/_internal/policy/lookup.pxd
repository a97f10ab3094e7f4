cimport cython
from ratelimit_mw._internal.policy.api_key_reader cimport ApiKeyReader
from ratelimit_mw._internal.policy.identity cimport Identifier
from ratelimit_mw._internal.policy.policy cimport Policy
from ratelimit_mw._internal.policy.routing cimport RouteTable

cdef class LookupEntry:
    cdef readonly Policy policy
    cdef readonly object identity, index, address_key

cdef class PolicyLookup:
    cdef Identifier _identify
    cdef object _policies
    cdef ApiKeyReader _api_keys
    cdef RouteTable _routes
    cdef readonly dict _latest
    cdef readonly bint blocks_callers, blocks_networks
    @cython.locals(api_key=bytes, entry=LookupEntry, is_known=bint)
    cpdef LookupEntry find(self, scope)
    cpdef LookupEntry find_blocked(self, scope)
    cpdef LookupEntry find_blocked_caller(self, scope)
    cpdef LookupEntry find_for(self, identity, scope)
    cpdef LookupEntry find_at(self, identity, index)
    cpdef index_of(self, scope)
