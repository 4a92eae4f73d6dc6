"""The command line: what it refuses, and what it says of itself."""

from __future__ import annotations

import pytest

from queen._version import __version__
from queen.cli import main
from queen.cli.run import is_loopback


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
