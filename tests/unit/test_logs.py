"""Logs as they leave a process: in a process of their own, since they are set up once for all."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import logging, sys, structlog
from queen.observability import logs
logs.configure({level!r}, {line_format!r}, slot=3)
log = structlog.get_logger("queen.test")
{body}
"""


def written(body: str, *, level: str = "info", line_format: str = "json") -> str:
    """What a process that runs ``body`` writes to standard error."""
    program = PROGRAM.format(level=level, line_format=line_format, body=body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def records(body: str, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(body, **options).splitlines()]


def test_an_event_is_one_line_of_json_with_what_every_line_carries() -> None:
    (record,) = records("log.info('pushed', queue='orders', messages=2)")

    assert record.pop("timestamp").endswith("Z")
    assert record == {"level": "info", "event": "pushed", "slot": 3, "queue": "orders", "messages": 2}


def test_the_standard_library_logs_the_same_way() -> None:
    (record,) = records("logging.getLogger('other').warning('%s things', 3)")

    assert (record["level"], record["event"], record["slot"]) == ("warning", "3 things", 3)


def test_a_traceback_stays_in_its_line() -> None:
    (record,) = records("try: 1 / 0\nexcept ZeroDivisionError: log.exception('broken')")

    assert record["event"] == "broken"
    assert "ZeroDivisionError" in record["exception"]


@pytest.mark.parametrize(("level", "events"), [("debug", "diwe"), ("info", "iwe"), ("warn", "we"), ("error", "e")])
def test_only_what_is_grave_enough_is_said(level: str, events: str) -> None:
    body = "log.debug('d'); log.info('i'); log.warning('w'); log.error('e')"

    assert "".join(record["event"] for record in records(body, level=level)) == events


def test_for_people_a_line_is_no_json_and_without_a_terminal_has_no_colours() -> None:
    line = written("log.info('pushed', queue='orders')", line_format="console")

    assert "pushed" in line
    assert "queue=orders" in line
    assert "\x1b" not in line


def test_lines_of_a_child_that_are_ours_pass_as_they_are_and_others_are_wrapped() -> None:
    ours = '{"event": "ready", "slot": 1}'
    body = f"logs.relay({ours.encode()!r}, 'json', child='worker 1', pid=7)\n"
    body += "logs.relay(b'Traceback \\xff', 'json', child='worker 1', pid=7)"

    first, second = records(body)

    assert first == json.loads(ours)
    assert (second["child"], second["pid"], second["line"]) == ("worker 1", 7, "Traceback \ufffd")


def test_lines_of_a_child_for_people_say_whose_they_are() -> None:
    body = "logs.relay(b'hello', 'console', child='worker 1', pid=7)"

    assert written(body, line_format="console") == "[worker 1 7] hello\n"
