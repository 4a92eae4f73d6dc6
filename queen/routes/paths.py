"""The path of a request as it stood in the request line, from what an ASGI server says of it.

Servers decode the path before they hand it on, which makes ``a%2Fb`` and ``a/b`` the same; names need the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from queen.errors import InvalidRequest


def encoded_path(scope: Mapping[str, Any]) -> str:
    """The path below ``root_path``, still percent-encoded.

    ``raw_path`` is optional in ASGI, and a mounting application may have cut ``path`` without cutting it: it is used
    as far as it agrees with ``path``, else ``path`` is encoded again (a slash inside a name is then lost).
    """
    path: str = scope["path"]
    if not path.startswith("/"):
        path = _path_of_absolute(path)
    root_path: str = scope.get("root_path", "").rstrip("/")
    if root_path and (path == root_path or path.startswith(root_path + "/")):
        path = path[len(root_path) :]
    raw: str = scope.get("raw_path", b"").decode("latin-1")
    if "%" not in raw and raw == path:
        return path
    start = 0
    while start >= 0:
        if unquote(raw[start:]) == path:
            return raw[start:]
        start = raw.find("/", start + 1)
    return quote(path, safe="/")


def _path_of_absolute(target: str) -> str:
    """The path of a target in absolute form, as it is sent to a proxy. What is in front of it is not looked at: it may
    be no host at all (``http://[::1``)."""
    _, scheme_ends, rest = target.partition("://")
    if not scheme_ends:
        return target
    return "/" + rest.partition("/")[2]


def decode_segment(segment: str, what: str) -> str:
    """One part of an encoded path, decoded once. ``+`` stands for itself.

    Raises:
        InvalidRequest: its escapes are not UTF-8.
    """
    if "%" not in segment:
        return segment
    try:
        return unquote(segment, errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{what} in the path must be percent-encoded UTF-8") from None
