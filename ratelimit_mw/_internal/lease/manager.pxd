cimport cython
from ratelimit_mw._internal.runtime.event_loop cimport running_loop
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.lease.lease cimport Lease
from ratelimit_mw._internal.lease.renewals cimport Renewals

cdef class Leases:
    cdef dict __dict__
    cdef object __weakref__
    cdef public dict renewals
    cdef public object freed
    cpdef void start_renewing(self, Lease lease, Charge charge) except *
    cpdef void undo(self, Lease lease) except *
    cpdef void end(self, Lease lease, bint failed, int status=*) except *
    cdef _finish(self, Lease lease, reservation, action)
    @cython.locals(renewals=Renewals)
    cpdef Renewals renewing(self)
