cimport cython
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.responses.headers cimport HeaderWriter, add_headers

cdef class HeaderSender:
    cdef object _send
    cdef HeaderWriter _writer
    cdef Lease _lease
    cdef int _left
    cdef readonly bint has_started
    cdef public object refused
    cdef readonly int status
    @cython.locals(ours=list, changed=dict)
    cdef _started(self, message)
