"""What the spool holds, in a few numbers. No I/O."""

from __future__ import annotations

from typing import NamedTuple


class SpoolFigures(NamedTuple):
    """How full the spool of a server is. ``oldest_us``: when its first entry was accepted, Unix time; 0: it is empty.

    An entry is what one push request brought for one queue. What could not be stored is in quarantine.
    """

    pending_entries: int = 0
    pending_messages: int = 0
    pending_bytes: int = 0
    quarantined_messages: int = 0
    quarantined_bytes: int = 0
    oldest_us: int = 0
