"""Push requests by the million at about a tenth of a microsecond a message. What comes back is not looked at here.

A request is a template in which the bytes that must differ are marked, and two or three passes in C make it unique:

* the digits of random values stand in the template as the bytes 0x80 to 0x8f, and those in large payloads, which are
  base64, as 0x90 to 0xcf; ``bytes.translate`` with one of many permutations of each alphabet turns them into text;
* the request number (8 decimal digits), the milliseconds of a UUIDv7 and the partition are marks of the same length as
  what replaces them, so ``bytes.replace`` works in place.

Every message is unique by (request number, position in the request): consumers check identities by these two.
"""

from __future__ import annotations

import random
import re
import time
from enum import StrEnum
from urllib.parse import urlsplit

REQUEST_MARK = b"########"
MILLISECONDS_MARK = b"@@@@@@@@-@@@@"
PARTITION_MARK = b"p~~~~~~"
SMALLEST = 32  # bytes of a payload
FIRST_REQUEST = 10_000_000  # 8 digits from the first to the last, and a valid JSON number
TABLES = 1024  # permutations; with a request number in every id, using one again makes no id repeat
IDENTITY = re.compile(rb'"r":(\d{8}),"i":(\d+)')

_DIGITS = b"0123456789abcdef"
_MARKED_DIGITS = bytes(range(0x80, 0x90))
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_MARKED_LETTERS = bytes(range(0x90, 0xD0))
_ALL_BYTES = bytes(range(256))


class Ids(StrEnum):
    """Who names the messages."""

    NONE = "none"  # the server mints transaction ids
    V7 = "v7"  # UUIDv7 of the moment of sending, random within the millisecond
    V4 = "v4"  # random


class PushBodies:
    """An endless supply of push requests for one queue. ``next`` does not checkpoint."""

    def __init__(
        self,
        url: str,
        queue: str,
        *,
        batch: int,
        partitions: int = 1,
        spread: bool = False,
        ids: Ids = Ids.NONE,
        payload_bytes: int = SMALLEST,
        seed: int | None = None,
    ) -> None:
        """Build the template.

        Args:
            partitions: requests go round these, one partition per request.
            spread: instead, the messages of each request go round the partitions.
            payload_bytes: about the length of a payload; at least 32. A larger one is filled with random
                base64: what JSON makes of bytes that do not compress.
            seed: of the random values; None differs in every process.
        """
        generator = random.Random(seed)
        self._partitions = partitions if not spread else 1
        self._ids = ids
        self._requests = 0
        suffixes = generator.sample(range(16**10), batch)
        items = []
        for i in range(batch):
            number = f"{i}".encode()
            alphabet = _MARKED_LETTERS if payload_bytes > SMALLEST else _MARKED_DIGITS
            filler = bytes(generator.choices(alphabet, k=max(4, payload_bytes - 28 - len(number))))
            partition = _partition_name(i % partitions) if spread else PARTITION_MARK
            item = b'{"queue":"%b","partition":"%b","payload":{"r":%b,"i":%b,"x":"%b"}' % (
                queue.encode(),
                partition,
                REQUEST_MARK,
                number,
                filler,
            )
            if ids is not Ids.NONE:
                a, b, c = _split(f"{suffixes[i]:010x}".encode().translate(_to_marks()))
                head = MILLISECONDS_MARK if ids is Ids.V7 else _marked(generator, 8) + b"-" + _marked(generator, 4)
                version = b"7" if ids is Ids.V7 else b"4"
                item += b',"transactionId":"%b-%b%b-8%b-%b%b"' % (head, version, a, b, c, REQUEST_MARK)
            items.append(item + b"}")
        self._template = b'{"items":[' + b",".join(items) + b"]}"
        if self._partitions == 1:
            self._template = self._template.replace(PARTITION_MARK, _partition_name(0))
        self.head = (
            f"POST /api/v1/push HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(self._template)}\r\n\r\n"
        ).encode()
        self._tables = []
        for _ in range(TABLES):
            digits, letters = bytearray(_DIGITS), bytearray(_LETTERS)
            generator.shuffle(digits)
            generator.shuffle(letters)
            self._tables.append(_ALL_BYTES[:0x80] + digits + letters + _ALL_BYTES[0xD0:])

    def next(self) -> bytes:
        """The body of the next request; send it after ``head``."""
        k = self._requests
        self._requests = k + 1
        body = self._template.translate(self._tables[k % TABLES]).replace(REQUEST_MARK, b"%d" % (FIRST_REQUEST + k))
        if self._partitions > 1:
            body = body.replace(PARTITION_MARK, _partition_name(k % self._partitions))
        if self._ids is Ids.V7:
            hexadecimal = b"%012x" % (time.time_ns() // 1_000_000)
            body = body.replace(MILLISECONDS_MARK, hexadecimal[:8] + b"-" + hexadecimal[8:])
        return body


def identities(body: bytes) -> list[tuple[int, int]]:
    """(request number, position) of every message of a popped body, in order."""
    return [(int(request), int(position)) for request, position in IDENTITY.findall(body)]


def _partition_name(number: int) -> bytes:
    return b"p%06d" % number


def _marked(generator: random.Random, length: int) -> bytes:
    return bytes(generator.choices(_MARKED_DIGITS, k=length))


def _to_marks() -> bytes:
    return bytes.maketrans(_DIGITS, _MARKED_DIGITS)


def _split(digits: bytes) -> tuple[bytes, bytes, bytes]:
    return digits[:3], digits[3:6], digits[6:]
