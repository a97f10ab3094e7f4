cimport cython

cdef class ApiKeyReader:
    cdef dict _names
    cdef bytes _sizes
    cdef Py_ssize_t _longest
    cdef str _shown
    cdef int _authorization
    @cython.locals(name=bytes, value=bytes, api_key=bytes, found=bytes, found_in=list, size=Py_ssize_t)
    cpdef bytes read(self, headers)

cdef bytes _from_authorization(bytes value)
cdef bytes _user_name(bytes credentials)
