"""Verifies tokens: signature, times, issuer, audience; then who it is of and what they may do.

Signatures and claims are PyJWT's work. What is decided here is which key a token may be verified with. Keys are held
by algorithm, as what they are: no public key can be mistaken for a secret, whatever a token says of itself.

    Authorization ──► cache ──► header: alg, kid ──► key ──► signature ──► exp, nbf, iat, iss, aud ──► Principal
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.algorithms import HMACAlgorithm, RSAAlgorithm

from queen.auth.keys import RemoteKeys
from queen.auth.levels import Level
from queen.config.settings import JwtSettings
from queen.errors import StartupError, Unauthenticated

Key = bytes | RSAPublicKey | Ed25519PublicKey

HS256: Final = "HS256"
RS256: Final = "RS256"
EDDSA: Final = "EdDSA"
ALGORITHMS: Final = (HS256, RS256, EDDSA)

CACHE_SECONDS: Final = 60.0
"""How long a verified token is not verified again. It bounds how long a token outlives a key that was taken back."""

MAX_CACHED: Final = 10_000
"""Verified tokens kept, about 300 bytes each; of more, those used least recently are verified again."""

MIN_SECRET_BYTES: Final = 32
"""RFC 7518 §3.2; shorter ones are taken, since clients of the reference use them, and warned of."""

MIN_RSA_BITS: Final = 2048

_SHOWN: Final = 64
"""Characters of an algorithm or a key id that are repeated to a client that sent it."""

log = structlog.get_logger("queen.auth")


class Principal(NamedTuple):
    """Whom a token is of: ``sub`` None when it does not say; ``level`` OPEN when it has no role of ours."""

    sub: str | None
    level: Level


class _Hmac(HMACAlgorithm):
    """HMAC with a secret that was examined at the start: not again for each token, which costs as much as the HMAC."""

    def prepare_key(self, key: Any) -> bytes:
        if not isinstance(key, bytes):
            raise TypeError("only a secret can be an HMAC key")
        return key

    def check_key_length(self, key: bytes) -> str | None:
        return None


class _Rsa(RSAAlgorithm):
    def check_key_length(self, key: Any) -> str | None:
        return None  # said once, at the start


def _signatures() -> jwt.PyJWS:
    signatures = jwt.PyJWS(algorithms=[EDDSA])
    signatures.register_algorithm(HS256, _Hmac(HMACAlgorithm.SHA256))
    signatures.register_algorithm(RS256, _Rsa(RSAAlgorithm.SHA256))
    return signatures


class Tokens:
    """Verifies tokens by the settings.

    Args:
        remote: the keys of the JWKS endpoint, if there is one.

    Raises:
        StartupError: a key that is configured cannot be used.
    """

    def __init__(self, settings: JwtSettings, remote: RemoteKeys | None = None) -> None:
        self._settings = settings
        self._remote = remote
        self._keys = _configured_keys(settings)
        self._allowed = self._allowed_algorithms()
        self._signatures = _signatures()
        self._claims_options: Any = {
            "verify_signature": False,  # done before, with the key chosen here
            "verify_exp": True,
            "verify_nbf": True,
            "verify_iat": True,
            "verify_iss": settings.issuer is not None,
            "verify_aud": settings.audience is not None,
            "verify_sub": False,  # a subject that is no text is none
            "verify_jti": False,
        }
        self._verified: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()

    def _allowed_algorithms(self) -> tuple[str, ...]:
        if self._settings.algorithm != "auto":
            return (self._settings.algorithm,)
        return tuple(
            algorithm
            for algorithm in ALGORITHMS
            if algorithm in self._keys or (self._remote is not None and algorithm != HS256)
        )

    async def verify(self, token: str) -> Principal:
        """Whom a token is of.

        Raises:
            Unauthenticated: it is not valid, or not for us; the sentence is the contract's.
            KeysUnavailable: the keys to verify it with could not be fetched.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found = self._verified.get(digest)
        now = time.time()
        if found is not None and now < found[0]:
            self._verified.move_to_end(digest)
            return found[1]
        claims = await self._claims_of(token)
        principal = Principal(_subject(claims), self._level(claims))
        until = now + CACHE_SECONDS
        if "exp" in claims:
            until = min(until, int(claims["exp"]) + self._settings.clock_skew_seconds)
        self._verified[digest] = (until, principal)
        self._verified.move_to_end(digest)
        if len(self._verified) > MAX_CACHED:
            self._verified.popitem(last=False)
        return principal

    async def _claims_of(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.decode_complete(token, options={"verify_signature": False})["header"]
        except (jwt.InvalidTokenError, UnicodeError) as error:
            raise Unauthenticated(f"Token decode error: {error}") from None
        algorithm = header.get("alg")
        if algorithm not in ALGORITHMS:
            raise Unauthenticated(f"Unsupported algorithm: {_shown(algorithm)}")
        if algorithm not in self._allowed:
            raise Unauthenticated(f"Token uses {algorithm}, expected {' or '.join(self._allowed)}")
        key = await self._key(algorithm, header.get("kid"))
        try:
            self._signatures.decode_complete(token, key, algorithms=[algorithm])
        except jwt.InvalidSignatureError:
            raise Unauthenticated("Invalid token signature") from None
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"Token decode error: {error}") from None
        return self._checked_claims(token)

    async def _key(self, algorithm: str, kid: str | None) -> Key:
        own = self._keys.get(algorithm)
        if algorithm == HS256 or self._remote is None or (own is not None and kid is None):
            assert own is not None, "the settings were checked"
            return own
        found: Key = await self._remote.find(algorithm, kid, otherwise=own)
        return found

    def _checked_claims(self, token: str) -> Mapping[str, Any]:
        settings = self._settings
        try:
            return jwt.decode(
                token,
                options=self._claims_options,
                issuer=settings.issuer,
                audience=settings.audience,
                leeway=settings.clock_skew_seconds,
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("Token has expired") from None
        except jwt.InvalidIssuerError:
            raise Unauthenticated("Invalid token issuer") from None
        except jwt.InvalidAudienceError:
            raise Unauthenticated("Invalid token audience") from None
        except jwt.MissingRequiredClaimError as error:
            what = "issuer" if error.claim == "iss" else "audience"
            raise Unauthenticated(f"Invalid token {what}") from None
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"Token verification failed: {error}") from None

    def _level(self, claims: Mapping[str, Any]) -> Level:
        settings = self._settings
        one, many = claims.get(settings.roles_claim), claims.get(settings.roles_array_claim)
        roles = [one] if isinstance(one, str) else []
        if isinstance(many, list):
            roles += [role for role in many if isinstance(role, str)]
        if settings.role_admin in roles:
            return Level.ADMIN
        if settings.role_read_write in roles:
            return Level.READ_WRITE
        if settings.role_read_only in roles:
            return Level.READ_ONLY
        return Level.OPEN


