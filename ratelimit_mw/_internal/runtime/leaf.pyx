# cython: language_level=3, binding=False
"""Compiled equal of `leaf.py`, which describes it: storage and text in C, without a rule of rate limiting."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.pythread cimport (NOWAIT_LOCK, WAIT_LOCK, PyThread_acquire_lock, PyThread_allocate_lock,
                               PyThread_free_lock, PyThread_get_thread_ident, PyThread_release_lock)
from cython cimport final, freelist
from libc.string cimport memcpy, memmove


cdef class Entries:
    """Pairs of a time and a cost, oldest first, as 64-bit integers."""

    def __dealloc__(self):
        PyMem_Free(self._pairs)

    def __len__(self):
        return self._end - self._head

    cpdef int append(self, i64 time, i64 cost) except -1:
        cdef Py_ssize_t room
        cdef void *grown
        if self._end == self._room:
            room = self._room + (self._room >> 3) + 3
            grown = PyMem_Realloc(self._pairs, room * sizeof(Pair))
            if grown is NULL: raise MemoryError
            self._pairs, self._room = <Pair *>grown, room
        self._pairs[self._end].time, self._pairs[self._end].cost = time, cost
        self._end += 1
        return 0

    cpdef int extend_last(self, i64 time, i64 cost) except -1:
        self._check()
        self._pairs[self._end - 1].time = time
        self._pairs[self._end - 1].cost += cost
        return 0

    cpdef i64 first_time(self) except? -1:
        self._check()
        return self._pairs[self._head].time

    cpdef i64 last_time(self) except? -1:
        self._check()
        return self._pairs[self._end - 1].time

    cpdef i64 time_of_sum(self, i64 cost) except? -1:
        cdef Py_ssize_t at
        for at in range(self._head, self._end):
            cost -= self._pairs[at].cost
            if cost <= 0: return self._pairs[at].time
        return -1

    cpdef int cap_times(self, i64 latest) except -1:
        cdef i64 cost = 0
        cdef Py_ssize_t end = self._end
        while end > self._head and self._pairs[end - 1].time >= latest:
            end -= 1
            cost += self._pairs[end].cost
        if end < self._end:
            self._pairs[end].time, self._pairs[end].cost = latest, cost
            self._end = end + 1
        return 0

    cpdef i64 take(self, i64 since, i64 until, i64 cost) except? -1:
        cdef Py_ssize_t at = self._head
        while at < self._end and self._pairs[at].time < since:
            at += 1
        if at == self._end or self._pairs[at].time > until: return 0
        if cost > self._pairs[at].cost:
            cost = self._pairs[at].cost
        self._pairs[at].cost -= cost
        return cost

    cpdef int drop_empty(self) except -1:
        cdef Py_ssize_t at, kept = 0
        for at in range(self._head, self._end):
            if self._pairs[at].cost:
                self._pairs[kept] = self._pairs[at]
                kept += 1
        self._head, self._end = 0, kept
        return 0

    cpdef i64 drop_until(self, i64 time) except? -1:
        cdef Py_ssize_t head = self._head
        cdef i64 cost = 0
        while head < self._end and (self._pairs[head].time <= time or self._pairs[head].cost == 0):
            cost += self._pairs[head].cost
            head += 1
        if head > 32 and head * 2 > self._end:
            self._end -= head
            memmove(self._pairs, self._pairs + head, self._end * sizeof(Pair))
            head = 0
        self._head = head
        return cost

    cpdef int clear(self) except -1:
        PyMem_Free(self._pairs)
        self._pairs = NULL
        self._head = self._end = self._room = 0
        return 0

    cdef int _check(self) except -1:
        if self._head == self._end: raise IndexError("there are no entries")
        return 0


@final
@freelist(16)
cdef class Numbers:
    """Whole numbers of 64 bits, one behind the other."""

    def __cinit__(self, numbers=()):
        self._numbers, self._room = self._few, 12
        for each in numbers: self.append(each)

    def __dealloc__(self):
        if self._numbers is not self._few: PyMem_Free(self._numbers)

    def __len__(self):
        return self._size

    def __iter__(self):
        return iter([self._numbers[at] for at in range(self._size)])

    cpdef int append(self, i64 number) except -1:
        cdef void *grown
        if self._size == self._room:
            grown = PyMem_Realloc(NULL if self._room == 12 else self._numbers, 2 * self._room * sizeof(i64))
            if grown is NULL: raise MemoryError
            if self._room == 12: memcpy(grown, self._few, sizeof(self._few))
            self._numbers, self._room = <i64 *>grown, 2 * self._room
        self._numbers[self._size] = number
        self._size += 1
        return 0

    cpdef i64 at(self, Py_ssize_t place) except? -1:
        if not 0 <= place < self._size: raise IndexError("there is no such number")
        return self._numbers[place]


cpdef Numbers numbers_in(bytes data, Py_ssize_t at, Py_ssize_t count):
    cdef Numbers made = Numbers.__new__(Numbers)
    cdef Py_ssize_t place, byte
    cdef i64 number
    cdef const unsigned char *text = <const unsigned char *>PyBytes_AS_STRING(data) + at
    if at < 0 or count < 0 or at + 8 * count > len(data):
        raise ValueError(f"{len(data)} bytes have no {count} numbers from {at} on")
    for place in range(count):
        number = 0
        for byte in range(7, -1, -1):
            number = (number << 8) | text[8 * place + byte]
        made.append(number)
    return made


cdef class Lock:
    """A lock that the thread which holds it may take again, like `threading.RLock`."""

    def __cinit__(self):
        self._lock = PyThread_allocate_lock()
        if self._lock is NULL: raise MemoryError

    def __dealloc__(self):
        if self._lock is not NULL: PyThread_free_lock(self._lock)

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()

    cpdef void acquire(self) noexcept:
        cdef long me = PyThread_get_thread_ident()
        if self._depth == 0 or self._owner != me:
            if not PyThread_acquire_lock(self._lock, NOWAIT_LOCK):
                with nogil:  # another thread holds it, and may need the interpreter to go on
                    PyThread_acquire_lock(self._lock, WAIT_LOCK)
            self._owner = me
        self._depth += 1

    cpdef void release(self) noexcept:
        self._depth -= 1
        if self._depth == 0:
            PyThread_release_lock(self._lock)


cpdef bytes digits(i64 number):
    cdef char text[24]
    cdef int at = 24
    cdef unsigned long long rest = <unsigned long long>(-number if number < 0 else number)
    while True:
        at -= 1
        text[at] = <char>(48 + rest % 10)
        rest //= 10
        if rest == 0: break
    if number < 0:
        at -= 1
        text[at] = 45
    return PyBytes_FromStringAndSize(text + at, 24 - at)
