"""Requests as bytes, and what must come of them: on the short path, and through hypercorn and Quart.

An ``Odd`` is sent as it is, piece by piece. ``statuses`` are those of its answers; ``open`` says whether the connection
answers a further request. Where hypercorn (h11) judges differently, ``hypercorn`` says how; where it is the more
lenient one, the short path is strict on purpose: RFC 9112 allows both and two readers must never disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from .conftest import Standing
from .support import Client

H = b"Host: x\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
PUSH = b"POST /api/v1/push HTTP/1.1\r\nHost: x\r\n"
EMPTY = b'{"items":[]}'  # the body of a push that stores nothing; 12 bytes
CHUNKED = PUSH + b"Transfer-Encoding: chunked\r\n\r\n"
CONFIGURED = b"c\r\n" + EMPTY + b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Verdict:
    statuses: tuple[int, ...]
    open: bool


def ok(*statuses: int) -> Verdict:
    return Verdict(statuses, open=True)


def cut(*statuses: int) -> Verdict:
    return Verdict(statuses, open=False)


UNTOLD = Verdict((), open=False)
"""hypercorn's answer takes longer than a test should, or is lost when it closes a connection on which more comes."""


@dataclass(frozen=True)
class Odd:
    name: str
    pieces: tuple[bytes, ...]
    verdict: Verdict
    hypercorn: Verdict | None = None


def odd(name: str, *pieces: bytes, fast: Verdict, hypercorn: Verdict | None = None) -> Odd:
    return Odd(name, pieces, fast, hypercorn)


