from ratelimit_mw._internal.lease.lease cimport Lease

cdef class Arrival:
    cdef Lease _lease
    cdef str _what
    cdef Py_ssize_t _left
    cdef object _done
    cpdef void add(self, sent, take_in, Lease lease, amount) except *
    cpdef void add_task(self, task) except *
