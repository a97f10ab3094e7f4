from ratelimit_mw._internal.policy.policy cimport Policy

cdef class EstimateHooks:
    cdef object _price, _estimate, _limiter
    cpdef object ask(self, dict scope, Policy policy, object identity)
    cdef object _ask_price(self, scope, Policy policy, identity)
    cdef object _ask_units(self, scope, Policy policy, identity)
    cdef object _units_of(self, object answer, Policy policy)

cdef object _price_of(object answer, Policy policy)
