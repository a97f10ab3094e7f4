cimport cython
from ratelimit_mw._internal.runtime.leaf cimport digits
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.cache.refusals cimport CachedRefusal
from ratelimit_mw._internal.responses.headers cimport HeaderWriter

ctypedef long long i64

@cython.final
cdef class Response:
    cdef readonly object status
    cdef readonly list headers
    cdef readonly bytes body
    cpdef tuple _values(self)

@cython.final
cdef class RefusalWriter:
    cdef object _settings
    cdef HeaderWriter _writer
    cdef readonly dict _bodies
    @cython.locals(refused=CachedRefusal)
    cpdef answer(self, Lease lease)
    @cython.locals(headers=list, left=i64, response=Response, remembered=RememberedResponse)
    cpdef Response again(self, CachedRefusal refused, i64 age)

@cython.final
cdef class RememberedResponse:
    cdef readonly RefusalWriter writer
    cdef readonly Response response
    cdef readonly i64 at, wait, last
