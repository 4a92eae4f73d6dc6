"""The keys of an endpoint: rotation, floods of unknown ids, failures. The clock is a mock, the endpoint a function."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import jwt
import pytest
import structlog
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from queen.auth.keys import FetchFailed, RemoteKeys, read_key_set
from queen.auth.tokens import Tokens
from queen.config.settings import JwtSettings, Secret
from queen.errors import KeysUnavailable, Unauthenticated

HOUR = 3600.0
RSA = generate_rsa_key(65537, 2048)
OLD, NEW = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None = None, **members: Any) -> dict[str, Any]:
    algorithm: Any = OKPAlgorithm if isinstance(key, Ed25519PrivateKey) else RSAAlgorithm
    entry: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    entry.pop("key_ops", None)
    return entry | ({} if kid is None else {"kid": kid}) | members


def key_set(*entries: Any) -> bytes:
    return json.dumps({"keys": entries}).encode()


class Endpoint:
    """What answers a fetch: a set, or a failure. ``seconds``: how long that takes."""

    def __init__(self, *entries: Any) -> None:
        self.answer: bytes | FetchFailed = key_set(*entries)
        self.fetched_at: list[float] = []
        self.seconds = 0.0

    async def fetch(self) -> bytes:
        self.fetched_at.append(trio.current_time())
        await trio.sleep(self.seconds)
        if isinstance(self.answer, FetchFailed):
            raise self.answer
        return self.answer


@asynccontextmanager
async def running(endpoint: Endpoint, refresh_seconds: float = HOUR) -> AsyncIterator[RemoteKeys]:
    keys = RemoteKeys(endpoint.fetch, refresh_seconds)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keys.run)
        yield keys
        nursery.cancel_scope.cancel()


async def is_known(keys: RemoteKeys, kid: str) -> bool:
    try:
        await keys.find("EdDSA", kid)
    except Unauthenticated:
        return False
    return True


# -- which key ----------------------------------------------------------------------------------------------------


async def test_a_key_is_found_by_id_and_algorithm(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Endpoint(jwk(RSA, "r"), jwk(OLD, "e"), jwk(NEW, "f"))) as keys:
        assert (await keys.find("EdDSA", "f")) == NEW.public_key()
        assert (await keys.find("RS256", "r")) == RSA.public_key()
        for algorithm, kid in (("EdDSA", "r"), ("RS256", "e"), ("RS256", "")):
            with pytest.raises(Unauthenticated) as raised:
                await keys.find(algorithm, kid)
            assert raised.value.detail == f"Unknown key ID: {kid}"


async def test_without_an_id_the_first_key_of_the_algorithm_is_taken(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Endpoint(jwk(RSA), jwk(OLD, "e"), jwk(NEW, "f"))) as keys:
        assert (await keys.find("EdDSA", None)) == OLD.public_key()
        assert (await keys.find("RS256", None)) == RSA.public_key()


async def test_without_an_id_and_a_key_the_error_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Endpoint(jwk(RSA, "r"))) as keys:
        with pytest.raises(Unauthenticated) as raised:
            await keys.find("EdDSA", None)

    assert raised.value.detail == "Unknown key ID: none"


def test_only_what_can_verify_is_read() -> None:
    entries = [
        jwk(RSA, "r"),
        jwk(RSA, "for encryption", use="enc"),
        jwk(RSA, "other algorithm", alg="RS512"),
        jwk(RSA, "named", alg="RS256", use="sig", key_ops=["verify"]),
        jwk(OLD, "e"),
        jwk(OLD, 7),  # type: ignore[arg-type]
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        ECAlgorithm.to_jwk(generate_ec_key(SECP256R1()).public_key(), as_dict=True) | {"kid": "ec"},
        {"kty": "RSA", "kid": "half", "n": "AQAB"},
        {"kty": "RSA", "kid": "garbled", "n": "!", "e": 7},
        {"kty": "OKP", "crv": "Ed25519", "kid": "short", "x": "AA"},
        {"kty": "OKP", "crv": "X25519", "kid": "for exchange", "x": "AA"},
        {"kid": "nothing"},
        "text",
        None,
    ]

    assert [key.kid for key in read_key_set(key_set(*entries))] == ["r", "named", "e"]


def test_of_a_private_key_only_the_public_half_is_kept() -> None:
    private = [RSAAlgorithm.to_jwk(RSA, as_dict=True), OKPAlgorithm.to_jwk(OLD, as_dict=True)]

    assert [key.key for key in read_key_set(key_set(*private))] == [RSA.public_key(), OLD.public_key()]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"{}", b'{"keys":7}', b'{"keys":[]}', b'{"keys":[{}]}', b"[" * 10_000]
)
def test_what_is_no_key_set_is_a_failed_fetch(body: bytes) -> None:
    with pytest.raises(FetchFailed):
        read_key_set(body)


# -- rotation -----------------------------------------------------------------------------------------------------


async def test_a_new_key_is_fetched_when_a_token_names_it(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        await keys.find("EdDSA", "old")
        await trio.sleep(100)
        endpoint.answer = key_set(jwk(NEW, "new"))

        assert await keys.find("EdDSA", "new") == NEW.public_key()

    assert len(endpoint.fetched_at) == 2


async def test_a_key_that_left_the_set_is_honoured_to_the_end_of_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        await keys.find("EdDSA", "old")
        seen_at = trio.current_time()
        await trio.sleep(100)
        endpoint.answer = key_set(jwk(NEW, "new"))
        await keys.find("EdDSA", "new")

        await trio.sleep_until(seen_at + HOUR - 1)
        assert await is_known(keys, "old")
        await trio.sleep_until(seen_at + HOUR + 1)
        assert not await is_known(keys, "old")
        assert await is_known(keys, "new")


async def test_the_set_is_fetched_again_in_its_time(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint, refresh_seconds=60):
        await trio.sleep(61)
        endpoint.answer = key_set(jwk(NEW, "new"))
        await trio.sleep(120)

    assert [round(at - endpoint.fetched_at[0]) for at in endpoint.fetched_at] == [0, 60, 120, 180]


async def test_an_id_with_another_key_behind_it_means_the_new_one(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "k"))
    async with running(endpoint, refresh_seconds=60) as keys:
        assert await keys.find("EdDSA", "k") == OLD.public_key()
        endpoint.answer = key_set(jwk(NEW, "k"))
        await trio.sleep(61)

        assert await keys.find("EdDSA", "k") == NEW.public_key()


# -- floods -------------------------------------------------------------------------------------------------------


async def test_however_many_unknown_ids_come_one_fetch_is_made_in_five_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    endpoint.seconds = 0.1
    async with running(endpoint) as keys:
        await keys.find("EdDSA", "old")
        await trio.sleep(100)
        begun = trio.current_time()

        async def flood(n: int) -> None:
            for step in range(100):
                assert not await is_known(keys, f"{n}-{step}")
                await trio.sleep(0.2)

        async with trio.open_nursery() as attackers:
            for n in range(50):
                attackers.start_soon(flood, n)
        lasted = trio.current_time() - begun
        assert await is_known(keys, "old")

    forced = endpoint.fetched_at[1:]
    assert len(forced) <= lasted / 5 + 1
    assert all(later - earlier >= 5 for earlier, later in pairwise(forced))


async def test_a_flood_does_not_keep_a_new_key_out_for_longer_than_that(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        assert not await is_known(keys, "made up")
        endpoint.answer = key_set(jwk(OLD, "old"), jwk(NEW, "new"))

        assert not await is_known(keys, "new")
        await trio.sleep(5)
        assert await is_known(keys, "new")


async def test_all_who_wait_for_one_fetch_get_its_outcome(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        await keys.find("EdDSA", "old")
        endpoint.answer = key_set(jwk(NEW, "new"))
        endpoint.seconds = 1
        found: list[bool] = []

        async def ask() -> None:
            found.append(await is_known(keys, "new"))

        async with trio.open_nursery() as clients:
            for _ in range(20):
                clients.start_soon(ask)

    assert found == [True] * 20
    assert len(endpoint.fetched_at) == 2


async def test_who_asked_for_a_fetch_may_go_without_ending_it(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        await keys.find("EdDSA", "old")
        endpoint.answer, endpoint.seconds = key_set(jwk(NEW, "new")), 2
        with trio.move_on_after(1):
            await keys.find("EdDSA", "new")

        assert await is_known(keys, "new")
        assert len(endpoint.fetched_at) == 2


# -- failures -----------------------------------------------------------------------------------------------------


async def test_a_fetch_that_fails_keeps_what_is_known(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint, refresh_seconds=60) as keys:
        await keys.find("EdDSA", "old")
        endpoint.answer = FetchFailed("away")
        await trio.sleep(24 * HOUR)

        assert await is_known(keys, "old")
        assert not await is_known(keys, "new")


async def test_without_any_key_the_server_says_that_it_has_none(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint()
    endpoint.answer = FetchFailed("away")
    async with running(endpoint) as keys:
        for _ in range(3):
            with pytest.raises(KeysUnavailable) as raised:
                await keys.find("EdDSA", "old")
        assert (raised.value.status, raised.value.detail) == (500, "Failed to fetch JWKS")
        assert len(endpoint.fetched_at) == 2  # the one at the start, and one that the first token asked for

        endpoint.answer = key_set(jwk(OLD, "old"))
        await trio.sleep(5)
        assert await is_known(keys, "old")


async def test_after_a_failure_the_next_fetch_comes_soon(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint()
    endpoint.answer = FetchFailed("away")
    async with running(endpoint) as keys:
        await trio.sleep(1)
        endpoint.answer = key_set(jwk(OLD, "old"))
        await trio.sleep(30)
        fetched = len(endpoint.fetched_at)

        assert await is_known(keys, "old")
        assert fetched == len(endpoint.fetched_at) == 2


async def test_a_token_waits_for_the_first_fetch(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    endpoint.seconds = 3
    async with running(endpoint) as keys:
        assert await is_known(keys, "old")

    assert len(endpoint.fetched_at) == 1


# -- tokens with an endpoint --------------------------------------------------------------------------------------


def token(key: Any, algorithm: str, kid: str | None) -> str:
    return jwt.encode({"sub": "alice", "role": "admin"}, key, algorithm, None if kid is None else {"kid": kid})


def settings(algorithm: str, **others: Any) -> JwtSettings:
    return JwtSettings(enabled=True, algorithm=algorithm, jwks_url=Secret("http://unused"), **others)


async def test_tokens_are_verified_with_the_keys_of_the_endpoint(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Endpoint(jwk(RSA, "r"), jwk(OLD, "e"))) as keys:
        verifier = Tokens(settings("auto"), keys)

        for signed in (
            token(RSA, "RS256", "r"),
            token(RSA, "RS256", None),
            token(OLD, "EdDSA", "e"),
            token(OLD, "EdDSA", None),
        ):
            assert (await verifier.verify(signed)).sub == "alice"
        with pytest.raises(Unauthenticated, match="Invalid token signature"):
            await verifier.verify(token(NEW, "EdDSA", "e"))
        with pytest.raises(Unauthenticated, match="Unknown key ID: r"):
            await verifier.verify(token(OLD, "EdDSA", "r"))
        with pytest.raises(Unauthenticated, match="Token uses HS256, expected RS256 or EdDSA"):
            await verifier.verify(token("a secret that is long enough for HS256", "HS256", "r"))


async def test_one_algorithm_of_an_endpoint_may_be_all_that_is_wanted(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Endpoint(jwk(RSA, "r"), jwk(OLD, "e"))) as keys:
        verifier = Tokens(settings("RS256"), keys)

        assert (await verifier.verify(token(RSA, "RS256", "r"))).sub == "alice"
        with pytest.raises(Unauthenticated, match="Token uses EdDSA, expected RS256"):
            await verifier.verify(token(OLD, "EdDSA", "e"))


async def test_a_secret_beside_an_endpoint_is_for_its_own_algorithm(autojump_clock: trio.testing.MockClock) -> None:
    secret = "a secret that is long enough for HS256"
    async with running(Endpoint(jwk(RSA, "r"))) as keys:
        verifier = Tokens(settings("auto", secret=Secret(secret)), keys)

        assert (await verifier.verify(token(secret, "HS256", "r"))).sub == "alice"
        assert (await verifier.verify(token(RSA, "RS256", "r"))).sub == "alice"


async def test_a_flood_of_tokens_costs_known_ones_nothing(autojump_clock: trio.testing.MockClock) -> None:
    endpoint = Endpoint(jwk(OLD, "old"))
    async with running(endpoint) as keys:
        verifier = Tokens(settings("EdDSA"), keys)
        await verifier.verify(token(OLD, "EdDSA", "old"))
        endpoint.seconds = 4
        with trio.move_on_after(0.1):
            await verifier.verify(token(NEW, "EdDSA", "made up"))

        with trio.fail_after(0.1):
            await verifier.verify(token(OLD, "EdDSA", "old"))


async def test_the_log_names_keys_and_not_what_they_are(autojump_clock: trio.testing.MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        async with running(Endpoint(jwk(OLD, "old"), {"kty": "RSA", "kid": "half", "n": "AQAB"})) as keys:
            await keys.find("EdDSA", "old")

    assert [entry["event"] for entry in logs] == ["a key of the set is not usable", "keys fetched"]
    assert logs[0]["kid"] == "half"
    assert logs[1]["keys"] == ["old"]
    assert jwk(OLD)["x"] not in repr(logs)
