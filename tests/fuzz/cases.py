"""Requests as no client of ours makes them, from a seed: targets, queries, headers, bodies and framing.

Every case is made of something that a server could take for good, with one or several things wrong. Nothing here knows
what the answer is: whatever it is, it must be an answer, and no failure of the server's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from queen.routes import ROUTES, Route

UUID: Final = "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"
QUEUES: Final = ("fuzz", "fuzz.shop.bill", "füzz", "", "fuzz/slash")
DEEP: Final = 100_000


class Case(NamedTuple):
    """``pieces``: what is sent, one after the other. ``whole``: a server can tell where the request ends, so that an
    answer must come; otherwise it may wait for more."""

    name: str
    pieces: list[bytes]
    whole: bool


def cases(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, the same for the same seed, however many are taken."""
    for number in range(count):
        yield Maker(random.Random(f"{seed}/{number}")).case(number)


NASTY_TEXTS: Final = (
    "",
    "\0",
    "a\0b",
    "\ufeff",
    "\u202e",
    "\uffff",
    "😀" * 64,
    "é" * 255,
    "x" * 256,
    "x" * 5000,
    "..",
    "../../etc/passwd",
    "'; DROP TABLE queen.segments; --",
    "%",
    "%00",
    "%s%n",
    "null",
    "true",
    "__QUEUE_MODE__",
    "Default",
    "\\",
    '"',
    "\n",
    "\r\nX-Injected: 1",
    UUID,
    UUID.upper(),
    "{" + UUID + "}",
    "2024-02-30T25:61:61Z",
    "9999-12-31T23:59:59.999999Z",
    "0001-01-01T00:00:00+23:59",
    "-9223372036854775809",
    "1e400",
    "NaN",
)

NASTY_SEGMENTS: Final = (
    b"%",
    b"%zz",
    b"%ff",
    b"%c3%28",
    b"%00",
    b"%2F",
    b"%252F",
    b"%ED%A0%80",
    b"%F4%90%80%80",
    b"+",
    b"..",
    b";a=b",
    b"\xff\xfe",
    b"\xc3\xa9",
    b"x" * 4000,
    b"*",
    b"{queue}",
)

NASTY_JSON: Final = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"-1e400",
    b"1e-400",
    b"-0",
    b"00",
    b"0x10",
    b"1.",
    b".5",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551616",
    b"2147483648",
    b"-2147483649",
    b"1.0",
    b"9" * 400,
    b"0." + b"3" * 400,
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\xc0\x80"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\u0000"',
    b'"\\x"',
    b'"\x01"',
    b'"\t"',
    b'"open',
    b"'single'",
    b"[1,]",
    b'{"a":1,}',
    b"{1:2}",
    b'{"a" 1}',
    b"[[[[",
    b"]",
    b"nul",
    b"True",
    b"/* */ 1",
    b"",
    b"\xef\xbb\xbf1",
    b"[null]",
    b"[{}]",
    b"{}",
    b"[]",
    b"null",
    b"true",
    b"false",
    b"0",
    b'""',
)

NASTY_HEADERS: Final = (
    b"X-Request-Id: " + b"a" * 500,
    b"X-Request-Id: \xff\xfe",
    b"Authorization: Bearer " + b"e" * 3000,
    b"Authorization: Bearer a.b.c",
    b"Authorization: Basic \xff",
    b"Content-Type: application/x-queen-push",
    b"Content-Type: text/plain; charset=utf-16",
    b"Content-Encoding: gzip",
    b"Accept: application/xml",
    b"Accept-Encoding: *;q=0",
    b"Expect: 100-continue",
    b"Expect: 200-ok",
    b"Range: bytes=0-1",
    b"If-None-Match: *",
    b"Connection: close, keep-alive",
    b"Connection: \x00",
    b"Cookie: session=" + b"A" * 4000,
    b"X-Forwarded-For: 127.0.0.1",
    b"X-HTTP-Method-Override: DELETE",
    b"Transfer-Encoding: identity",
    b"TE: trailers",
    b"Trailer: Content-Length",
    b"Max-Forwards: 0",
    b"Origin: null",
    b"Upgrade: h2c",
    b"Upgrade: websocket",
    b"HTTP2-Settings: AAMAAABkAAQAAP__",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b": no name",
    b"no colon",
    b" : space",
    b"X Y: space in the name",
    b"X\x00: NUL",
    b"X-NUL: a\x00b",
    b"X-CR: a\rb",
    b"X-Tab:\ta\t",
    b"Content-Length: 0x10",
    b"Content-Length: +5",
    b"Content-Length: -1",
    b"Content-Length: 5, 5",
    b"Content-Length: " + b"9" * 40,
    b"Host: two",
    b"Host:",
    b"Host: a b",
    b"\xc3\xa9: latin",
)

