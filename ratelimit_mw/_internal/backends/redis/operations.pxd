cimport cython

ctypedef long long i64

cdef class Template:
    cdef readonly bytes keys, head, record
    cdef public bytes command
    cdef readonly Py_ssize_t n_keys
    cdef readonly object unpack
    cdef public str charges
    cdef public bytes tag
    cdef public int slot
    cdef public bint overwrites, is_apart
    cdef bytes _body
    @cython.locals(each=Operation, first=Operation, size=bytes)
    cpdef bytes call_apart(self, list operations, bint by_digest)
    cpdef list take_reply(self, list operations, reply)
    cpdef bytes several(self, ids)
    cpdef object read(self, bytes answer, Py_ssize_t number)
    @cython.locals(operation=Operation)
    cpdef void deliver(self, list operations, i64 now, object answer) except *

cdef class Operation:
    cdef public Template template
    cdef public bytes id
    cdef public object future, result, listener
    cdef public double since
    cdef public bint is_asking, is_upkeep
    cdef public int resend, tries
    cpdef void answer(self, answer) except *
    cpdef void fail(self, error) except *
    cpdef void orphaned(self, answer) except *
    cpdef void tell(self, listener) except *
    cpdef void forget_loop(self) except *
    cpdef void lose_answer(self) except *
    cpdef void leave_to_script(self) except *
    cdef void _tell(self) except *

@cython.locals(operation=Operation, batch=list, taken=Py_ssize_t)
cpdef list take(list queue, Py_ssize_t most)
