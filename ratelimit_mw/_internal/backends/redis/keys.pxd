cimport cython
from ratelimit_mw._internal.model.charge cimport Charge
from ratelimit_mw._internal.model.reservation cimport Reservation

cdef class ChargeKeys:
    cdef bytes _text
    cdef list _sizes
    @cython.locals(filled=list, size=Py_ssize_t, tag=bytes, partition=str, last=str)
    cpdef bytes for_charge(self, Charge charge)
    cpdef object only_partition_of(self, Charge charge)
