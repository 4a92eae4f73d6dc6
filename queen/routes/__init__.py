"""HTTP: read a request, call the engine once, write the answer."""
