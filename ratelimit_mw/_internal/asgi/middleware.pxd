from ratelimit_mw._internal.limiter.decider cimport Decider
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.lease.manager cimport Leases
from ratelimit_mw._internal.asgi.estimate_hooks cimport EstimateHooks
from ratelimit_mw._internal.asgi.lifespan cimport Lifespan
from ratelimit_mw._internal.live.state cimport Live
from ratelimit_mw._internal.responses.header_sender cimport HeaderSender
from ratelimit_mw._internal.responses.writers cimport Writers

cdef class LimitedApp:
    cdef dict __dict__
    cdef object __weakref__
    cdef public object app, limiter
    cdef public Writers writers
    cdef object _identify_hook, _refusal_hook, _error, _marked
    cdef EstimateHooks _estimate_hooks
    cdef public object _usage, _dashboard
    cdef readonly Lifespan _lifespan
    cdef Live _live
    cdef Decider _decider
    cdef Leases _leases
