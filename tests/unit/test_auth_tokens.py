"""Which tokens are valid, whom they are of, what they may do. Made with PyJWT, or by hand where they are wrong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from queen.auth import tokens
from queen.auth.access import Access, token_of
from queen.auth.levels import Level
from queen.auth.tokens import Principal, Tokens
from queen.config.settings import JwtSettings, Secret
from queen.errors import Forbidden, StartupError, Unauthenticated

SECRET = "a secret that is long enough for HS256"
RSA: RSAPrivateKey = generate_rsa_key(65537, 2048)
OTHER_RSA: RSAPrivateKey = generate_rsa_key(65537, 2048)
ED = Ed25519PrivateKey.generate()


def pem(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return text.decode()


def settings(algorithm: str = "HS256", **others: Any) -> JwtSettings:
    keys: dict[str, dict[str, Any]] = {
        "HS256": {"secret": Secret(SECRET)},
        "RS256": {"public_key": pem(RSA)},
        "EdDSA": {"public_key": pem(ED)},
        "auto": {"secret": Secret(SECRET), "public_key": pem(RSA)},
    }
    return JwtSettings(enabled=True, algorithm=algorithm, **(keys[algorithm] | others))


def sign(algorithm: str = "HS256", key: Any = None, headers: Any = None, **claims: Any) -> str:
    key = key or {"HS256": SECRET, "RS256": RSA, "EdDSA": ED}[algorithm]
    claims = {"sub": "alice", "role": "read-write", "exp": int(time.time()) + 3600} | claims
    return jwt.encode({name: value for name, value in claims.items() if value is not ...}, key, algorithm, headers)


def segment(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def forge(header: Any, claims: Any, secret: bytes = SECRET.encode()) -> str:
    """A token with any header, signed with HMAC whatever it says."""
    signed = f"{segment(header)}.{segment(claims)}"
    return f"{signed}.{segment(hmac.digest(secret, signed.encode(), 'sha256'))}"


async def refusal(verifier: Tokens, token: str) -> str:
    with pytest.raises(Unauthenticated) as raised:
        await verifier.verify(token)
    assert raised.value.status == 401
    assert token == "" or token not in raised.value.detail
    return raised.value.detail


# -- what is valid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "EdDSA"])
async def test_a_token_of_the_configured_algorithm_is_valid(algorithm: str) -> None:
    verifier = Tokens(settings(algorithm))

    assert await verifier.verify(sign(algorithm)) == Principal("alice", Level.READ_WRITE)


async def test_auto_takes_every_algorithm_that_has_a_key() -> None:
    verifier = Tokens(settings("auto"))

    for algorithm in ("HS256", "RS256"):
        assert (await verifier.verify(sign(algorithm))).sub == "alice"
    assert await refusal(verifier, sign("EdDSA")) == "Token uses EdDSA, expected HS256 or RS256"


async def test_a_token_needs_no_expiry() -> None:
    assert (await Tokens(settings()).verify(sign(exp=...))).sub == "alice"


async def test_what_is_not_configured_is_not_asked_of_a_token() -> None:
    token = sign(iss="anybody", aud=["anything"], jti=7, kid="x", headers={"kid": "unknown"})

    assert (await Tokens(settings()).verify(token)).sub == "alice"


async def test_issuer_and_audience_are_checked_where_they_are_configured() -> None:
    verifier = Tokens(settings(issuer="us", audience="queen"))

    for audience in ("queen", ["other", "queen"]):
        assert (await verifier.verify(sign(iss="us", aud=audience))).sub == "alice"
    for issuer in ("them", "us ", 7, None, ...):
        claims: dict[str, Any] = {} if issuer is ... else {"iss": issuer}
        assert await refusal(verifier, forge_claims(aud="queen", **claims)) == "Invalid token issuer"
    for other in ("other", ["other"], [], ...):
        assert await refusal(verifier, sign(iss="us", aud=other)) == "Invalid token audience"


def forge_claims(**claims: Any) -> str:
    """A token with claims that PyJWT would not write."""
    return forge({"alg": "HS256"}, {"exp": int(time.time()) + 60, "role": "admin"} | claims)


# -- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "offset", "error"),
    [
        ("exp", -35, "Token has expired"),
        ("exp", -25, None),
        ("nbf", 35, "Token verification failed: "),
        ("nbf", 25, None),
        ("iat", 35, "Token verification failed: "),
        ("iat", 25, None),
    ],
)
async def test_times_are_kept_to_within_the_skew(claim: str, offset: int, error: str | None) -> None:
    verifier = Tokens(settings(clock_skew_seconds=30.0))
    times: dict[str, Any] = {claim: int(time.time()) + offset}
    token = sign(**times)

    if error is None:
        assert (await verifier.verify(token)).sub == "alice"
    else:
        assert (await refusal(verifier, token)).startswith(error)


@pytest.mark.parametrize("claim", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", ["soon", None, [], {}, float("inf")])
async def test_a_time_that_is_no_number_is_refused(claim: str, value: Any) -> None:
    assert (await refusal(Tokens(settings()), forge_claims(**{claim: value}))).startswith("Token verification failed: ")


# -- what is not a token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        "nonsense",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "..",
        f"{segment({'alg': 'HS256'})}.{segment(b'no json')}.{segment(b'')}",
        f"{segment({'alg': 'HS256'})}.{segment([1])}.{segment(b'')}",
        f"{segment([1])}.{segment({})}.{segment(b'')}",
        f"{segment(b'[' * 100_000)}.{segment({})}.{segment(b'')}",
        f"{segment({'alg': 'HS256'})}.{segment({})}.!!!",
        f"{segment({'alg': 'HS256', 'kid': 7})}.{segment({})}.{segment(b'')}",
        f"{segment({'alg': 'HS256', 'crit': ['exp']})}.{segment({})}.{segment(b'')}",
        "tokén.b.c",
        "\ud800.b.c",
        "Basic dXNlcjpwYXNz",
    ],
    ids=lambda token: token.encode("utf-8", "replace").decode()[:30],
)
async def test_what_is_no_token_does_not_decode(token: str) -> None:
    assert (await refusal(Tokens(settings()), token)).startswith("Token decode error:")


@pytest.mark.parametrize(
    "algorithm", ["none", "None", "NONE", "nOnE", "HS384", "HS512", "RS512", "ES256", "PS256", "x"]
)
@pytest.mark.parametrize("configured", ["HS256", "RS256", "EdDSA", "auto"])
async def test_other_algorithms_are_not_supported(algorithm: str, configured: str) -> None:
    verifier = Tokens(settings(configured))
    claims = {"role": "admin", "exp": int(time.time()) + 60}
    unsigned = f"{segment({'alg': algorithm})}.{segment(claims)}."

    assert await refusal(verifier, unsigned) == f"Unsupported algorithm: {algorithm}"
    assert await refusal(verifier, forge({"alg": algorithm}, claims)) == f"Unsupported algorithm: {algorithm}"


@pytest.mark.parametrize(
    "header", [{}, {"alg": None}, {"alg": 7}, {"alg": ["HS256"]}, {"alg": {"HS256": 1}}, {"alg": ""}]
)
async def test_a_header_without_an_algorithm_is_not_supported(header: Any) -> None:
    assert (await refusal(Tokens(settings()), forge(header, {}))).startswith("Unsupported algorithm: ")


async def test_an_algorithm_is_not_repeated_at_any_length() -> None:
    assert len(await refusal(Tokens(settings()), forge({"alg": "x" * 10_000}, {}))) < 100
    assert (await refusal(Tokens(settings()), forge({"alg": "\ud800"}, {}))).encode() == b"Unsupported algorithm: ?"


@pytest.mark.parametrize("configured", ["HS256", "RS256", "EdDSA"])
@pytest.mark.parametrize("used", ["HS256", "RS256", "EdDSA"])
async def test_another_algorithm_than_the_configured_one_is_refused(configured: str, used: str) -> None:
    if configured != used:
        error = await refusal(Tokens(settings(configured)), sign(used))
        assert error == f"Token uses {used}, expected {configured}"


# -- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "EdDSA"])
async def test_a_signature_of_another_key_is_invalid(algorithm: str) -> None:
    stranger = {"HS256": "another secret, as long as the first one", "RS256": OTHER_RSA}
    token = sign(algorithm, stranger.get(algorithm, Ed25519PrivateKey.generate()))

    assert await refusal(Tokens(settings(algorithm)), token) == "Invalid token signature"


async def test_a_changed_claim_breaks_the_signature() -> None:
    header, _, signature = sign(role="read-only").split(".")
    claims = segment({"sub": "alice", "role": "admin", "exp": int(time.time()) + 3600})

    assert await refusal(Tokens(settings()), f"{header}.{claims}.{signature}") == "Invalid token signature"
    assert await refusal(Tokens(settings()), f"{header}.{claims}.") == "Invalid token signature"


def encodings(key: Any) -> Iterator[bytes]:
    """Everything of a public key that somebody could take for a secret."""
    public = key.public_key()
    text = pem(key).encode()
    yield from (text, text.strip(), text.replace(b"\n", b"\\n"), text.replace(b"\n", b"\r\n"))
    yield public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if isinstance(key, RSAPrivateKey):
        yield public.public_bytes(Encoding.PEM, PublicFormat.PKCS1)
    else:
        yield public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    yield b""


@pytest.mark.parametrize(("configured", "key"), [("RS256", RSA), ("EdDSA", ED), ("auto", RSA)])
async def test_a_public_key_is_never_a_secret(configured: str, key: Any) -> None:
    verifier = Tokens(settings(configured))
    claims = {"sub": "mallory", "role": "admin", "exp": int(time.time()) + 60}

    for known in encodings(key):
        for algorithm in ("HS256", "RS256", "EdDSA", "HS512", "none"):
            assert await refusal(verifier, forge({"alg": algorithm, "typ": "JWT"}, claims, known))


@pytest.mark.parametrize(
    "header",
    [
        {"jwk": json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(OTHER_RSA.public_key()))},
        {"jku": "http://127.0.0.1:1/keys"},
        {"x5u": "http://127.0.0.1:1/certificate"},
        {"kid": "../../dev/null"},
    ],
    ids=["jwk", "jku", "x5u", "kid"],
)
async def test_a_token_does_not_bring_its_own_key(header: Any) -> None:
    token = sign("RS256", OTHER_RSA, headers=header, role="admin")

    assert await refusal(Tokens(settings("RS256")), token) == "Invalid token signature"


# -- roles and subjects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "level"),
    [
        ({"role": "admin"}, Level.ADMIN),
        ({"role": "read-write"}, Level.READ_WRITE),
        ({"role": "read-only"}, Level.READ_ONLY),
        ({"role": "Admin"}, Level.OPEN),
        ({"role": "admin "}, Level.OPEN),
        ({"role": ...}, Level.OPEN),
        ({"role": None}, Level.OPEN),
        ({"role": ["admin"]}, Level.OPEN),
        ({"role": ..., "roles": ["read-only", "admin"]}, Level.ADMIN),
        ({"role": "read-only", "roles": ["read-write"]}, Level.READ_WRITE),
        ({"role": "read-write", "roles": ["read-only"]}, Level.READ_WRITE),
        ({"role": ..., "roles": "admin"}, Level.OPEN),
        ({"role": ..., "roles": [7, None, ["admin"], {"admin": 1}]}, Level.OPEN),
        ({"role": "operator"}, Level.OPEN),
    ],
)
async def test_roles_of_both_claims_count(claims: dict[str, Any], level: Level) -> None:
    assert (await Tokens(settings()).verify(sign(**claims))).level is level


async def test_claims_and_roles_have_the_names_that_are_configured() -> None:
    named = settings(
        roles_claim="grant", roles_array_claim="grants", role_admin="root", role_read_write="rw", role_read_only="ro"
    )
    verifier = Tokens(named)

    assert (await verifier.verify(sign(role="admin", roles=["admin"]))).level is Level.OPEN
    assert (await verifier.verify(sign(grant="ro"))).level is Level.READ_ONLY
    assert (await verifier.verify(sign(grants=["rw"]))).level is Level.READ_WRITE
    assert (await verifier.verify(sign(grant="root"))).level is Level.ADMIN


@pytest.mark.parametrize("sub", [..., "", None, 7, True, [], {"name": "alice"}])
async def test_a_subject_that_is_no_text_is_none(sub: Any) -> None:
    claims = {} if sub is ... else {"sub": sub}

    assert (await Tokens(settings()).verify(forge_claims(**claims))).sub is None


async def test_a_subject_that_cannot_be_written_down_is_refused() -> None:
    token = forge_claims(sub="\ud800")

    assert (await refusal(Tokens(settings()), token)).startswith("Token verification failed: ")


# -- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What ``time.time`` says to the cache, and how often a signature was looked at, as [now, count]."""
    state = [time.time(), 0.0]
    monkeypatch.setattr("queen.auth.tokens.time.time", lambda: state[0])
    claims_of = Tokens._claims_of

    async def counted(self: Tokens, token: str) -> Any:
        state[1] += 1
        return await claims_of(self, token)

    monkeypatch.setattr(Tokens, "_claims_of", counted)
    return state


