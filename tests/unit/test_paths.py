"""The path of a request, found again in what an ASGI server says of it."""

from __future__ import annotations

from urllib.parse import unquote

import pytest

from queen.routes.paths import encoded_path


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a%2Fb", "/a%2Fb"),
        ("http://host/a%2Fb", "/a%2Fb"),
        ("http://host", "/"),
        ("http://", "/"),
        ("http://[::1", "/"),  # no host at all
        ("http://[::1/a", "/a"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_a_target_of_any_form_has_a_path(target: str, path: str) -> None:
    assert encoded_path({"path": unquote(target), "raw_path": target.encode()}) == path
