cimport cython

cdef class ApiKeyReader:
    cdef dict _names
    cdef set _sizes
    cdef str _shown
    cdef int _authorization
    @cython.locals(name=bytes, value=bytes, api_key=bytes, found=bytes, found_in=list)
    cpdef bytes read(self, headers)

cdef bytes _from_authorization(bytes value)
cdef bytes _user_name(bytes credentials)
