cimport cython
from ratelimit_mw._internal.runtime.leaf cimport Lock
from ratelimit_mw._internal.policy.policy cimport Policy

@cython.final
cdef class DecisionCounts:
    cdef object __weakref__
    cdef Lock _lock
    cdef list _touched
    cdef dict _totals, _callers, _routes
    cpdef void admit(self, Policy policy) except *
    @cython.locals(refused=dict)
    cpdef void refuse(self, Policy policy, tuple kind) except *
    cpdef void touch(self, Policy policy) except *
    cdef void _add_up(self) except *
    cdef void _add(self, Policy policy, str outcome, str limit, long long number) except *