async def test_a_token_is_verified_once_a_minute(clock: list[float]) -> None:
    verifier, token = Tokens(settings()), sign()

    for _ in range(3):
        await verifier.verify(token)
    assert clock[1] == 1
    clock[0] += 59
    await verifier.verify(token)
    assert clock[1] == 1
    clock[0] += 2
    await verifier.verify(token)
    assert clock[1] == 2


async def test_a_token_is_not_remembered_past_its_expiry(clock: list[float]) -> None:
    verifier, token = Tokens(settings(clock_skew_seconds=0.0)), sign(exp=int(clock[0]) + 10)
    await verifier.verify(token)

    clock[0] += 9
    await verifier.verify(token)
    assert clock[1] == 1
    clock[0] += 2
    await verifier.verify(token)  # PyJWT has a clock of its own, for which it is still good
    assert clock[1] == 2


async def test_a_refused_token_is_not_remembered(clock: list[float]) -> None:
    verifier, token = Tokens(settings()), sign(key="another secret, as long as the first one")

    for _ in range(2):
        await refusal(verifier, token)
    assert clock[1] == 2


async def test_the_cache_is_bounded_and_forgets_what_is_not_used(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED", 3)
    verifier = Tokens(settings())
    first, *others = [sign(n=n) for n in range(5)]

    await verifier.verify(first)
    for other in others:
        await verifier.verify(other)
        await verifier.verify(first)
    assert clock[1] == 5
    await verifier.verify(others[0])
    assert clock[1] == 6
    assert len(verifier._verified) == 3


async def test_the_cache_holds_no_token() -> None:
    verifier, token = Tokens(settings()), sign()
    await verifier.verify(token)

    assert token not in repr(vars(verifier))
    assert hashlib.sha256(token.encode()).digest() in verifier._verified


# -- what cannot be started with ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (settings("RS256", public_key="no key"), "JWT_PUBLIC_KEY is not a public key in PEM form"),
        (settings("RS256", public_key=pem(ED)), "JWT_PUBLIC_KEY is a key for EdDSA, and JWT_ALGORITHM is RS256"),
        (settings("EdDSA", public_key=pem(RSA)), "JWT_PUBLIC_KEY is a key for RS256, and JWT_ALGORITHM is EdDSA"),
        (
            settings("auto", public_key=pem(generate_private_key(SECP256R1()))),
            "JWT_PUBLIC_KEY must be an RSA or an Ed25519 key",
        ),
        (settings("HS256", secret=Secret(pem(RSA))), "JWT_SECRET is a public key or a JWK"),
        (
            settings("HS256", secret=Secret(jwt.algorithms.RSAAlgorithm.to_jwk(RSA.public_key()))),
            "JWT_SECRET is a public key or a JWK",
        ),
    ],
)
def test_a_key_that_cannot_be_used_is_said_at_the_start(wrong: JwtSettings, sentence: str) -> None:
    with pytest.raises(StartupError) as raised:
        Tokens(wrong)

    assert raised.value.detail.startswith(sentence)
    assert "BEGIN" not in raised.value.detail.replace("-----BEGIN PUBLIC KEY-----", "")