def _subject(claims: Mapping[str, Any]) -> str | None:
    sub = claims.get("sub")
    if not isinstance(sub, str) or not sub:
        return None
    try:
        sub.encode()
    except UnicodeEncodeError:  # half a surrogate pair: it cannot be written down, and must not count as somebody else
        raise Unauthenticated("Token verification failed: sub is not Unicode text") from None
    return sub


def _shown(value: object) -> str:
    """What a client sent, fit to be sent back: short, and text."""
    text = value if isinstance(value, str) else "none" if value is None else type(value).__name__
    return text[:_SHOWN].encode(errors="replace").decode()


def _configured_keys(settings: JwtSettings) -> dict[str, Key]:
    """The keys in the settings, by the one algorithm each is for."""
    keys: dict[str, Key] = {}
    if settings.secret and settings.algorithm in (HS256, "auto"):
        keys[HS256] = _secret(settings.secret.reveal().encode())
    if settings.public_key and settings.algorithm != HS256:
        key = _public_key(settings.public_key)
        algorithm = RS256 if isinstance(key, RSAPublicKey) else EDDSA
        if settings.algorithm not in (algorithm, "auto"):
            raise StartupError(f"JWT_PUBLIC_KEY is a key for {algorithm}, and JWT_ALGORITHM is {settings.algorithm}")
        keys[algorithm] = key
    return keys


def _secret(secret: bytes) -> bytes:
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise StartupError("JWT_SECRET is a public key or a JWK: anybody could sign with it; give a secret") from None
    if len(secret) < MIN_SECRET_BYTES:
        log.warning("JWT_SECRET is short: tokens can be forged by guessing it", recommended_bytes=MIN_SECRET_BYTES)
    return secret


def _public_key(pem: str) -> RSAPublicKey | Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem.encode())
    except ValueError:
        raise StartupError("JWT_PUBLIC_KEY is not a public key in PEM form (-----BEGIN PUBLIC KEY-----)") from None
    if isinstance(key, RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            log.warning("the RSA key in JWT_PUBLIC_KEY is short", bits=key.key_size, recommended_bits=MIN_RSA_BITS)
        return key
    if isinstance(key, Ed25519PublicKey):
        return key
    raise StartupError("JWT_PUBLIC_KEY must be an RSA or an Ed25519 key")
