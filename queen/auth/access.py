"""Whether a request may pass: its path, its token, the level of its route. The one place that says no."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from queen.auth.levels import Level
from queen.config.settings import JwtSettings
from queen.errors import Forbidden, Unauthenticated

if TYPE_CHECKING:
    from queen.auth.tokens import Tokens


class Access:
    """The rules of a server with authentication. Open it with :func:`open_access`."""

    def __init__(self, settings: JwtSettings, tokens: Tokens) -> None:
        self._tokens = tokens
        self._open_paths = frozenset(settings.skip_paths)
        self._open_prefixes = tuple(path for path in settings.skip_paths if len(path) > 1 and path.endswith("/"))

    async def admit(self, path: str, authorization: str, level: Level) -> str | None:
        """Let a request pass or raise. Returns the subject of its token, if it has to have one.

        Args:
            path: as it was sent, percent-encoded.
            authorization: the header; ``""`` when there is none.
            level: what the route asks for.

        Raises:
            Unauthenticated: there is no valid token.
            Forbidden: the token is valid and its roles are not enough.
            KeysUnavailable: the keys to verify it with could not be fetched.
        """
        if level is Level.OPEN or path in self._open_paths or path.startswith(self._open_prefixes):
            return None
        token = token_of(authorization)
        if not token:
            raise Unauthenticated("Authentication required")
        principal = await self._tokens.verify(token)
        if principal.level < level:
            raise Forbidden
        return principal.sub


def token_of(authorization: str) -> str:
    """The token in a header, with or without the scheme in front of it; ``""`` when there is none."""
    scheme, _, token = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return authorization.strip()


@asynccontextmanager
async def open_access(settings: JwtSettings, shared: Path | None = None) -> AsyncIterator[Access | None]:
    """The rules that the settings ask for, None for none; keys are fetched in the background while this is open.

    Args:
        shared: a directory that the workers of this server have in common, to fetch keys once for all of them.

    Raises:
        StartupError: a configured key cannot be used.
    """
    if not settings.enabled:
        yield None
        return
    from queen.auth.tokens import Tokens  # here: a server that asks for no tokens does without PyJWT, 9 MB

    if settings.jwks_url is None or settings.algorithm == "HS256":
        yield Access(settings, Tokens(settings))
        return
    from queen.auth.fetch import fetch_key_set  # here, for what it costs
    from queen.auth.keys import RemoteKeys
    from queen.auth.shared import SharedFetch

    fetch = partial(fetch_key_set, settings.jwks_url.reveal(), settings.jwks_timeout_seconds)
    keys = RemoteKeys(
        fetch, settings.jwks_refresh_seconds, forced=None if shared is None else SharedFetch(fetch, shared)
    )
    access = Access(settings, Tokens(settings, keys))
    async with trio.open_nursery() as refresher:
        refresher.start_soon(keys.run)
        yield access
        refresher.cancel_scope.cancel()
