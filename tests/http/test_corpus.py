"""A corpus of malformed and odd requests, each with the answer it must get. A new surprise becomes a new row."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from .asgi_driver import Answer, Standing

LONG = "x" * 256
UUID_TEXT = "0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d"
DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_UNCLOSED = b"[" * 100_000


class Case(NamedTuple):
    """``error``: the exact sentence, or its beginning when it ends in "…"; None: the body is not looked at."""

    name: str
    method: str
    target: str
    body: Any
    status: int
    error: str | None


def post(name: str, target: str, body: Any, error: str | None, status: int = 400) -> Case:
    return Case(name, "POST", target, body, status, error)


def push(name: str, item: Any, error: str | None, status: int = 400) -> Case:
    return post(name, "/api/v1/push", {"items": [{"queue": "corpus", "payload": 1}, item]}, error, status)


def raw_push(name: str, payload: bytes, error: str | None, status: int = 400) -> Case:
    return post(name, "/api/v1/push", b'{"items":[{"queue":"corpus","payload":' + payload + b"}]}", error, status)


def configure(name: str, options: Any, error: str | None, status: int = 400) -> Case:
    return post(name, "/api/v1/configure", {"queue": "corpus", "options": options}, error, status)


def ack(name: str, body: Any, error: str | None, status: int = 400) -> Case:
    return post(name, "/api/v1/ack", body, error, status)


def acks(name: str, items: Any, error: str | None, status: int = 400) -> Case:
    return post(name, "/api/v1/ack/batch", {"acknowledgments": items}, error, status)


def transaction(name: str, operations: Any, error: str | None, status: int = 400, **others: Any) -> Case:
    return post(name, "/api/v1/transaction", {"operations": operations, **others}, error, status)


def extend(name: str, body: Any, error: str | None) -> Case:
    return post(name, f"/api/v1/lease/{UUID_TEXT}/extend", body, error)


def pop(name: str, target: str, status: int, error: str | None = None) -> Case:
    return Case(name, "GET", f"/api/v1/pop{target}", b"", status, error)


BODIES = [
    ("/api/v1/configure", "configure"),
    ("/api/v1/push", "push"),
    ("/api/v1/ack", "ack"),
    ("/api/v1/ack/batch", "ack batch"),
    ("/api/v1/transaction", "transaction"),
]

ANY_BODY = [
    case
    for target, name in BODIES
    for case in (
        post(f"{name}: no body", target, b"", "Empty request body"),
        post(f"{name}: spaces", target, b"  \n", "Invalid JSON: …"),
        post(f"{name}: words", target, b"hello", "Invalid JSON: …"),
        post(f"{name}: cut off", target, b'{"queue":"x","items":[{"queue":"x"', "Invalid JSON: …"),
        post(f"{name}: something behind it", target, b'{"queue":"x"} x', "Invalid JSON: …"),
        post(f"{name}: single quotes", target, b"{'queue':'x'}", "Invalid JSON: …"),
        post(f"{name}: a trailing comma", target, b'{"queue":"x",}', "Invalid JSON: …"),
        post(f"{name}: a byte order mark", target, b'\xef\xbb\xbf{"queue":"x"}', "Invalid JSON: …"),
        post(f"{name}: UTF-16", target, '{"queue":"x"}'.encode("utf-16"), "Invalid JSON: …"),
        post(f"{name}: Latin-1", target, '{"queue":"é"}'.encode("latin-1"), "Invalid JSON: the body is not UTF-8…"),
        post(f"{name}: bad UTF-8 inside", target, b'{"zz":"\xff"}', "Invalid JSON: the body is not UTF-8…"),
        post(f"{name}: an encoded surrogate", target, b'{"zz":"\xed\xa0\x80"}', "Invalid JSON: the body is not UTF-8…"),
        post(f"{name}: UTF-8 cut off", target, b'{"zz":"\xf0\x9f\x98"}', "Invalid JSON: the body is not UTF-8…"),
        post(f"{name}: overlong UTF-8", target, b'{"zz":"\xc0\x80"}', "Invalid JSON: the body is not UTF-8…"),
        post(f"{name}: deep nesting", target, DEEP, "Request body must be a JSON object"),
        post(f"{name}: deep nesting inside", target, b'{"zz":' + DEEP + b"}", "Invalid JSON: …"),
        post(f"{name}: deep nesting, cut off", target, b'{"zz":' + DEEP_UNCLOSED, "Invalid JSON: …"),
        post(f"{name}: a binary push", target, b"QPB1\x00\x01\x00\x00\x00", "Invalid JSON: …"),
        post(f"{name}: an array", target, [], "Request body must be a JSON object"),
        post(f"{name}: an array of what was meant", target, [{"queue": "x"}], "Request body must be a JSON object"),
        post(f"{name}: null", target, b"null", "Request body must be a JSON object"),
        post(f"{name}: a string", target, b'"{}"', "Request body must be a JSON object"),
        post(f"{name}: a number", target, b"1", "Request body must be a JSON object"),
    )
]

PUSH = [
    post("push: nothing in it", "/api/v1/push", {}, "items array is required"),
    post("push: items null", "/api/v1/push", {"items": None}, "items array is required"),
    post("push: items an object", "/api/v1/push", {"items": {"queue": "x"}}, "items array is required"),
    post("push: items a string", "/api/v1/push", {"items": "[]"}, "items array is required"),
    post("push: items misspelt", "/api/v1/push", {"Items": []}, "items array is required"),
    post("push: the last of two items wins", "/api/v1/push", b'{"items":[],"items":7}', "items array is required"),
    post("push: no items", "/api/v1/push", {"items": []}, None, 201),
    post(
        "push: buffer settings are ignored", "/api/v1/push", {"items": [], "bufferMs": "x", "bufferMax": []}, None, 201
    ),
    push("push: an item that is a string", "x", "Each item must be a JSON object"),
    push("push: an item that is null", None, "Each item must be a JSON object"),
    push("push: an item that is an array", [], "Each item must be a JSON object"),
    push("push: no queue", {"payload": 1}, "Queue must be a string"),
    push("push: queue null", {"queue": None}, "Queue must be a string"),
    push("push: queue a number", {"queue": 7}, "Queue must be a string"),
    push("push: queue an object", {"queue": {}}, "Queue must be a string"),
    push("push: queue misspelt", {"Queue": "x"}, "Queue must be a string"),
    push("push: partition a number", {"queue": "x", "partition": 0}, "Partition must be a string"),
    push("push: partition false", {"queue": "x", "partition": False}, "Partition must be a string"),
    push("push: transactionId a number", {"queue": "x", "transactionId": 12}, "TransactionId must be a string"),
    push("push: transactionId an array", {"queue": "x", "transactionId": []}, "TransactionId must be a string"),
    push("push: traceId a number", {"queue": "x", "traceId": 1}, "TraceId must be a string"),
    push("push: traceId no uuid", {"queue": "x", "traceId": "trace-1"}, "TraceId must be a UUID"),
    push("push: traceId with a NUL", {"queue": "x", "traceId": "\0"}, "TraceId must be a UUID"),
    push("push: a queue too long", {"queue": LONG}, "queue must be at most 255 characters long, not 256"),
    push("push: a partition too long", {"queue": "x", "partition": LONG}, "partition must be at most 255 characters …"),
    push("push: NUL in a queue", {"queue": "a\0b"}, "queue must not contain the NUL character"),
    push("push: NUL in a partition", {"queue": "x", "partition": "\0"}, "partition must not contain the NUL character"),
    push("push: unknown fields are ignored", {"queue": "corpus", "zz": {"a": [1]}, "producerSub": 7}, None, 201),
    push("push: NUL in a transaction id is a character", {"queue": "corpus", "transactionId": "a\0b"}, None, 201),
    push("push: a long transaction id", {"queue": "corpus", "transactionId": "t" * 100_000}, None, 201),
    push("push: an unusual transaction id", {"queue": "corpus", "transactionId": '"\\/\n\u2028é😀'}, None, 201),
    push("push: traceId in braces", {"queue": "corpus", "traceId": "{" + UUID_TEXT.upper() + "}"}, None, 201),
    raw_push("payload: NaN", b"NaN", "Invalid JSON: …"),
    raw_push("payload: Infinity", b"-Infinity", "Invalid JSON: …"),
    raw_push("payload: a leading zero", b"01", "Invalid JSON: …"),
    raw_push("payload: a plus sign", b"+1", "Invalid JSON: …"),
    raw_push("payload: a bare point", b"1.", "Invalid JSON: …"),
    raw_push("payload: no digits before the point", b".5", "Invalid JSON: …"),
    raw_push("payload: an empty exponent", b"1e", "Invalid JSON: …"),
    raw_push("payload: hexadecimal", b"0x10", "Invalid JSON: …"),
    raw_push("payload: undefined", b"undefined", "Invalid JSON: …"),
    raw_push("payload: nothing", b"", "Invalid JSON: …"),
    raw_push("payload: a comment", b"1/* one */", "Invalid JSON: …"),
    raw_push("payload: a trailing comma", b"[1,]", "Invalid JSON: …"),
    raw_push("payload: an unquoted key", b"{a:1}", "Invalid JSON: …"),
    raw_push("payload: an unknown escape", b'"\\x41"', "Invalid JSON: …"),
    raw_push("payload: a bad unicode escape", b'"\\u00zz"', "Invalid JSON: …"),
    raw_push("payload: a lone surrogate", b'"\\ud800"', "Invalid JSON: half of a UTF-16 surrogate pair in a string"),
    raw_push("payload: a raw newline in a string", b'"a\nb"', "Invalid JSON: …"),
    raw_push("payload: a raw tab in a string", b'"a\tb"', "Invalid JSON: …"),
    raw_push("payload: a raw NUL in a string", b'"a\x00b"', "Invalid JSON: …"),
    raw_push("payload: a raw NUL between tokens", b"\x001", "Invalid JSON: …"),
    raw_push("payload: a vertical tab between tokens", b"\x0b1", "Invalid JSON: …"),
    raw_push("payload: a no-break space between tokens", "\u00a01".encode(), "Invalid JSON: …"),
    raw_push("payload: an unterminated string", b'"abc', "Invalid JSON: …"),
    raw_push("payload: bad UTF-8", b'"\xff"', "Invalid JSON: the body is not UTF-8…"),
    raw_push("payload: deep nesting", DEEP, "Invalid JSON: …"),
    raw_push("payload: moderate nesting", b"[" * 500 + b"]" * 500, None, 201),
    raw_push("payload: an integer of 5,000 digits", b"7" * 5000, None, 201),
    raw_push("payload: a surrogate pair", b'"\\ud83d\\ude00"', None, 201),
    raw_push("payload: DEL in a string", b'"\x7f"', None, 201),
    raw_push("payload: duplicate keys", b'{"a":1,"a":2}', None, 201),
    post(
        "payload: the last of two payloads wins",
        "/api/v1/push",
        b'{"items":[{"queue":"corpus","payload":1,"payload":{"b":2}}]}',
        None,
        201,
    ),
    post(
        "push: a megabyte in one payload",
        "/api/v1/push",
        {"items": [{"queue": "corpus", "payload": "é" * 600_000}]},
        None,
        201,
    ),
]

CONFIGURE = [
    post("configure: nothing in it", "/api/v1/configure", {}, "queue is required"),
    post("configure: queue null", "/api/v1/configure", {"queue": None}, "queue is required"),
    post("configure: queue a number", "/api/v1/configure", {"queue": 1}, "queue is required"),
    post("configure: a queue too long", "/api/v1/configure", {"queue": LONG}, "queue must be at most 255 characters …"),
    post("configure: NUL", "/api/v1/configure", {"queue": "\0"}, "queue must not contain the NUL character"),
    post("configure: a namespace too long", "/api/v1/configure", {"queue": "x", "namespace": LONG}, "namespace …"),
    post("configure: NUL in the task", "/api/v1/configure", {"queue": "x", "task": "\0"}, "task must not contain …"),
    post("configure: odd labels", "/api/v1/configure", {"queue": "corpus", "namespace": 7, "task": []}, None, 200),
    configure("configure: options a string", "leaseTime=5", "options must be an object"),
    configure("configure: options an array", [], "options must be an object"),
    configure("configure: options null", None, None, 200),
    configure("configure: unknown options", {"leasetime": "x", "lease_time": {}, "zz": None}, None, 200),
    configure("configure: option null", {"leaseTime": None}, None, 200),
    configure("configure: leaseTime text", {"leaseTime": "30"}, "option leaseTime must be an integer from 0 …"),
    configure("configure: leaseTime true", {"leaseTime": True}, "option leaseTime must be an integer …"),
    configure("configure: leaseTime a fraction", {"leaseTime": 1.5}, "option leaseTime must be an integer …"),
    configure("configure: leaseTime negative", {"leaseTime": -1}, "option leaseTime must be an integer …"),
    configure("configure: leaseTime 2**31", {"leaseTime": 2**31}, "option leaseTime must be an integer …"),
    configure("configure: leaseTime 10**400", {"leaseTime": 10**400}, "option leaseTime must be an integer …"),
    configure("configure: leaseTime an object", {"leaseTime": {}}, "option leaseTime must be an integer …"),
    configure("configure: retryLimit negative", {"retryLimit": -1}, "option retryLimit must be an integer …"),
    configure("configure: priority below 32 bits", {"priority": -(2**31) - 1}, "option priority must be an integer …"),
    configure("configure: retentionEnabled 1", {"retentionEnabled": 1}, "option retentionEnabled must be true …"),
    configure("configure: encryption text", {"encryptionEnabled": "true"}, "option encryptionEnabled must be true …"),
    configure("configure: the largest", {"leaseTime": 2**31 - 1, "priority": -(2**31)}, None, 200),
    post(
        "configure: an option of 5,000 digits",
        "/api/v1/configure",
        b'{"queue":"corpus","options":{"ttl":' + b"9" * 5000 + b"}}",
        "option ttl must be an integer from 0 to 2147483647",
    ),
]

GOOD_ACK = {"transactionId": "x", "partitionId": UUID_TEXT}
ACK = [
    ack("ack: nothing in it", {}, "transactionId is required"),
    ack("ack: transactionId null", {**GOOD_ACK, "transactionId": None}, "transactionId is required"),
    ack("ack: transactionId a number", {**GOOD_ACK, "transactionId": 5}, "transactionId is required"),
    ack("ack: transactionId empty", {**GOOD_ACK, "transactionId": ""}, "transactionId is required"),
    ack("ack: no partitionId", {"transactionId": "x"}, "partitionId is required to ensure message uniqueness"),
    ack("ack: partitionId null", {**GOOD_ACK, "partitionId": None}, "partitionId is required to ensure …"),
    ack("ack: partitionId a number", {**GOOD_ACK, "partitionId": 5}, "partitionId is required to ensure …"),
    ack("ack: partitionId empty", {**GOOD_ACK, "partitionId": ""}, "partitionId is required to ensure …"),
    ack("ack: neither, the first counts", {"status": "failed"}, "transactionId is required"),
    ack("ack: leaseId a number", {**GOOD_ACK, "leaseId": 5}, "leaseId must be a string"),
    ack("ack: error an object", {**GOOD_ACK, "error": {}}, "error must be a string"),
    ack("ack: consumerGroup a number", {**GOOD_ACK, "consumerGroup": 1}, "consumerGroup must be a string"),
    ack("ack: consumerGroup too long", {**GOOD_ACK, "consumerGroup": LONG}, "consumerGroup must be at most 255 …"),
    ack("ack: NUL in the group", {**GOOD_ACK, "consumerGroup": "\0"}, "consumerGroup must not contain …"),
    ack("ack: nulls and no lease", {**GOOD_ACK, "leaseId": "", "error": None, "consumerGroup": None}, None, 200),
    ack("ack: status a number", {**GOOD_ACK, "status": 1}, None, 200),
    ack("ack: status unknown", {**GOOD_ACK, "status": "done"}, None, 200),
    post("acks: nothing in it", "/api/v1/ack/batch", {}, "acknowledgments array is required"),
    post("acks: the list itself", "/api/v1/ack/batch", [GOOD_ACK], "Request body must be a JSON object"),
    acks("acks: null", None, "acknowledgments array is required"),
    acks("acks: an object", GOOD_ACK, "acknowledgments array is required"),
    acks("acks: a string", "x", "acknowledgments array is required"),
    acks("acks: none", [], None, 200),
    acks("acks: an element null", [GOOD_ACK, None], "Each acknowledgment must be an object"),
    acks("acks: an element a string", ["x"], "Each acknowledgment must be an object"),
    acks("acks: no transactionId", [GOOD_ACK, {}], "Each acknowledgment must have a valid transactionId string"),
    acks(
        "acks: transactionId a number",
        [{**GOOD_ACK, "transactionId": 1}],
        "Each acknowledgment must have a valid transactionId string",
    ),
    acks(
        "acks: transactionId empty",
        [{**GOOD_ACK, "transactionId": ""}],
        "Each acknowledgment must have a valid transactionId string",
    ),
    acks(
        "acks: no partitionId",
        [{"transactionId": "x"}],
        "Each acknowledgment must have a valid partitionId string to ensure message uniqueness",
    ),
    acks(
        "acks: partitionId a number",
        [GOOD_ACK, {**GOOD_ACK, "partitionId": 1}],
        "Each acknowledgment must have a valid partitionId string to ensure message uniqueness",
    ),
    acks("acks: leaseId an array", [{**GOOD_ACK, "leaseId": []}], "leaseId must be a string"),
    acks("acks: mixed statuses", [{**GOOD_ACK, "status": 7}, {**GOOD_ACK, "status": None}, GOOD_ACK], None, 200),
    post(
        "acks: consumerGroup a number",
        "/api/v1/ack/batch",
        {"acknowledgments": [GOOD_ACK], "consumerGroup": 7},
        "consumerGroup must be a string",
    ),
    post(
        "acks: NUL in the group",
        "/api/v1/ack/batch",
        {"acknowledgments": [GOOD_ACK], "consumerGroup": "a\0"},
        "consumerGroup must not contain the NUL character",
    ),
]

GOOD_PUSH = {"type": "push", "items": [{"queue": "corpus", "payload": 1}]}
NO_ROUTE = "no_such_route"
TRANSACTION = [
    post("transaction: nothing in it", "/api/v1/transaction", {}, "operations array required"),
    transaction("transaction: operations null", None, "operations array required"),
    transaction("transaction: operations an object", GOOD_PUSH, "operations array required"),
    transaction("transaction: no operations", [], "operations array cannot be empty"),
    transaction("transaction: an operation null", [None], "Each operation must be a JSON object"),
    transaction("transaction: no type", [{}], "Each operation must have a type string"),
    transaction("transaction: type a number", [{"type": 1}], "Each operation must have a type string"),
    transaction("transaction: push without a queue", [{"type": "push", "items": [{}]}], "Queue must be a string"),
    transaction("transaction: push of nothing", [{"type": "push"}], "Queue must be a string"),
    transaction("transaction: items null", [{"type": "push", "items": None}], "items array is required"),
    transaction("transaction: items a number", [{"type": "push", "items": 7}], "items array is required"),
    transaction("transaction: an item null", [{"type": "push", "items": [None]}], "Each item must be a JSON object"),
    transaction(
        "transaction: partition a number",
        [{"type": "push", "items": [{"queue": "x", "partition": 1}]}],
        "Partition must be a string",
    ),
    transaction(
        "transaction: inline with a bad trace id",
        [{"type": "push", "queue": "x", "traceId": "?"}],
        "TraceId must be a UUID",
    ),
    transaction("transaction: inline queue too long", [{"type": "push", "queue": LONG}], "queue must be at most 255 …"),
    transaction("transaction: ack of nothing", [{"type": "ack"}], "transactionId is required"),
    transaction(
        "transaction: ack without a partition",
        [GOOD_PUSH, {"type": "ack", "transactionId": "x"}],
        "partitionId is required to ensure message uniqueness",
    ),
    transaction("transaction: leases a string", [GOOD_PUSH], "requiredLeases must be …", requiredLeases="x"),
    transaction("transaction: leases of numbers", [GOOD_PUSH], "requiredLeases must be …", requiredLeases=[1]),
    transaction("transaction: kv is not served", [GOOD_PUSH], NO_ROUTE, 404, kv=[{"op": "get", "ns": "n", "key": "k"}]),
    transaction("transaction: timers are not served", [], NO_ROUTE, 404, timers=[{"op": "cancel"}]),
    transaction("transaction: empty riders are none", [], "operations array cannot be empty", kv=[], timers=None),
]

LEASE = [
    extend("extend: an array", [], "Request body must be a JSON object"),
    extend("extend: words", b"60", "Request body must be a JSON object"),
    extend("extend: cut off", b"{", "Invalid JSON: …"),
    extend("extend: text", {"seconds": "60"}, "seconds must be an integer from 1 …"),
    extend("extend: zero", {"seconds": 0}, "seconds must be an integer from 1 …"),
    post(
        "extend: negative", f"/api/v1/lease/{UUID_TEXT}/extend", {"seconds": -5}, "seconds must be an integer from 1 …"
    ),
    post(
        "extend: huge", f"/api/v1/lease/{UUID_TEXT}/extend", {"seconds": 10**30}, "seconds must be an integer from 1 …"
    ),
    extend("extend: a fraction", {"seconds": 1.5}, "seconds must be an integer …"),
    post("extend: bad UTF-8 in the path", "/api/v1/lease/%FF/extend", b"", "lease_id in the path must be …"),
]

POP = [
    pop("pop: no label", "", 400, "namespace or task is required"),
    pop("pop: empty labels", "?namespace=&task=", 400, "namespace or task is required"),
    pop("pop: labels by another name", "?Namespace=x", 400, "namespace or task is required"),
    pop("pop: an unknown label", "?task=nobody", 204),
    pop("pop: a queue too long", f"/queue/{LONG}", 400, "queue must be at most 255 …"),
    pop("pop: NUL in the queue", "/queue/a%00", 400, "queue must not contain …"),
    pop("pop: NUL in the partition", "/queue/a/partition/%00", 400, "partition must not …"),
    Case(
        "pop: a group too long", "GET", f"/api/v1/pop/queue/a?consumerGroup={LONG}", b"", 400, "consumerGroup must be …"
    ),
    pop("pop: NUL in the group", "/queue/a?consumerGroup=%00", 400, "consumerGroup must not …"),
    pop("pop: NUL in the namespace", "?namespace=%00", 400, "namespace must not contain …"),
    pop("pop: bad UTF-8 in the queue", "/queue/%FF", 400, "queue in the path must be …"),
    pop("pop: bad UTF-8 in the query", "/queue/a?consumerGroup=%ff", 400, "the query string …"),
    Case("pop: a body is ignored", "GET", "/api/v1/pop/queue/nowhere", b"{", 204, None),
    Case(
        "pop: odd parameters",
        "GET",
        "/api/v1/pop/queue/nowhere?batch=&wait=yes&timeout=x&partitions=-1&&=&zz",
        b"",
        204,
        None,
    ),
    pop("pop: no wait without wait", "/queue/nowhere?timeout=60000", 204),
    pop("pop: a wait of nothing", "/queue/nowhere?wait=true&timeout=0", 204),
    pop("pop: a negative wait", "/queue/nowhere?wait=1&timeout=-5", 204),
    Case(
        "pop: start at no time",
        "GET",
        "/api/v1/pop/queue/nowhere?consumerGroup=g&subscriptionFrom=soon",
        b"",
        204,
        None,
    ),
    pop("pop: a raw slash in a name", "/queue/a/b", 404, NO_ROUTE),
    pop("pop: a slash behind the name", "/queue/a/", 404, NO_ROUTE),
    pop("pop: no queue segment", "/queue", 404, NO_ROUTE),
    Case("pop: by POST", "POST", "/api/v1/pop/queue/a", b"{}", 405, "this route answers GET"),
    Case(
        "pop: by HEAD",
        "HEAD",
        "/api/v1/pop/queue/corpus",
        b"",
        405,
        None,
    ),
]

ROUTES = [
    Case("routes: the root", "GET", "/", b"", 404, "Not Found"),
    Case("routes: nowhere", "GET", "/nope", b"", 404, "Not Found"),
    Case("routes: a prefix without its slash", "GET", "/api/v1", b"", 404, "Not Found"),
    Case("routes: unknown below the prefix", "POST", "/api/v1/kv", {"operations": []}, 404, NO_ROUTE),
    Case("routes: another version", "POST", "/api/v2/push", {"items": []}, 404, "Not Found"),
    Case("routes: another case", "POST", "/API/V1/push", {"items": []}, 404, "Not Found"),
    Case("routes: a slash behind", "POST", "/api/v1/push/", {"items": []}, 404, NO_ROUTE),
    Case("routes: a doubled slash", "POST", "/api//v1/push", {"items": []}, 404, "Not Found"),
    Case("routes: an encoded slash", "POST", "/api%2Fv1%2Fpush", {"items": []}, 404, "Not Found"),
    Case("routes: an encoded letter is another path", "POST", "/api/v1/%70ush", {"items": []}, 404, NO_ROUTE),
    Case("routes: dots are not resolved", "POST", "/api/v1/x/../push", {"items": []}, 404, NO_ROUTE),
    Case("routes: push by GET", "GET", "/api/v1/push", b"", 405, "this route answers POST"),
    Case("routes: push by PUT", "PUT", "/api/v1/push", {"items": []}, 405, "this route answers POST"),
    Case("routes: health by POST", "POST", "/health", b"", 405, "this route answers GET, HEAD"),
    Case("routes: a made-up method", "BREW", "/api/v1/push", b"", 405, "this route answers POST"),
    Case("routes: delete a name too long", "DELETE", f"/api/v1/resources/queues/{LONG}", b"", 400, "queue must be …"),
    Case("routes: filter by NUL", "GET", "/api/v1/status/queues?task=a%00b", b"", 400, "task must not contain …"),
    Case("routes: no host at all", "GET", "http://[::1/livez", b"", 200, None),
    Case("routes: delete NUL", "DELETE", "/api/v1/resources/queues/%00", b"", 400, "queue must not contain …"),
]

CORPUS = [*ANY_BODY, *PUSH, *CONFIGURE, *ACK, *TRANSACTION, *LEASE, *POP, *ROUTES]


def check_headers(answer: Answer) -> None:
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-methods"] == "GET, POST, PUT, DELETE, OPTIONS"
    assert answer.headers["access-control-allow-headers"] == "Content-Type, Authorization"
    assert answer.headers["access-control-max-age"] == "86400"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_a_request_gets_the_answer_it_must(standing: Standing, case: Case) -> None:
    answer = standing.request(case.method, case.target, case.body)

    assert answer.status == case.status, answer.body
    check_headers(answer)
    if answer.status != 204:
        assert answer.headers["content-type"] == "application/json"
    if case.method == "HEAD":
        assert answer.body == b""
    if case.error is not None:
        beginning, ellipsis, _ = case.error.partition("…")
        assert answer.error.startswith(beginning) if ellipsis else answer.error == case.error
        check_problem(answer)


def check_problem(answer: Answer) -> None:
    problem = answer.json
    if answer.status == 404:
        assert problem in ({"error": "Not Found"}, {"error": "no_such_route", "code": "no_such_route"})
        return
    assert problem["status"] == answer.status
    assert problem["detail"] == problem["error"]
    assert problem["code"] == {400: "invalid_request", 405: "method_not_allowed"}[answer.status]
    assert problem["instance"].endswith(answer.headers["x-request-id"])
    assert "Traceback" not in json.dumps(problem)


def test_the_names_of_the_corpus_are_unique() -> None:
    names = [case.name for case in CORPUS]

    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("target", ["/api/v1/push", "/api/v1/pop/queue/a", "/nowhere", "/", "*", "/health"])
def test_options_is_answered_on_any_path(standing: Standing, target: str) -> None:
    answer = standing.request("OPTIONS", target)

    assert (answer.status, answer.body) == (204, b"")
    check_headers(answer)


@pytest.mark.parametrize("target", ["/health", "/livez", "/readyz"])
def test_probes_answer_head(standing: Standing, target: str) -> None:
    assert standing.request("HEAD", target).status == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_the_content_type_of_a_request_does_not_matter(standing: Standing, content_type: str) -> None:
    answer = standing.request("POST", "/api/v1/push", {"items": []}, {"Content-Type": content_type})

    assert answer.status == 201


@pytest.mark.parametrize(
    ("given", "kept"),
    [("req-1:a.b_C", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("<script>", False), ("", False)],
)
def test_a_request_id_is_taken_over_if_it_is_harmless(standing: Standing, given: str, kept: bool) -> None:
    answer = standing.request("GET", "/nowhere", headers={"X-Request-Id": given})

    assert (answer.headers["x-request-id"] == given) is kept


@pytest.mark.parametrize("host", ["x" * 300, "..", "a b", "[::1", "é.example", ""])
def test_a_host_header_that_names_no_host_does_not_matter(standing: Standing, host: str) -> None:
    assert standing.request("GET", "/livez", headers={"Host": host}).status == 200
