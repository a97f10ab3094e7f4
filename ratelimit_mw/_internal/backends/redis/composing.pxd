cimport cython
from ratelimit_mw._internal.backends.redis.operations cimport Operation, Template

ctypedef long long i64

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

@cython.locals(calls=dict, group=list, call=list, operation=Operation, template=Template)
cpdef list apart(list groups)
