"""When a worker that does nothing wrong is replaced all the same: it has grown too large, or too old."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

AGE_JITTER: Final = 0.2
"""A worker grows older than the limit by up to this part of it, so that those that began together do not end so."""


@dataclass(frozen=True)
class Limits:
    """What a worker may be. 0: no limit."""

    rss_bytes: int = 0
    age_seconds: float = 0.0

    def exceeded(self, rss_bytes: int, age_seconds: float, lot: float) -> str:
        """Why such a worker is to be replaced; empty: it may stay.

        Args:
            lot: what the worker has drawn once and for all, from 0 to 1.
        """
        if 0 < self.rss_bytes < rss_bytes:
            return f"it holds {rss_bytes // 2**20} MiB of {self.rss_bytes // 2**20} that it may"
        if 0 < self.age_seconds * (1 + AGE_JITTER * lot) < age_seconds:
            return f"it has served for {age_seconds:.0f} s of {self.age_seconds:.0f} that it may"
        return ""
