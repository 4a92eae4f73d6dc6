"""What a route asks of its caller, and what a token's roles give. Each level includes those below it."""

from __future__ import annotations

from enum import IntEnum


class Level(IntEnum):
    """Of a route: what it takes. Of a caller: what they have; OPEN is then nothing at all."""

    OPEN = 0
    READ_ONLY = 1
    READ_WRITE = 2
    ADMIN = 3
