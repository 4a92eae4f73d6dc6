"""Conformance: what clients may rely on. drive.py starts a server and runs all of it; see there.

clients/ needs a published client, whose import name is `queen` too: it runs in that client's own virtual environment
and is invisible from here. test_seed.py is plain HTTP against the server that QUEEN_URL names.
"""

from __future__ import annotations

import os

collect_ignore = ["clients"] if "QUEEN_URL" in os.environ else ["clients", "test_seed.py"]
