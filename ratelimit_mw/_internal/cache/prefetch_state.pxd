cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.outcome cimport Outcome
from ratelimit_mw._internal.runtime.leaf cimport Numbers

ctypedef long long i64

@cython.final
cdef class PrefetchedBlock:
    cdef public object units, era
    cdef public i64 size, low, decided, left_over
    cdef public list windows, returned
    cdef public double received, until

@cython.final
cdef class PrefetchState:
    cdef public Charge charge
    cdef public PrefetchedBlock block, next_block
    cdef public double life, asking_until
    cdef public i64 ahead
    cdef public double _period, _began, _marked
    cdef public i64 _spent, _lost, _start, _started
    cdef public tuple _before, _now
    cpdef PrefetchedBlock after(self, PrefetchedBlock block)
    cpdef void put_back(self, PrefetchedBlock block, i64 unit) except *

@cython.final
@cython.freelist(16)
cdef class PrefetchedUnit:
    cdef PrefetchState _state
    cdef PrefetchedBlock _block
    cdef i64 _left, _age
    cdef public Charge charge
    cpdef void put_back(self) except *
    cpdef Outcome admission(self)
    @cython.locals(used=i64, reset_after=i64, unspent=i64)
    cpdef void append_status(self, Numbers row, Py_ssize_t place, bint spent) except *
