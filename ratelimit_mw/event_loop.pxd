cpdef running_loop()