METHODS: Final = (
    "GET",
    "POST",
    "DELETE",
    "PUT",
    "PATCH",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "get",
    "BREW",
    "G\x00T",
)


def bodies() -> dict[str, Any]:
    """A good body for each route that reads one."""
    item = {"queue": "fuzz", "partition": "p", "payload": {"a": [1, 2]}, "transactionId": "t", "traceId": UUID}
    ack = {"transactionId": "t", "partitionId": UUID, "status": "completed", "leaseId": UUID, "error": "x"}
    return {
        "/api/v1/configure": {"queue": "fuzz", "namespace": "n", "task": "t", "options": {"leaseTime": 5, "ttl": 60}},
        "/api/v1/push": {"items": [item, {"queue": "fuzz", "payload": "x"}]},
        "/api/v1/ack": {**ack, "consumerGroup": "g"},
        "/api/v1/ack/batch": {"acknowledgments": [ack, ack], "consumerGroup": "g"},
        "/api/v1/transaction": {
            "operations": [{"type": "push", "items": [item]}, {"type": "ack", **ack}],
            "requiredLeases": [UUID],
        },
        "/api/v1/lease/<lease_id>/extend": {"seconds": 5},
        "/api/v1/dlq/redrive": {"queue": "fuzz", "from": "2024-01-01T00:00:00Z", "limit": 5, "dryRun": True},
        "/api/v1/traces": {"transactionId": "t", "partitionId": UUID, "data": {"a": 1}, "traceNames": ["n"]},
        "/api/v1/consumer-groups/<group>/subscription": {"subscriptionTimestamp": "2024-01-01T00:00:00Z"},
        "/api/v1/consumer-groups/<group>/queues/<queue>/seek": {"timestamp": "2024-01-01T00:00:00Z", "offset": 3},
        "/api/v1/consumer-groups/<group>/queues/<queue>/partitions/<partition>/seek": {"toEnd": True},
        "/streams/v1/queries": {"name": "s", "source_queue": "fuzz", "config_hash": "h", "sink_queue": "out"},
        "/streams/v1/cycle": {
            "query_id": UUID,
            "partition_id": UUID,
            "state_ops": [{"type": "upsert", "key": "k", "value": {"windowEnd": 5}}, {"type": "delete", "key": "k"}],
            "push_items": [item],
            "ack": {"transactionId": "t", "leaseId": UUID, "count": 1, "status": "completed"},
            "release_lease": True,
        },
        "/streams/v1/state/get": {"query_id": UUID, "partition_id": UUID, "keys": ["k"], "ripe_at_or_before": 1e12},
        "/api/v1/system/maintenance": {"enabled": False},
        "/api/v1/system/maintenance/pop": {"enabled": False},
    }


BODIES: Final = bodies()

QUERY_NAMES: Final = (
    *("batch", "wait", "timeout", "consumerGroup", "autoAck", "subscriptionMode", "subscriptionFrom", "partitions"),
    *("namespace", "task", "queue", "partition", "limit", "offset", "from", "to", "status", "interval", "minDepth"),
    *("minLagSeconds", "deleteMetadata", "group", "messageId", "dryRun", "error", "conflation", "frames", "", "a[]"),
)


