"""The command line: what it refuses, and what it says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from queen._version import __version__
from queen.cli import main
from queen.cli.run import is_loopback
from queen.storage.pushes import PushRequest
from queen.storage.segments import Keyring
from queen.storage.spool import KeptMessage, open_spool


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["run", "--prot", "1"],
        ["run", "--port", "http"],
        ["run", "--log-level", "loud"],
        ["run", "--data-dir", "/data", "--database-url", "postgresql://here/there"],
        ["migrate", "--port", "1"],
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: queen-trio")


def test_a_key_that_is_none_is_an_error_of_the_log() -> None:
    environment = {"QUEEN_ENCRYPTION_KEY": "abc", "PG_PORT": "five", "LOG_LEVEL": "error", "LOG_FORMAT": "json"}
    migrate = [sys.executable, "-m", "queen", "migrate", "--database-url", "postgresql://here@127.0.0.1:1/there"]

    said = subprocess.run(migrate, env=environment, capture_output=True, text=True, check=False).stderr.splitlines()

    assert json.loads(said[0])["event"] == "QUEEN_ENCRYPTION_KEY is not 64 hexadecimal characters: encryption is off"
    assert said[1] == "queen-trio: PostgreSQL cannot be reached at 127.0.0.1 port 1: Connection refused"
    assert len(said) == 2


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"queen-trio {__version__}\n"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("queen.example", False),
    ],
)
def test_which_hosts_only_this_machine_can_reach(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.fixture
async def set_aside(tmp_path: Path) -> Path:
    """A spool with two pushes that could not be stored."""
    message = KeptMessage(queue="gone", partition="Default", payload=b"1", transaction_id=None, trace_id=None)
    async with open_spool(tmp_path / "spool", 10_000, Keyring(None)) as spool:
        await spool.keep([PushRequest([message], None)] * 2)
        await spool.set_aside_queue("gone", "the queue was deleted")
    return tmp_path / "spool"


async def run_spool(directory: Path, *arguments: str) -> tuple[int, list[str]]:
    """The command in a process of its own: it sets up logging and a loop."""
    command = [sys.executable, "-m", "queen", "spool", "--spool-dir", str(directory), *arguments]
    done = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout.decode().splitlines()


async def test_the_spool_is_shown_retried_and_discarded(set_aside: Path) -> None:
    run = partial(run_spool, set_aside)

    code, [headline, first, second] = await run()
    assert code == 0
    assert "0 messages wait" in headline
    assert first.endswith("queue 'gone': the queue was deleted")
    assert (await run("--retry", second.split()[0])) == (0, ["1 message to be stored"])
    assert (await run("--discard", "7")) == (1, ["0 messages discarded", "not set aside, or not any more: 7"])
    assert (await run("--retry")) == (0, ["1 message to be stored"])
    assert "2 messages wait" in (await run())[1][0]


async def test_where_there_is_no_spool_none_is_made(tmp_path: Path) -> None:
    code, [sentence] = await run_spool(tmp_path / "nothing")

    assert (code, sentence[:33]) == (3, "queen-trio: there is no spool in ")
    assert not await trio.Path(tmp_path / "nothing").exists()