async def test_a_short_secret_is_warned_of_once_and_taken() -> None:
    with structlog.testing.capture_logs() as logs:
        verifier = Tokens(settings(secret=Secret("short")))
        token = forge({"alg": "HS256"}, {"sub": "alice"}, b"short")
        assert (await verifier.verify(token)).sub == "alice"

    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "JWT_SECRET is short" in logs[0]["event"]


async def test_a_short_rsa_key_is_warned_of_and_taken() -> None:
    short = generate_rsa_key(65537, 1024)
    with structlog.testing.capture_logs() as logs:
        verifier = Tokens(settings("RS256", public_key=pem(short)))

    with pytest.warns(jwt.InsecureKeyLengthWarning):
        token = sign("RS256", short)
    assert (await verifier.verify(token)).sub == "alice"
    assert [entry["log_level"] for entry in logs] == ["warning"]


# -- who may pass -------------------------------------------------------------------------------------------------


def access(**others: Any) -> Access:
    chosen = settings(**others)
    return Access(chosen, Tokens(chosen))


@pytest.mark.parametrize("level", [Level.READ_ONLY, Level.READ_WRITE, Level.ADMIN])
@pytest.mark.parametrize("role", ["read-only", "read-write", "admin", "nobody"])
async def test_a_role_gives_its_level_and_those_below(level: Level, role: str) -> None:
    has = {"nobody": 0, "read-only": 1, "read-write": 2, "admin": 3}[role]

    if has >= level:
        assert await access().admit("/x", f"Bearer {sign(role=role)}", level) == "alice"
    else:
        with pytest.raises(Forbidden) as raised:
            await access().admit("/x", f"Bearer {sign(role=role)}", level)
        assert (raised.value.status, raised.value.detail) == (403, "Insufficient permissions")


