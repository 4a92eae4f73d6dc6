"""Plain HTTP/1.1 without a framework: sockets, the bytes on them, and how long each may take.

What a request means is in routes/, what it does is the engine's. Everything that is not plain HTTP/1.1 goes to
hypercorn, unread.
"""
