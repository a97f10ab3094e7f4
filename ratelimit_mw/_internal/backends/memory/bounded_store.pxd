ctypedef long long i64

cdef class StoredState:
    cdef public bint is_stored, is_used
    cpdef bint is_dead(self, i64 now) except -1
    cpdef void dropped(self) except *