@pytest.mark.parametrize("header", ["", " ", "Bearer", "Bearer ", "bearer   "])
async def test_without_a_token_nobody_passes(header: str) -> None:
    with pytest.raises(Unauthenticated) as raised:
        await access().admit("/x", header, Level.READ_ONLY)

    assert raised.value.detail == "Authentication required"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer a.b.c", "a.b.c"),
        ("bearer a.b.c", "a.b.c"),
        ("BEARER   a.b.c ", "a.b.c"),
        ("a.b.c", "a.b.c"),
        (" a.b.c ", "a.b.c"),
        ("Basic x", "Basic x"),
        ("Bearera.b.c", "Bearera.b.c"),
    ],
)
def test_the_scheme_may_be_in_any_case_or_missing(header: str, token: str) -> None:
    assert token_of(header) == token


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/health", True),
        ("/", True),
        ("/public/", True),
        ("/public/a/b", True),
        ("/public", False),
        ("/publicity", False),
        ("/health/", False),
        ("/healthy", False),
        ("/Health", False),
        ("//", False),
        ("/api/v1/push", False),
        ("", False),
    ],
)
async def test_open_paths_are_exact_and_those_with_a_slash_at_the_end_are_prefixes(path: str, is_open: bool) -> None:
    gate = access(skip_paths=("/health", "/", "/public/"))

    if is_open:
        assert await gate.admit(path, "", Level.ADMIN) is None
    else:
        with pytest.raises(Unauthenticated):
            await gate.admit(path, "", Level.READ_ONLY)


async def test_an_open_path_does_not_look_at_a_token() -> None:
    assert await access().admit("/health", "Bearer nonsense", Level.READ_ONLY) is None
    assert await access().admit("/livez", "Bearer nonsense", Level.OPEN) is None
