"""Conformance: what clients may rely on. drive.py runs all of it; see there for the two halves.

clients/ needs a published client, whose import name is `queen` too: it runs in that client's own virtual environment
and is invisible from here. test_seed.py is plain HTTP and runs beside the other tests.
"""

from __future__ import annotations

collect_ignore = ["clients"]
