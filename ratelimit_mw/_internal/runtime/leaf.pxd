from cpython.pythread cimport PyThread_type_lock

ctypedef long long i64

cdef struct Pair:
    i64 time
    i64 cost

cdef class Entries:
    cdef Pair *_pairs
    cdef Py_ssize_t _head, _end, _room
    cpdef int append(self, i64 time, i64 cost) except -1
    cpdef int extend_last(self, i64 time, i64 cost) except -1
    cpdef i64 first_time(self) except? -1
    cpdef i64 last_time(self) except? -1
    cpdef i64 time_of_sum(self, i64 cost) except? -1
    cpdef int cap_times(self, i64 latest) except -1
    cpdef i64 take(self, i64 since, i64 until, i64 cost) except? -1
    cpdef int drop_empty(self) except -1
    cpdef i64 drop_until(self, i64 time) except? -1
    cpdef int clear(self) except -1
    cdef int _check(self) except -1

cdef class Numbers:
    cdef i64 _few[12]
    cdef i64 *_numbers
    cdef Py_ssize_t _size, _room
    cpdef int append(self, i64 number) except -1
    cpdef i64 at(self, Py_ssize_t place) except? -1

cpdef Numbers numbers_in(bytes data, Py_ssize_t at, Py_ssize_t count)

cdef class Lock:
    cdef PyThread_type_lock _lock
    cdef long _owner
    cdef Py_ssize_t _depth
    cpdef void acquire(self) noexcept
    cpdef void release(self) noexcept

cpdef bytes digits(i64 number)
