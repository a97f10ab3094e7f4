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
    cdef public bint overwrites
    cdef bytes _body
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
    cdef void _tell(self) except *

@cython.locals(operation=Operation, batch=list, taken=Py_ssize_t)
cpdef list take(list queue, Py_ssize_t most)

@cython.locals(each=Operation, first=Operation, size=bytes)
cpdef bytes command_for(list batch)

@cython.locals(operation=Operation)
cpdef double waiting_since(list batch, double now) except? -1

@cython.locals(known=dict, groups=list, members=list, operation=Operation, template=Template)
cpdef list by_template(list batch)

@cython.locals(
    members=list, operation=Operation, template=Template, keys=list, arguments=list, charged=set,
    n_keys=Py_ssize_t, charges=Py_ssize_t, declared=Py_ssize_t, n_declared=Py_ssize_t, tag=bytes, letter=bytes,
    is_shared=bint, is_spread=bint, n_arguments=Py_ssize_t, each=Operation,
)
cpdef tuple compose(list groups)

@cython.locals(
    at=Py_ssize_t, operations=list, template=Template, answer=bytes, read=list, failed=list, first=Operation,
)
cpdef list hand_out(list groups, i64 now, list answers)
