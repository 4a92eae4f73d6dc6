"""Reading and writing the wire by itself: what the routes above it cannot tell apart, or only slowly."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queen.config.settings import Settings
from queen.errors import InvalidRequest
from queen.model.message import (
    AckResult,
    AckStatus,
    ClaimedPartition,
    LeaseExtension,
    PopRequest,
    PushResult,
    SegmentSlice,
)
from queen.model.queue import StartFrom, StartMode
from queen.routes.call import parse_query
from queen.routes.paths import encoded_path
from queen.routes.wire.ack import read_ack, read_ack_batch, write_acks
from queen.routes.wire.body import format_time
from queen.routes.wire.pop import SPLICE_BYTES, read_pop, splice
from queen.routes.wire.push import read_push, write_push
from queen.routes.wire.queue import write_extension

PARTITION_ID = UUID("0f8bb6c2-4305-509f-bb8b-3d9fc63d7d5d")


def pop_of(query: str, **settings: Any) -> PopRequest:
    return read_pop({"queue": "q"}, parse_query(query.encode()), Settings(**settings))


@pytest.mark.parametrize(
    ("query", "timeout_seconds"),
    [
        ("", None),
        ("timeout=5000", None),
        ("wait=false&timeout=5000", None),
        ("wait=TRUE&timeout=5000", None),
        ("wait=true", 30.0),
        ("wait=1", 30.0),
        ("wait=true&timeout=1500", 1.5),
        ("wait=true&timeout=soon", 30.0),
        ("wait=true&timeout=0", None),
        ("wait=true&timeout=-1", None),
        ("wait=true&timeout=999999999999", 2147483.647),
        ("wait=true&timeout=99999999999999999999999", 30.0),
    ],
)
def test_a_pop_waits_only_when_asked_and_as_long_as_asked(query: str, timeout_seconds: float | None) -> None:
    assert pop_of(query).timeout_seconds == timeout_seconds


def test_the_longest_wait_may_be_capped_and_the_defaults_moved() -> None:
    capped = {"max_timeout_seconds": 60.0, "default_timeout_seconds": 90.0, "default_batch": 7}

    assert pop_of("wait=true", **capped).timeout_seconds == 60.0
    assert pop_of("wait=true&timeout=5000", **capped).timeout_seconds == 5.0
    assert pop_of("", **capped).batch == 7
    assert pop_of("autopilot=true", **capped).batch == 200


NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("query", "start"),
    [
        ("", StartFrom()),
        ("subscriptionMode=new", StartFrom(StartMode.NEW)),
        ("subscriptionMode=new-only", StartFrom(StartMode.NEW)),
        ("subscriptionMode=all", StartFrom()),
        ("subscriptionMode=from_beginning", StartFrom()),
        ("subscriptionMode=NEW", StartFrom()),
        ("subscriptionMode=2026-01-02T12:00:00Z", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=now", StartFrom(StartMode.NEW)),
        ("subscriptionFrom=now&subscriptionMode=all", StartFrom(StartMode.NEW)),
        ("subscriptionFrom=2026-01-02T12:00:00Z", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02T12:00:00.000Z&subscriptionMode=new", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02T12:00:00", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02T14:00:00%2B02:00", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02T14:00:00+02:00", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02T14:00:00.000000+0200", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02+12:00:00", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=20260102T120000Z", StartFrom(StartMode.FROM, NOON)),
        ("subscriptionFrom=2026-01-02", StartFrom(StartMode.FROM, NOON - timedelta(hours=12))),
        ("subscriptionFrom=soon", StartFrom()),
        ("subscriptionFrom=soon&subscriptionMode=new", StartFrom(StartMode.NEW)),
        ("subscriptionFrom=2026-13-45T12:00:00Z", StartFrom()),
        ("subscriptionFrom=9999-12-31T23:59:59-12:00", StartFrom()),
        ("subscriptionFrom=0001-01-01T00:00:00%2B12:00", StartFrom()),
        ("subscriptionFrom=", StartFrom()),
    ],
)
def test_where_a_new_group_starts(query: str, start: StartFrom) -> None:
    assert pop_of(query).start == start


def test_the_server_decides_where_a_new_group_starts_that_does_not_say() -> None:
    assert pop_of("", default_subscription_mode="new").start == StartFrom(StartMode.NEW)
    assert pop_of("subscriptionMode=all", default_subscription_mode="new").start == StartFrom()


def test_a_pop_of_one_partition_takes_one_partition() -> None:
    request = read_pop({"queue": "q", "partition": "p"}, {"partitions": "9"}, Settings())

    assert (request.partition, request.partitions) == ("p", 1)


@pytest.mark.parametrize(
    ("path", "raw_path", "root_path", "encoded"),
    [
        ("/a/b", b"/a/b", "", "/a/b"),
        ("/a/b", b"/a%2Fb", "", "/a%2Fb"),
        ("/a b", b"/a%20b", "", "/a%20b"),
        ("/a+b", b"/a+b", "", "/a+b"),
        ("/a%2Fb", b"/a%252Fb", "", "/a%252Fb"),
        ("/\ufffd", b"/%FF", "", "/%FF"),
        ("/a/b", None, "", "/a/b"),
        ("/a b%é", None, "", "/a%20b%25%C3%A9"),
        ("/root/a/b", b"/root/a%2Fb", "/root", "/a%2Fb"),
        ("/root/a/b", b"/root/a%2Fb", "/root/", "/a%2Fb"),
        ("/a/b", b"/root/a%2Fb", "/root", "/a%2Fb"),
        ("/the root/a/b", b"/the%20root/a%2Fb", "/the root", "/a%2Fb"),
        ("/root/a/b", None, "/root", "/a/b"),
        ("/root", b"/root", "/root", ""),
        ("/rooted/a", b"/rooted/a", "/root", "/rooted/a"),
        ("http://queen.test/a/b", b"http://queen.test/a%2Fb", "", "/a%2Fb"),
        ("/x", b"/something/else", "", "/x"),
    ],
)
def test_the_path_is_found_as_it_was_written(path: str, raw_path: bytes | None, root_path: str, encoded: str) -> None:
    scope = {"path": path, "root_path": root_path} | ({} if raw_path is None else {"raw_path": raw_path})

    assert encoded_path(scope) == encoded


def test_a_time_is_written_in_utc_with_six_digits() -> None:
    assert format_time(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2026-01-02T03:04:05.000000Z"
    assert format_time(datetime(99, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=1)))) == "0099-01-02T02:04:05.000006Z"


def test_the_answer_to_a_push_escapes_what_must_be_escaped() -> None:
    names = ["plain", 'quo"te', "back\\slash", "new\nline", "é😀", "\x7f"]
    fields = [{"queue": f"q{name}", "partition": name, "transactionId": name} for name in names]
    items = read_push(json.dumps({"items": fields}).encode())
    results = [
        PushResult(transaction_id=name, message_id=f"m{at}", partition_id=f"p{at}", duplicate=at % 2 == 1)
        for at, name in enumerate(names)
    ]

    answer = json.loads(write_push(items, results))

    assert [element["transaction_id"] for element in answer] == names
    assert [element["transactionId"] for element in answer] == names
    assert [element["queueName"] for element in answer] == [f"q{name}" for name in names]
    assert [element["partition"] for element in answer] == names
    assert [element["status"] for element in answer] == ["queued", "duplicate"] * 3
    assert [element["index"] for element in answer] == list(range(6))


def test_the_answer_to_acks_escapes_what_must_be_escaped() -> None:
    results = [
        AckResult(transaction_id='a"\n', success=True, queue='q"', partition="é", lease_released=True),
        AckResult(transaction_id="b", success=False, error='no "such"'),
    ]

    assert json.loads(write_acks(results)) == [
        {
            "index": 0,
            "transactionId": 'a"\n',
            "success": True,
            "error": None,
            "queueName": 'q"',
            "partitionName": "é",
            "leaseReleased": True,
            "dlq": False,
        },
        {
            "index": 1,
            "transactionId": "b",
            "success": False,
            "error": 'no "such"',
            "queueName": None,
            "partitionName": None,
            "leaseReleased": False,
            "dlq": False,
        },
    ]


def test_an_ack_is_read_with_its_defaults() -> None:
    ack = read_ack(b'{"transactionId":"t","partitionId":"p","status":"success","leaseId":"","consumerGroup":""}')

    assert (ack.status, ack.lease_id, ack.group, ack.error) == (AckStatus.COMPLETED, None, "__QUEUE_MODE__", None)


def test_the_group_of_a_batch_of_acks_stands_beside_them() -> None:
    body = {"acknowledgments": [{"transactionId": "t", "partitionId": "p", "consumerGroup": "inner"}]}

    assert [ack.group for ack in read_ack_batch(json.dumps({**body, "consumerGroup": "g"}).encode())] == ["g"]
    assert [ack.group for ack in read_ack_batch(json.dumps(body).encode())] == ["__QUEUE_MODE__"]


def test_a_refused_extension_has_no_times() -> None:
    assert json.loads(write_extension(LeaseExtension(lease_id="l", renewed=0, error="Lease already expired"))) == {
        "leaseId": "l",
        "success": False,
        "renewed": 0,
        "newExpiresAt": None,
        "expiresAt": None,
        "lease_expires_at": None,
        "error": "Lease already expired",
    }


def slice_of(lines: list[bytes], *, minted: bool) -> SegmentSlice:
    claim = ClaimedPartition(
        queue='q"\n', partition="é", partition_id=PARTITION_ID, first=3, end=3 + len(lines), retry_count=2, attempt=5
    )
    return SegmentSlice(
        claim=claim,
        created_at=datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        id_prefix="01890000-0000-7000-8000-",
        minted=minted,
        first=3,
        count=len(lines),
        lines=b"\n".join(lines),
    )


@pytest.mark.parametrize("minted", [True, False])
@pytest.mark.parametrize("payload_bytes", [1, 100, SPLICE_BYTES - 100, SPLICE_BYTES + 1])
@pytest.mark.parametrize("count", [1, 2, 500])
def test_stored_lines_become_messages_in_order(minted: bool, payload_bytes: int, count: int) -> None:
    transaction = "\0" if minted else "own-"
    lines = [
        f'{at:012x}","transactionId":"{transaction}{at:012x}","traceId":null,"producerSub":null,'.encode()
        + b'"data":"' + b"x" * payload_bytes + b'"'
        for at in range(count)
    ]  # fmt: skip

    parts = list(splice(slice_of(lines, minted=minted), "lease", '"g"'))

    messages = json.loads(b"[" + b",".join(part.data for part in parts) + b"]")
    assert sum(part.messages for part in parts) == len(messages) == count
    prefix = "01890000-0000-7000-8000-"
    for at, message in enumerate(messages):
        assert message == {
            "id": f"{prefix}{at:012x}",
            "transactionId": f"{prefix if minted else 'own-'}{at:012x}",
            "traceId": None,
            "producerSub": None,
            "data": "x" * payload_bytes,
            "createdAt": "2026-01-02T03:04:05.000006Z",
            "queue": 'q"\n',
            "partition": "é",
            "partitionId": str(PARTITION_ID),
            "leaseId": "lease",
            "consumerGroup": "g",
            "retryCount": 2,
            "deliveryAttempt": 5,
        }


def test_a_slice_of_which_nothing_is_delivered_becomes_nothing() -> None:
    assert list(splice(slice_of([], minted=False), "", '"g"')) == []


@pytest.mark.parametrize("bad", [b"\xff", b"\xf0\x9f\x98", b"\xc0\x80", b"\xed\xa0\x80"])
@pytest.mark.parametrize("place", [0, 1024 * 1024 - 2, 1024 * 1024 - 1, 1024 * 1024, 3 * 1024 * 1024])
def test_bad_utf8_is_found_anywhere_in_a_large_payload(bad: bytes, place: int) -> None:
    head = b'{"items":[{"queue":"q","payload":"'
    filler = b"x" * max(place - len(head), 0)

    with pytest.raises(InvalidRequest, match="not UTF-8"):
        read_push(head + filler + bad + b"y" * 10 + b'"}]}')


def test_characters_across_the_pieces_of_a_large_body_are_good_utf8() -> None:
    for shift in range(4):
        payload = b'"' + b"x" * shift + "😀".encode() * 600_000 + b'"'

        [item] = read_push(b'{"items":[{"queue":"q","payload":' + payload + b"}]}")

        assert item.payload == payload


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(
    payloads=st.lists(values, min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_only=st.booleans(),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_json_is_read_as_it_was_meant_and_on_one_line(
    payloads: list[Any], indent: int | str | None, ascii_only: bool, line_end: str
) -> None:
    body = {"items": [{"queue": "q", "payload": payload} for payload in payloads]}
    text = json.dumps(body, indent=indent, ensure_ascii=ascii_only).replace("\n", line_end)

    items = read_push(text.encode())

    assert [json.loads(item.payload) for item in items] == payloads
    assert not any(b"\n" in item.payload for item in items)