class Maker:
    """Makes one case of one source of chance."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def case(self, number: int) -> Case:
        kinds: list[tuple[int, Callable[[], Case]]] = [
            (30, self.broken_body),
            (20, self.broken_target),
            (14, self.broken_query),
            (14, self.broken_headers),
            (14, self.broken_framing),
            (6, self.noise),
            (2, self.pipeline),
        ]
        if number % 500 == 7:  # megabytes each: enough to be found out, not so many as to be all there is
            return self.huge_body()
        make = self._chance.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])[0]
        return make()

    # -- parts ----------------------------------------------------------------------------------------------------

    def route(self, *, with_body: bool = False) -> Route:
        routes = [route for route in ROUTES if (route.path in BODIES) == with_body or not with_body]
        return self._chance.choice(routes)

    def text(self) -> str:
        chance = self._chance
        if chance.random() < 0.6:
            return chance.choice(NASTY_TEXTS)
        points = (
            chance.choice((0x20, 0x61, 0xE9, 0x4E2D, 0x1F600, 0x0, 0xFFFD, 0x7F)) for _ in range(chance.randrange(12))
        )
        return "".join(map(chr, points))

    def segment(self) -> bytes:
        chance = self._chance
        roll = chance.random()
        if roll < 0.4:
            return chance.choice(NASTY_SEGMENTS)
        if roll < 0.7:
            return b"".join(b"%%%02x" % byte for byte in self.text().encode()[:2000])
        return chance.choice([*QUEUES, UUID, "t"]).encode().replace(b"/", b"%2F").replace(b"\xc3\xbc", b"%C3%BC")

    def target(self, route: Route, *, broken: bool = False) -> bytes:
        parts = []
        for part in route.path.split("/"):
            if not part.startswith("<"):
                parts.append(part.encode())
            elif broken:
                parts.append(self.segment())
            else:
                parts.append(UUID.encode() if part.endswith("_id>") else b"fuzz")
        return b"/".join(parts)

    def query(self) -> bytes:
        chance = self._chance
        pairs = []
        for _ in range(chance.choice((1, 1, 2, 3, 8, 60))):
            name = chance.choice(QUERY_NAMES).encode()
            roll = chance.random()
            if roll < 0.4:
                value = b"".join(b"%%%02X" % byte for byte in self.text().encode()[:600])
            elif roll < 0.7:
                value = chance.choice(NASTY_SEGMENTS)[:300]
            else:
                value = chance.choice(
                    (b"0", b"-1", b"1", b"true", b"9" * 5000, b"1e9", b"5", b"\xff", b"2024-01-01T00:00:00+02:00")
                )
            pairs.append(name + chance.choice((b"=", b"=", b"=", b"", b"==")) + value)
        return chance.choice((b"&", b"&", b"&&", b";")).join(pairs)

    def value(self, depth: int = 0) -> bytes:
        """Something that may stand where a JSON value stands."""
        chance = self._chance
        roll = chance.random()
        if roll < 0.55 or depth > 2:
            return chance.choice(NASTY_JSON)
        if roll < 0.75:
            return json.dumps(self.text(), ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
        if roll < 0.85:
            return b"[" + b",".join(self.value(depth + 1) for _ in range(chance.randrange(4))) + b"]"
        if roll < 0.95:
            inner = (b"%b:%b" % (json.dumps(self.text()).encode(), self.value(depth + 1)) for _ in range(2))
            return b"{" + b",".join(inner) + b"}"
        return chance.randbytes(chance.randrange(1, 20))

    def mutated(self, value: Any, rate: float) -> bytes:
        """A good value as JSON with some of it replaced, doubled, renamed or left out."""
        chance = self._chance
        if chance.random() < rate:
            return self.value()
        if isinstance(value, dict):
            members = []
            for name, inner in value.items():
                roll = chance.random()
                if roll < rate / 3:
                    continue
                key = json.dumps(name if roll > rate * 2 / 3 else self.text()).encode()
                members.append(key + b":" + self.mutated(inner, rate))
                if chance.random() < rate / 2:
                    members.append(key + b":" + self.value())
            return b"{" + b",".join(members) + b"}"
        if isinstance(value, list):
            elements = [self.mutated(inner, rate) for inner in value]
            if chance.random() < rate:
                elements = elements * chance.choice((0, 2, 30))
            return b"[" + b",".join(elements) + b"]"
        return json.dumps(value).encode()

    def head(self, method: str, target: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
        lines = [method.encode() + b" " + target + b" HTTP/" + version, b"Host: fuzz.test", *headers]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def cut(self, data: bytes) -> list[bytes]:
        """The same in several pieces, sometimes."""
        chance = self._chance
        if len(data) < 4 or chance.random() < 0.8:
            return [data]
        at = sorted(chance.randrange(1, len(data)) for _ in range(chance.randrange(1, 4)))
        return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True) if end > start]

    # -- cases ----------------------------------------------------------------------------------------------------

    def with_body(self, name: str, route: Route, body: bytes) -> Case:
        head = self.head(route.method, self.target(route), b"Content-Length: %d" % len(body))
        return Case(name, self.cut(head + body), whole=True)

    def broken_body(self) -> Case:
        chance = self._chance
        route = self.route(with_body=True)
        body = self.mutated(BODIES[route.path], chance.choice((0.02, 0.1, 0.3, 1.0)))
        roll = chance.random()
        if roll < 0.05:
            body = body[: chance.randrange(len(body) + 1)]
        elif roll < 0.08:
            body = body.decode("utf-8", "replace").encode(
                chance.choice(("utf-16", "utf-32", "utf-8-sig", "cp037")), "replace"
            )
        elif roll < 0.12 and body:
            at = chance.randrange(len(body))
            body = body[:at] + chance.randbytes(3) + body[at + 1 :]
        return self.with_body(f"body of {route.path}", route, body)

    def huge_body(self) -> Case:
        chance = self._chance
        route = self.route(with_body=True)
        body = json.dumps(BODIES[route.path]).encode()
        huge = chance.choice(
            (
                b"[" * DEEP + b"]" * DEEP,
                b"[" * DEEP,
                b'{"a":' * DEEP + b"1" + b"}" * DEEP,
                b"9" * 1_000_000,
                b"0." + b"9" * 1_000_000,
                b'"' + b"x" * 1_000_000 + b'"',
                b'"' + b"\\u0000" * 100_000 + b'"',
                b"[" + b"null," * 200_000 + b"null]",
                b"{" + b",".join(b'"k%d":%d' % (n % 7, n) for n in range(100_000)) + b"}",
            )
        )
        if chance.random() < 0.3:
            return self.with_body(f"huge body of {route.path}", route, huge)
        at = chance.choice([at for at, byte in enumerate(body) if byte == ord(":")]) + 1
        return self.with_body(f"huge member for {route.path}", route, body[:at] + huge + b',"z":' + body[at:])

    def broken_target(self) -> Case:
        chance = self._chance
        route = self.route()
        method = chance.choice(METHODS) if chance.random() < 0.3 else route.method
        target = self.target(route, broken=True)
        roll = chance.random()
        if roll < 0.1:
            target = chance.choice(
                (b"*", b"", b"/", b"//", b"http://", b"http://[::1", b"/\x00", b"/..;/", b"/#f", b"?", b"a")
            )
        elif roll < 0.2:
            target = b"http://fuzz.test" + target
        elif roll < 0.25:
            target = b"/" + target
        elif roll < 0.28:
            target += b"/" + b"a/" * chance.choice((10, 1000, 20000))
        return Case(f"target {method} {route.path}", [self.head(method, target, b"Content-Length: 0")], whole=False)

    def broken_query(self) -> Case:
        route = self._chance.choice([route for route in ROUTES if route.method != "POST"])
        target = self.target(route, broken=self._chance.random() < 0.2) + b"?" + self.query()
        return Case(f"query of {route.method} {route.path}", [self.head(route.method, target)], whole=False)

    def broken_headers(self) -> Case:
        chance = self._chance
        route = self.route()
        headers = [chance.choice(NASTY_HEADERS) for _ in range(chance.choice((1, 1, 2, 5)))]
        roll = chance.random()
        if roll < 0.1:
            headers += [b"X-%d: %d" % (n, n) for n in range(chance.choice((90, 101, 500, 3000)))]
        elif roll < 0.15:
            headers.append(b"X-Long: " + b"a" * chance.choice((8_000, 60_000, 70_000, 200_000)))
        elif roll < 0.2:
            headers.append(b"X-Folded: a\r\n b\r\n\tc")
        elif roll < 0.25:
            headers.append(chance.randbytes(60).replace(b"\n", b""))
        version = chance.choice((b"1.1", b"1.1", b"1.1", b"1.0", b"0.9", b"2.0", b"1.2", b"x"))
        return Case(
            "headers", self.cut(self.head(route.method, self.target(route), *headers, version=version)), whole=False
        )

    def broken_framing(self) -> Case:
        chance = self._chance
        route = self.route(with_body=True)
        body = json.dumps(BODIES[route.path]).encode()
        target = self.target(route)
        chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), self.extension(), part) for part in self.parts(body))
        ending = chance.choice((b"0\r\n\r\n", b"0\r\nX-T: 1\r\n\r\n", b"0;x=y\r\n\r\n", b"0000\r\n\r\n"))
        roll = chance.random()
        if roll < 0.35:
            head = self.head(route.method, target, b"Transfer-Encoding: chunked")
            return Case("chunked", self.cut(head + chunks + ending), whole=True)
        mess = chance.choice(
            (
                (b"Transfer-Encoding: chunked", chunks),
                (b"Transfer-Encoding: chunked", b"ffffffffffffffffff\r\n" + body),
                (b"Transfer-Encoding: chunked", b"-5\r\n" + body),
                (b"Transfer-Encoding: chunked", b"5\n" + body),
                (b"Transfer-Encoding: chunked", b"5;" + b"e" * 70_000 + b"\r\n"),
                (b"Transfer-Encoding: chunked", b"0\r\n" + b"T: t\r\n" * 3000 + b"\r\n"),
                (b"Transfer-Encoding: chunked, chunked", chunks + ending),
                (b"Transfer-Encoding: gzip, chunked", chunks + ending),
                (b"Transfer-Encoding: gzip", body),
                (b"Transfer-Encoding: xchunked", chunks + ending),
                (b"Transfer-Encoding:\tchunked", chunks + ending),
                (b"Transfer-Encoding: chunked\r\nContent-Length: 5", chunks + ending),
                (b"Content-Length: 5\r\nContent-Length: 6", body),
                (b"Content-Length: %d" % (len(body) + 10), body),
                (b"Content-Length: %d" % max(0, len(body) - 10), body),
                (b"Content-Length: 99999999999", body),
                (b"Expect: 100-continue\r\nContent-Length: %d" % len(body), b""),
                (b"X: y", body),
            )
        )
        return Case("framing", self.cut(self.head(route.method, target, mess[0]) + mess[1]), whole=False)

    def parts(self, body: bytes) -> list[bytes]:
        size = self._chance.choice((1, 7, 64, 4096))
        return [body[start : start + size] for start in range(0, len(body), size)]

    def extension(self) -> bytes:
        return self._chance.choice((b"", b"", b"", b";a", b';a="b"'))

    def noise(self) -> Case:
        chance = self._chance
        data = chance.choice(
            (
                chance.randbytes(chance.randrange(1, 2000)),
                b"\r\n" * chance.randrange(1, 500),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + chance.randbytes(60),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + chance.randbytes(90),
                b"GET / HTTP/1.1\n\nGET / HTTP/1.1\n\n",
                b"GET /health HTTP/1.1\rHost: x\r\r",
                b"\x00" * 500,
                b"GET " + b"/" * 100_000,
                b"EHLO fuzz\r\n",
            )
        )
        return Case("noise", self.cut(data), whole=False)

    def pipeline(self) -> Case:
        chance = self._chance
        made = [
            chance.choice((self.broken_body, self.broken_query, self.broken_headers))()
            for _ in range(chance.randrange(2, 6))
        ]
        return Case("pipeline", [b"".join(piece for case in made for piece in case.pieces)], whole=False)
