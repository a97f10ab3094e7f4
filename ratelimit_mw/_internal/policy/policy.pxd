from ratelimit_mw._internal.model.charge cimport Charge

cdef class Policy:
    cdef public object identity, route, price, currency, too_small, on_failure, on_failure_priced, prefetch_state, ahead, answers, shadowed, enforced
    cdef public Charge charge, priced_charge
    cdef public bint shadow, is_exempt, is_blocked, is_decided, is_latest
    cdef public long long admitted
    cdef public dict refused
