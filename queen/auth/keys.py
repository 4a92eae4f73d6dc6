"""The public keys of a JWKS endpoint: fetched, kept, fetched again when a token names one that is not known.

One task fetches; who needs a key waits for it. However many tokens name keys that do not exist, they cause one fetch in
:data:`FORCED_PAUSE_SECONDS`. A fetch that fails leaves everything as it was. A key that a newer set
does not have is honoured for as long as a set is kept anyway, counted from when it was last seen: a token signed just
before a rotation is still good.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import jwt
import structlog
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from queen.errors import KeysUnavailable, Unauthenticated

PublicKey = RSAPublicKey | Ed25519PublicKey
Fetch = Callable[[], Awaitable[bytes]]

FORCED_PAUSE_SECONDS: Final = 5.0
"""Least time between two fetches that tokens have asked for: the bound of what a flood of made-up key ids can cause."""

FAILED_PAUSE_SECONDS: Final = 30.0
"""After a fetch that failed the next one comes so soon, when no token asks for one before."""

MAX_SET_BYTES: Final = 1024 * 1024
"""Of a key set; real ones have a few KiB."""

_SHOWN: Final = 64

log = structlog.get_logger("queen.auth")


class FetchFailed(Exception):
    """The key set could not be had. ``args[0]`` says why, without the URL, which may hold a password."""


class RemoteKey(NamedTuple):
    """A key of a set. ``kid`` None: it has no name, and only tokens without one can mean it."""

    kid: str | None
    algorithm: str
    key: PublicKey


class RemoteKeys:
    """The keys of one endpoint. ``run`` must be running for ``find`` to find any.

    Args:
        fetch: gets the set, within a deadline of its own; raises FetchFailed.
        refresh_seconds: a set is fetched again after this time.
        forced: gets the set when a token asks for it; the same by default.
    """

    def __init__(self, fetch: Fetch, refresh_seconds: float, forced: Fetch | None = None) -> None:
        self._fetch = fetch
        self._forced = forced or fetch
        self._refresh_seconds = refresh_seconds
        self._current: list[RemoteKey] = []
        self._retired: dict[tuple[str, str], tuple[float, PublicKey]] = {}  # (algorithm, kid) -> until, key
        self._seen_at = 0.0  # when the current set was fetched
        self._forced_at = -FORCED_PAUSE_SECONDS  # when a token last made us fetch
        self._fetching = True  # under way, or about to be; the first one is from the start
        self._wanted = trio.Event()
        self._done = trio.Event()

    async def find(self, algorithm: str, kid: str | None, *, otherwise: PublicKey | bytes | None = None) -> Any:
        """The key for a token; without a kid the first one for its algorithm.

        Args:
            otherwise: for a kid that the set does not have.

        Raises:
            KeysUnavailable: there is no set, and none could be fetched.
            Unauthenticated: the set has no such key, also not after it was fetched again.
        """
        key = self._look_up(algorithm, kid)
        if key is None and self._fetching:
            await self._done.wait()
            key = self._look_up(algorithm, kid)
        if key is None and trio.current_time() >= self._forced_at + FORCED_PAUSE_SECONDS:
            if not self._fetching:
                self._forced_at = trio.current_time()
                self._fetching = True
                self._wanted.set()
            await self._done.wait()
            key = self._look_up(algorithm, kid)
        if key is not None:
            return key
        if otherwise is not None:
            return otherwise
        if not self._current:
            raise KeysUnavailable
        raise Unauthenticated(f"Unknown key ID: {_shown(kid)}")

    def _look_up(self, algorithm: str, kid: str | None) -> PublicKey | None:
        for each in self._current:
            if each.algorithm == algorithm and (kid is None or each.kid == kid):
                return each.key
        if kid is not None and (found := self._retired.get((algorithm, kid))) is not None:
            until, key = found
            if trio.current_time() < until:
                return key
        return None

    async def run(self) -> None:
        """Fetch now, then when the time has come or a token asks for it, until cancelled."""
        fetch = self._fetch
        while True:
            self._fetching = True
            refreshed = await self._refresh(fetch)
            self._fetching = False
            self._wanted = trio.Event()
            done, self._done = self._done, trio.Event()
            done.set()
            with trio.move_on_after(
                self._refresh_seconds if refreshed else min(FAILED_PAUSE_SECONDS, self._refresh_seconds)
            ):
                await self._wanted.wait()
            fetch = self._forced if self._wanted.is_set() else self._fetch

    async def _refresh(self, fetch: Fetch) -> bool:
        try:
            keys = read_key_set(await fetch())
        except FetchFailed as failed:
            log.warning("keys not fetched, those that are known stay", reason=str(failed), keys=len(self._current))
            return False
        now = trio.current_time()
        self._retired = {name: found for name, found in self._retired.items() if now < found[0]}
        for old in self._current:
            if old.kid is not None:
                self._retired[old.algorithm, old.kid] = (self._seen_at + self._refresh_seconds, old.key)
        self._current = keys
        self._seen_at = now
        log.info("keys fetched", keys=[key.kid for key in keys])
        return True


def read_key_set(body: bytes) -> list[RemoteKey]:
    """The keys of a set that can verify tokens here; others are passed over.

    Raises:
        FetchFailed: it is no key set, or none of its keys is of use.
    """
    try:
        entries = json.loads(body)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FetchFailed("the answer is not a JSON Web Key Set") from None
    keys = [key for entry in entries if (key := _read_key(entry)) is not None] if isinstance(entries, list) else []
    if not keys:
        raise FetchFailed("the set has no RSA or Ed25519 key to verify signatures with")
    return keys


def _read_key(entry: object) -> RemoteKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        return None
    try:
        if entry.get("kty") == "RSA" and entry.get("alg", "RS256") == "RS256":
            rsa = RSAAlgorithm.from_jwk(entry)
            return RemoteKey(kid, "RS256", rsa.public_key() if isinstance(rsa, RSAPrivateKey) else rsa)
        if entry.get("kty") == "OKP" and entry.get("crv") == "Ed25519":
            ed = OKPAlgorithm.from_jwk(entry)
            public = ed.public_key() if isinstance(ed, Ed25519PrivateKey) else ed
            return RemoteKey(kid, "EdDSA", public) if isinstance(public, Ed25519PublicKey) else None
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        log.warning("a key of the set is not usable", kid=_shown(kid), reason=type(error).__name__)
    return None


def _shown(kid: str | None) -> str:
    return "none" if kid is None else kid[:_SHOWN].encode(errors="replace").decode()