ODDITIES = [
    # plain
    odd("a request", GET, fast=ok(200)),
    odd("a request byte by byte", *(bytes([byte]) for byte in GET), fast=ok(200)),
    odd("a push", PUSH + b"Content-Length: 12\r\n\r\n" + EMPTY, fast=ok(201)),
    odd("a push in two segments", PUSH + b"Content-Length: 12\r\n\r\n", EMPTY, fast=ok(201)),
    odd("an empty body", PUSH + b"Content-Length: 0\r\n\r\n", fast=ok(400)),
    odd("no body at all", PUSH + b"\r\n", fast=ok(400)),
    odd("a chunked push", CHUNKED + CONFIGURED, fast=ok(201)),
    odd("a chunked push byte by byte", CHUNKED, *(bytes([byte]) for byte in CONFIGURED), fast=ok(201)),
    odd("chunks with extensions", CHUNKED + b'c;a=b;c="d"\r\n' + EMPTY + b"\r\n0;x\r\n\r\n", fast=ok(201)),
    odd("a trailer", CHUNKED + b"c\r\n" + EMPTY + b"\r\n0\r\nX-Sum: 1\r\n\r\n", fast=ok(201)),
    odd("empty lines before a request", b"\r\n\r\n" + GET, fast=ok(200), hypercorn=cut(400)),
    odd("an unknown route", b"GET /api/v1/nope HTTP/1.1\r\n" + H + b"\r\n", fast=ok(404)),
    odd("another method", b"PUT /api/v1/push HTTP/1.1\r\n" + H + b"Content-Length: 0\r\n\r\n", fast=ok(405)),
    odd("a rare method", b"PROPFIND /livez HTTP/1.1\r\n" + H + b"\r\n", fast=ok(405)),
    odd("a method of nobody", b"FOO /livez HTTP/1.1\r\n" + H + b"\r\n", fast=ok(405)),
    odd("a method in lower case", b"get /livez HTTP/1.1\r\n" + H + b"\r\n", fast=ok(200)),
    odd("options", b"OPTIONS /any/thing HTTP/1.1\r\n" + H + b"\r\n", fast=ok(204)),
    odd("options of the server", b"OPTIONS * HTTP/1.1\r\n" + H + b"\r\n", fast=ok(204)),
    odd("the absolute form", b"GET http://x/livez HTTP/1.1\r\n" + H + b"\r\n", fast=ok(200)),
    odd("a query that is not UTF-8", b"GET /api/v1/pop?a=%ff HTTP/1.1\r\n" + H + b"\r\n", fast=ok(400)),
    odd("a name that is not UTF-8", b"GET /api/v1/pop/queue/%ff HTTP/1.1\r\n" + H + b"\r\n", fast=ok(400)),
    odd("an escaped slash", b"GET /api/v1/pop/queue/a%2Fb HTTP/1.1\r\n" + H + b"\r\n", fast=ok(204)),
    odd("a raw slash", b"GET /api/v1/pop/queue/a/b HTTP/1.1\r\n" + H + b"\r\n", fast=ok(404)),
    odd("an escaped letter of a route", b"GET /livez%61 HTTP/1.1\r\n" + H + b"\r\n", fast=ok(404)),
    odd("an empty name", b"GET /api/v1/pop/queue/ HTTP/1.1\r\n" + H + b"\r\n", fast=ok(204)),
    odd("two slashes", b"GET //livez HTTP/1.1\r\n" + H + b"\r\n", fast=ok(200)),
    # the life of a connection
    odd("close", b"GET /livez HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n", fast=cut(200)),
    odd("close in a list", b"GET /livez HTTP/1.1\r\n" + H + b"Connection: x, CLOSE\r\n\r\n", fast=cut(200)),
    odd("HTTP/1.0", b"GET /livez HTTP/1.0\r\n\r\n", fast=cut(200)),
    odd("HTTP/1.0 that wants to stay", b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", fast=cut(200)),
    odd(
        "an error keeps the connection",
        b"POST /api/v1/push HTTP/1.1\r\n" + H + b"Content-Length: 1\r\n\r\n{",
        fast=ok(400),
    ),
    # pipelining
    odd("two at once", GET + GET, fast=ok(200, 200)),
    odd("many at once", GET * 200, fast=ok(*[200] * 200)),
    odd("a push before a get", PUSH + b"Content-Length: 12\r\n\r\n" + EMPTY + GET, fast=ok(201, 200)),
    odd("chunks before a get", CHUNKED + CONFIGURED + GET, fast=ok(201, 200)),
    odd("two and a half", GET + GET[:20], GET[20:] + GET, fast=ok(200, 200, 200)),
    odd("an error before a get", b"GET /nope HTTP/1.1\r\n" + H + b"\r\n" + GET, fast=ok(404, 200)),
    odd(
        "nothing is answered behind a close",
        b"GET /livez HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n" + GET,
        fast=cut(200),
        hypercorn=cut(400),
    ),
    odd("garbage behind a request", GET + b"\x00\x01\x02\r\n\r\n", fast=cut(200, 400)),
    # sizes
    odd("a body over the limit", PUSH + b"Content-Length: 100001\r\n\r\n", fast=cut(413)),
    odd("a body far over the limit", PUSH + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 1000, fast=cut(413)),
    odd(
        "a body over the limit, sent in full",
        PUSH + b"Content-Length: 150000\r\n\r\n" + b"x" * 150_000,
        fast=cut(413),
        hypercorn=ok(413),
    ),
    odd("chunks over the limit", CHUNKED + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 7, fast=cut(413)),
    odd("a chunk announced as huge", CHUNKED + b"fffffff\r\n" + b"x" * 120_000, fast=cut(413)),
    odd("a long target", b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n" + H + b"\r\n", fast=cut(431), hypercorn=UNTOLD),
    odd("a long header", GET[:-2] + b"X: " + b"a" * 200_000 + b"\r\n\r\n", fast=cut(431), hypercorn=UNTOLD),
    odd("a header without an end", GET[:-2] + b"X: " + b"a" * 400_000, fast=cut(431), hypercorn=UNTOLD),
    odd(
        "many headers",
        GET[:-2] + b"".join(b"X-%d: 1\r\n" % n for n in range(101)) + b"\r\n",
        fast=cut(431),
        hypercorn=ok(200),
    ),
    odd(
        "many long headers",
        GET[:-2] + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(90)) + b"\r\n",
        fast=cut(431),
        hypercorn=ok(200),
    ),
    odd("a chunk extension without an end", CHUNKED + b"c;" + b"a" * 400_000, fast=cut(431), hypercorn=UNTOLD),
    odd(
        "a trailer without an end", CHUNKED + CONFIGURED[:-2] + b"X: " + b"a" * 400_000, fast=cut(431), hypercorn=UNTOLD
    ),
    # two readers, two lengths
    odd(
        "a length and chunks",
        PUSH + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CONFIGURED,
        fast=cut(400),
        hypercorn=ok(201),
    ),
    odd(
        "chunks and a length",
        PUSH + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CONFIGURED,
        fast=cut(400),
        hypercorn=ok(201),
    ),
    odd("two lengths", PUSH + b"Content-Length: 12\r\nContent-Length: 13\r\n\r\n" + EMPTY, fast=cut(400)),
    odd(
        "the same length twice",
        PUSH + b"Content-Length: 12\r\nContent-Length: 12\r\n\r\n" + EMPTY,
        fast=cut(400),
        hypercorn=ok(201),
    ),
    odd("lengths in a list", PUSH + b"Content-Length: 12, 13\r\n\r\n" + EMPTY, fast=cut(400)),
    odd("a signed length", PUSH + b"Content-Length: +12\r\n\r\n" + EMPTY, fast=cut(400)),
    odd("a negative length", PUSH + b"Content-Length: -1\r\n\r\n" + EMPTY, fast=cut(400)),
    odd("a length in hexadecimal", PUSH + b"Content-Length: 0xc\r\n\r\n" + EMPTY, fast=cut(400)),
    odd("an empty length", PUSH + b"Content-Length: \r\n\r\n" + EMPTY, fast=cut(400)),
    odd("a length of 64 digits", PUSH + b"Content-Length: " + b"9" * 64 + b"\r\n\r\n", fast=cut(400)),
    # two readers, two codings
    odd("an unknown coding", PUSH + b"Transfer-Encoding: gzip\r\n\r\n", fast=cut(501)),
    odd("a coding under the chunks", PUSH + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CONFIGURED, fast=cut(501)),
    odd(
        "chunked twice",
        PUSH + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CONFIGURED,
        fast=cut(400),
        hypercorn=cut(501),
    ),
    odd(
        "two codings in two headers",
        PUSH + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CONFIGURED,
        fast=cut(400),
        hypercorn=cut(501),
    ),
    odd("a coding nearly chunked", PUSH + b"Transfer-Encoding: xchunked\r\n\r\n" + CONFIGURED, fast=cut(501)),
    odd("a coding with a vertical tab", PUSH + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + CONFIGURED, fast=cut(400)),
    odd("a coding in quotes", PUSH + b'Transfer-Encoding: "chunked"\r\n\r\n' + CONFIGURED, fast=cut(501)),
    odd("a space before the colon", PUSH + b"Transfer-Encoding : chunked\r\n\r\n" + CONFIGURED, fast=cut(400)),
    odd(
        "a folded coding",
        PUSH + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CONFIGURED,
        fast=cut(400),
        hypercorn=ok(201),
    ),
    odd(
        "a length in a trailer",
        CHUNKED + b"c\r\n" + EMPTY + b"\r\n0\r\nContent-Length: 5\r\n\r\n",
        fast=cut(400),
        hypercorn=ok(201),
    ),
    # two readers, two sets of chunks
    odd("a chunk size that is none", CHUNKED + b"zz\r\n" + EMPTY, fast=cut(400)),
    odd("a chunk size with a prefix", CHUNKED + b"0xc\r\n" + EMPTY + b"\r\n0\r\n\r\n", fast=cut(400)),
    odd("a negative chunk size", CHUNKED + b"-c\r\n" + EMPTY + b"\r\n0\r\n\r\n", fast=cut(400)),
    odd(
        "a chunk size that overflows",
        CHUNKED + b"1000000000000000c\r\n" + EMPTY + b"\r\n0\r\n\r\n",
        fast=cut(400),
        hypercorn=UNTOLD,
    ),
    odd(
        "a space behind a chunk size", CHUNKED + b"c \r\n" + EMPTY + b"\r\n0\r\n\r\n", fast=cut(400), hypercorn=ok(201)
    ),
    odd("a chunk longer than its size", CHUNKED + b"b\r\n" + EMPTY + b"\r\n0\r\n\r\n", fast=cut(400)),
    odd("chunk lines that end in LF", CHUNKED + b"c\n" + EMPTY + b"\n0\n\n", fast=cut(400), hypercorn=UNTOLD),
    # two readers, two sets of lines
    odd("lines that end in LF", GET.replace(b"\r\n", b"\n"), fast=cut(400), hypercorn=ok(200)),
    odd("a header line that ends in LF", GET[:-2] + b"A: b\nC: d\r\n\r\n", fast=cut(400), hypercorn=ok(200)),
    odd("a CR within a header", GET[:-2] + b"A: b\rC: d\r\n\r\n", fast=cut(400)),
    odd("a NUL within a header", GET[:-2] + b"A: b\0c\r\n\r\n", fast=cut(400)),
    odd("a folded header", GET[:-2] + b"A: b\r\n c\r\n\r\n", fast=cut(400), hypercorn=ok(200)),
    odd("a line that is no header", GET[:-2] + b"nothing\r\n\r\n", fast=cut(400)),
    odd("a header without a name", GET[:-2] + b": b\r\n\r\n", fast=cut(400)),
    odd("a space before the first header", b"GET /livez HTTP/1.1\r\n Host: x\r\n\r\n", fast=cut(400)),
    odd("no host", b"GET /livez HTTP/1.1\r\n\r\n", fast=cut(400)),
    odd("two hosts", b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", fast=cut(400)),
    odd("a space in the target", b"GET /li vez HTTP/1.1\r\n" + H + b"\r\n", fast=cut(400)),
    odd("a target that is not ASCII", b"GET /\xc3\xa9 HTTP/1.1\r\n" + H + b"\r\n", fast=cut(400)),
    odd("HTTP/0.9", b"GET /livez\r\n\r\n", fast=cut(400)),
    odd("HTTP/1.2", b"GET /livez HTTP/1.2\r\n" + H + b"\r\n", fast=cut(400), hypercorn=ok(200)),
    odd("HTTP/3", b"GET /livez HTTP/3.0\r\n" + H + b"\r\n", fast=cut(400), hypercorn=ok(200)),
    odd("TLS", bytes.fromhex("1603010200010001fc0303") + b"\r\n\r\n" * 20, fast=cut(400)),
    odd("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", fast=cut(400)),
]


@pytest.mark.parametrize("case", ODDITIES, ids=lambda case: case.name)
async def test_what_comes_of_it(case: Odd, client: Client, standing: Standing) -> None:
    verdict = case.verdict if standing.fast or case.hypercorn is None else case.hypercorn
    if verdict is UNTOLD:
        pytest.skip("hypercorn leaves it open")
    for piece in case.pieces:
        await client.send(piece)
    answers = [await client.receive() for _ in verdict.statuses]

    assert tuple(answer.status if answer else None for answer in answers) == verdict.statuses
    assert await client.is_open() == verdict.open
