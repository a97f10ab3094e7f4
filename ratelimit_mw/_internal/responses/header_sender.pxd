cimport cython
from ratelimit_mw._internal.lease.lease_record cimport LeaseRecord
from ratelimit_mw._internal.responses.headers cimport HeaderWriter

cdef class Sender:
    cdef object _send
    cdef HeaderWriter _writer
    cdef LeaseRecord _lease
    cdef Py_ssize_t _sent
    cdef readonly int status
    @cython.locals(ours=list)
    cdef _with_headers(self, message)
