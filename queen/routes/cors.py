"""Which pages of other origins may read answers: any, unless CORS_ALLOWED_ORIGINS names some."""

from __future__ import annotations

from typing import Final

from queen.config.settings import CorsSettings

Lines = tuple[tuple[bytes, bytes], ...]

ANY: Final = "*"


class Cors:
    """The headers that every answer has for browsers, made once."""

    def __init__(self, settings: CorsSettings) -> None:
        self._common: Lines = (
            (b"access-control-allow-methods", settings.allowed_methods.encode("latin-1")),
            (b"access-control-allow-headers", settings.allowed_headers.encode("latin-1")),
            (b"access-control-max-age", b"%d" % settings.max_age_seconds),
        )
        named = {origin.rstrip("/") for origin in settings.allowed_origins}
        self.by_origin = ANY not in named
        """Whether it matters where a request comes from."""
        allow = b"access-control-allow-origin"
        self._any: Lines = ((allow, b"*"), *self._common)
        self._none: Lines = ((b"vary", b"Origin"), *self._common)
        self._named: dict[bytes, Lines] = {
            name: ((allow, name), *self._none) for origin in named if (name := origin.encode("latin-1"))
        }

    def lines(self, origin: bytes = b"") -> Lines:
        """The headers of an answer.

        Args:
            origin: the request's header of that name; empty when there is none.
        """
        return self._named.get(origin, self._none) if self.by_origin else self._any
