cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome

ctypedef long long i64

@cython.final
cdef class CachedRefusal:
    cdef readonly Charge charge
    cdef readonly Outcome outcome
    cdef readonly double received, until
    cdef readonly tuple kind
    cdef public object answer
    cpdef i64 age(self, double now) except *

@cython.final
cdef class RefusalCache:
    cdef object __weakref__
    cdef object _lock
    cdef public object now
    cdef readonly dict by_charge, _by_caller, _by_shared
    @cython.locals(refused=CachedRefusal)
    cpdef CachedRefusal find(self, Charge charge)
    cpdef void admitted(self, Charge charge, Outcome outcome) except *
