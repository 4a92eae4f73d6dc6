"""GET /, /assets/… and whatever else is no API: the files of a dashboard, from the folder that WEBAPP_ROOT names.

An address that is no file is one of the dashboard's own, which its ``index.html`` finds its way by; only what is
missing under ``/assets/`` is said to be missing. Open to everybody: a dashboard asks for the token itself.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Final, NamedTuple

import trio

from queen.errors import RouteNotFound
from queen.routes.call import Answer, Call, Context

API_PREFIXES: Final = ("/api/", "/streams/", "/internal/", "/metrics/", "/ws/")
"""Where a path that is no route is a mistake of a client, and not a page."""

MAX_FILE_BYTES: Final = 32 * 1024 * 1024
"""A file is held in memory while it is sent. The largest of a built dashboard are a few megabytes."""

PAGE: Final = "index.html"

_TYPES: Final = mimetypes.MimeTypes()  # not the machine's own tables, which differ
for _kind, _suffix in (
    ("text/javascript", ".js"),
    ("text/javascript", ".mjs"),
    ("application/json", ".map"),
    ("application/manifest+json", ".webmanifest"),
    ("image/webp", ".webp"),
    ("font/woff2", ".woff2"),
):
    _TYPES.add_type(_kind, _suffix)  # which Pythons before 3.14 do not know, or call otherwise
_TEXT: Final = frozenset({"application/json", "application/manifest+json", "image/svg+xml"})


class File(NamedTuple):
    body: bytes
    content_type: str


def is_page(method: str, path: str) -> bool:
    """Whether a request that is for no route is for the dashboard; ``path`` as it was sent."""
    return method in ("GET", "HEAD") and path.startswith("/") and not path.startswith(API_PREFIXES)


async def show_page(context: Context, call: Call) -> Answer:
    root, path = context.settings.webapp_root, call.parameters["path"]
    if root is None:
        raise RouteNotFound("Not Found")
    found = await trio.to_thread.run_sync(_find, root, path)
    if found is None:
        raise RouteNotFound("Not Found")
    is_asset = path.startswith("/assets/")  # whose name changes with what is in it
    lifetime = "public, max-age=31536000, immutable" if is_asset else "no-cache"
    headers = {"Cache-Control": lifetime, "X-Content-Type-Options": "nosniff"}
    return Answer(200, found.body, found.content_type, headers)


def _find(root: Path, path: str) -> File | None:
    """The file that a path names, or the page that every other path is; None: neither is there.

    Args:
        path: decoded, from its slash on.
    """
    found = _read(root, path.lstrip("/"))
    if found is None and not path.startswith("/assets/"):
        found = _read(root, PAGE)
    return found


def _read(root: Path, name: str) -> File | None:
    """A file below ``root``, also after all links have been followed; None for anything else."""
    try:
        root = root.resolve(strict=True)
        file = (root / name).resolve(strict=True)
        if not file.is_relative_to(root) or not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            return None
        return File(file.read_bytes(), _type_of(file.name))
    except (OSError, ValueError, RuntimeError):  # there is none, it may not be read, a NUL or a circle in its name
        return None


def _type_of(name: str) -> str:
    kind, coding = _TYPES.guess_type(name)
    if kind is None or coding is not None:
        return "application/octet-stream"
    return f"{kind}; charset=utf-8" if kind.startswith("text/") or kind in _TEXT else kind
