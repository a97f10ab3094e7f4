cimport cython
from ratelimit_mw._internal.cache.prefetch cimport Prefetch
from ratelimit_mw._internal.cache.prefetch_state cimport PrefetchedUnit, PrefetchState
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.runtime.leaf cimport Numbers

@cython.final
cdef class Part:
    cdef public Charge charge
    cdef public list sources, others, rest

@cython.final
cdef class UnitsAhead:
    cdef public list shared
    cdef public PrefetchState own
    cdef long _all
    cpdef Charge rest(self, Charge charge)
    @cython.locals(parts=dict)
    cpdef Part part(self, Charge charge, long drawn)
    cdef Part _part(self, Charge charge, long drawn)

@cython.final
cdef class PartialCharge:
    cdef Prefetch _prefetch
    cdef UnitsAhead _ahead
    cdef object _pending
    cdef Part _part
    cdef list _units
    cdef Charge _whole
    cdef public Charge charge
    @cython.locals(part=Charge, own=PrefetchState, in_hand=PrefetchedUnit)
    cpdef ask(self, backend, bytes lease_id, price)
    cpdef put_back(self)
    @cython.locals(outcome=Outcome)
    cdef Outcome _answered(self, Outcome decided)
    @cython.locals(row=Numbers, number=long, place=Py_ssize_t, unit=PrefetchedUnit)
    cdef Numbers _row(self, Outcome decided)
    @cython.locals(state=PrefetchState, own=PrefetchState)
    cdef _take_more(self, Outcome outcome)
