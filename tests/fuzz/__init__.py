"""Broken requests on raw sockets: what they are is in cases.py, how a server takes them in client.py.

``python -m tests.fuzz`` sends 100,000 of them to servers of its own; a few hundred belong to every run of the tests.
"""
