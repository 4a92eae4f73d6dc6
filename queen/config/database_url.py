"""What the URL of a PostgreSQL says of where it is: for people, and to tell one database from another."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from queen.errors import StartupError


class DatabasePlace(NamedTuple):
    """Without user and password. Of several hosts, as for a failover: their names, and their ports, with commas."""

    host: str
    port: str
    name: str


def locate_database(url: str) -> DatabasePlace:
    """Where the database of a URL is, with PostgreSQL's defaults.

    Raises:
        StartupError: nobody could tell. The sentence does not show the URL, which may hold a password.
    """
    scheme = url.partition("://")[0]
    if scheme not in ("postgresql", "postgres"):
        raise StartupError("the database URL must begin with postgresql://")
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        hosts = [_host_and_port(entry) for entry in parts.netloc.rpartition("@")[2].split(",")]
    except ValueError:
        raise StartupError(
            "the database URL cannot be read: postgresql://user:password@host:5432/name,"
            " with any special character of user and password percent-encoded"
        ) from None
    other_port = query.get("port", ["5432"])[0]
    return DatabasePlace(
        host=unquote(",".join(host for host, _ in hosts) or query.get("host", ["localhost"])[0]),
        port=",".join(port or other_port for _, port in hosts),
        name=unquote(parts.path.lstrip("/")) or "postgres",
    )


def _host_and_port(entry: str) -> tuple[str, str]:
    """Raises ValueError."""
    host, port = entry, ""
    if entry.startswith("["):
        host, bracket, rest = entry[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(entry)
        port = rest[1:]
    elif not entry.startswith("/"):
        host, _, port = entry.partition(":")
    if port and not is_port(port):
        raise ValueError(entry)
    return host, port


def is_port(text: str) -> bool:
    """Whether it is the number of a port."""
    return text.isascii() and text.isdigit() and int(text) <= 65535
