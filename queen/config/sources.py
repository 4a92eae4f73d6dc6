"""Where settings come from: defaults < environment < flags, read once at start; and how a worker is handed them.

The names and defaults of the environment are the wire contract's; what the values mean stands in settings.py.
An integer that cannot be read means the default, a boolean is true only as ``true``, an unknown variable is ignored.
"""

from __future__ import annotations

import os
import ssl
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec

from queen.config.database_url import is_port, locate_database
from queen.config.settings import CorsSettings, JwtSettings, PageSettings, Secret, Settings
from queen.errors import StartupError
from queen.model.queue import QueueOptions, asked_for

Parser = Callable[[str], Any]


class Unusable(ValueError):
    """A value that cannot be read; the default is taken in its place."""


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Unusable(text) from None


def _natural(text: str) -> int:
    value = _integer(text)
    if value < 0:
        raise Unusable(text)
    return value


def _positive(text: str) -> int:
    value = _integer(text)
    if value < 1:
        raise Unusable(text)
    return value


def _milliseconds(text: str) -> float:
    return _natural(text) / 1000


def _interval(text: str) -> float:
    return _positive(text) / 1000  # a loop with no pause is never what was meant


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Unusable(text) from None
    if not 0 <= value < 1e9:  # also refuses nan and inf
        raise Unusable(text)
    return value


def _limit_seconds(text: str) -> float:
    value = _seconds(text)
    if value < 1:  # shorter than two signs of life
        raise Unusable(text)
    return value


def _mebibytes(text: str) -> int:
    return _natural(text) * 1024 * 1024


def _boolean(text: str) -> bool:
    return text.strip().lower() == "true"


def _header(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise Unusable(text)
    return text


def _headers(text: str) -> tuple[str, ...]:
    return tuple(value for entry in _header(text).split(",") if (value := entry.strip()))


def _level(text: str) -> str:
    level = {"warning": "warn"}.get(text.strip().lower(), text.strip().lower())
    if level not in LOG_LEVELS:
        raise Unusable(text)
    return level


def _format(text: str) -> str:
    return "json" if text.strip().lower() == "json" else "console"


def _subscription_mode(text: str) -> str:
    if text not in ("", "all", "new", "new-only"):
        raise Unusable(text)
    return text


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody knows where this home is
        raise Unusable(text) from None


def _pem(text: str) -> str:
    return text.replace("\\n", "\n")  # how a variable of one line holds several


def _paths(text: str) -> tuple[str, ...]:
    return tuple(path for entry in text.split(",") if (path := entry.strip()))


def _encryption_key(text: str) -> Secret:
    if len(text) != 64 or not set(text) <= set(string.hexdigits):
        raise Unusable("QUEEN_ENCRYPTION_KEY is not 64 hexadecimal characters")
    return Secret(text)


def _encryption_keys(text: str) -> tuple[Secret, ...]:
    """Separated by commas; what stands before a colon is a name of the key, for people."""
    return tuple(_encryption_key(key.rpartition(":")[2]) for entry in text.split(",") if (key := entry.strip()))


_USELESS_KEYS: Final = {
    "QUEEN_ENCRYPTION_KEY": "QUEEN_ENCRYPTION_KEY is not 64 hexadecimal characters: encryption is off",
    "QUEEN_ENCRYPTION_KEYS": "QUEEN_ENCRYPTION_KEYS is not 64 hexadecimal characters a key: none of them is used",
}

NO_KEY: Final = "QUEEN_ENCRYPTION_KEY is not set: encryption is off, and a queue that asks for it refuses messages"
"""Said at start, where it is so."""

SERIOUS: Final = frozenset(_USELESS_KEYS.values())
"""Said of settings that no default can stand in for, and that the server starts without: errors, in the log."""

EVERYWHERE: Final = "0.0.0.0"
"""Where a server listens by itself once who may use it is settled; until then it is loopback."""

LOG_LEVELS: Final = ("debug", "info", "warn", "error")

# Environment name → field and parser. Of two names of one field the later row wins.
ENVIRONMENT: Final[dict[str, tuple[str, Parser]]] = {
    "HOST": ("host", str),
    "PORT": ("port", _integer),
    "NUM_WORKERS": ("workers", _integer),
    "QUEEN_WORKERS": ("workers", _integer),
    "WORKER_ID": ("worker_id", str),
    "QUEEN_INSECURE": ("insecure", _boolean),
    "QUEEN_TLS_CERT": ("tls_cert", _path),
    "QUEEN_TLS_KEY": ("tls_key", _path),
    "QUEEN_TLS_CLIENT_CA": ("tls_client_ca", _path),
    "QUEEN_CONTROL_SOCKET": ("control_socket", _path),
    "QUEEN_PIDFILE": ("pidfile", _path),
    "QUEEN_DATABASE_URL": ("database_url", Secret),
    "QUEEN_DATA_DIR": ("data_dir", _path),
    "DB_POOL_SIZE": ("db_pool_size", _positive),
    "DB_CONNECTION_TIMEOUT": ("db_connect_timeout_seconds", _interval),
    "DB_STATEMENT_TIMEOUT": ("db_statement_timeout_seconds", _milliseconds),
    "DB_LOCK_TIMEOUT": ("db_lock_timeout_seconds", _milliseconds),
    "QUEEN_DB_STATEMENT_CACHE": ("db_statement_cache", _boolean),
    "QUEEN_CACHE_BYTES": ("cache_bytes", _positive),
    "QUEEN_BUCKETS": ("buckets", _positive),
    "FILE_BUFFER_DIR": ("spool_dir", _path),
    "QUEEN_SPOOL_MAX_BYTES": ("spool_max_bytes", _positive),
    "FILE_BUFFER_FLUSH_MS": ("spool_interval_seconds", _interval),
    "FILE_BUFFER_MAX_BATCH": ("spool_batch", _positive),
    "MAX_BODY_SIZE": ("max_body_bytes", _positive),
    "QUEEN_FAST_HTTP": ("fast_http", _boolean),
    "DEFAULT_TIMEOUT": ("default_timeout_seconds", _milliseconds),
    "MAX_TIMEOUT": ("max_timeout_seconds", _milliseconds),
    "DEFAULT_BATCH_SIZE": ("default_batch", _positive),
    "DEFAULT_SUBSCRIPTION_MODE": ("default_subscription_mode", _subscription_mode),
    "QUEEN_ENCRYPTION_KEY": ("encryption_key", _encryption_key),
    "QUEEN_ENCRYPTION_KEYS": ("encryption_keys", _encryption_keys),
    "RETENTION_INTERVAL": ("retention_interval_seconds", _interval),
    "RETENTION_BATCH_SIZE": ("retention_batch", _positive),
    "EVICTION_INTERVAL": ("eviction_interval_seconds", _interval),
    "PARTITION_CLEANUP_DAYS": ("partition_cleanup_days", _natural),
    "QUEEN_DEAD_LETTER_DAYS": ("dead_letter_retention_days", _natural),
    "STATS_INTERVAL_MS": ("stats_interval_seconds", _interval),
    "STATS_HISTORY_RETENTION_DAYS": ("stats_retention_days", _positive),
    "METRICS_SAMPLE_INTERVAL_MS": ("metrics_sample_seconds", _interval),
    "METRICS_AGGREGATE_INTERVAL_S": ("metrics_aggregate_seconds", _positive),
    "METRICS_RETENTION_DAYS": ("metrics_retention_days", _positive),
    "QUEEN_GRACE_SECONDS": ("grace_seconds", _seconds),
    "QUEEN_HANG_SECONDS": ("hang_seconds", _limit_seconds),
    "QUEEN_SPARE": ("spare", _boolean),
    "QUEEN_MAX_WORKER_RSS_MB": ("max_worker_rss_bytes", _mebibytes),
    "QUEEN_MAX_WORKER_AGE_SECONDS": ("max_worker_age_seconds", _seconds),
    "LOG_LEVEL": ("log_level", _level),
    "LOG_FORMAT": ("log_format", _format),
    "LOG_TIMESTAMP": ("log_timestamp", _boolean),
    "WEBAPP_ROOT": ("webapp_root", _path),
    "HEALTH_CHECK_ENABLED": ("health_endpoint", _boolean),
    "METRICS_ENDPOINT_ENABLED": ("metrics_endpoint", _boolean),
}

CORS_ENVIRONMENT: Final[dict[str, tuple[str, Parser]]] = {
    "CORS_ALLOWED_ORIGINS": ("allowed_origins", _headers),
    "CORS_ALLOWED_METHODS": ("allowed_methods", _header),
    "CORS_ALLOWED_HEADERS": ("allowed_headers", _header),
    "CORS_MAX_AGE": ("max_age_seconds", _natural),
}

PAGE_ENVIRONMENT: Final[dict[str, tuple[str, Parser]]] = {
    "API_DEFAULT_LIMIT": ("default_limit", _positive),
    "API_MAX_LIMIT": ("max_limit", _positive),
    "API_DEFAULT_OFFSET": ("default_offset", _natural),
}

ALGORITHMS: Final = ("HS256", "RS256", "EdDSA", "auto")

JWT_ENVIRONMENT: Final[dict[str, tuple[str, Parser]]] = {
    "JWT_ENABLED": ("enabled", _boolean),
    "JWT_ALGORITHM": ("algorithm", str),
    "JWT_SECRET": ("secret", Secret),
    "JWT_PUBLIC_KEY": ("public_key", _pem),
    "JWT_JWKS_URL": ("jwks_url", Secret),
    "JWT_JWKS_REFRESH_INTERVAL": ("jwks_refresh_seconds", _positive),
    "JWT_JWKS_TIMEOUT_MS": ("jwks_timeout_seconds", _interval),
    "JWT_ISSUER": ("issuer", str),
    "JWT_AUDIENCE": ("audience", str),
    "JWT_CLOCK_SKEW": ("clock_skew_seconds", _natural),
    "JWT_SKIP_PATHS": ("skip_paths", _paths),
    "JWT_ROLES_CLAIM": ("roles_claim", str),
    "JWT_ROLES_ARRAY_CLAIM": ("roles_array_claim", str),
    "JWT_ROLE_ADMIN": ("role_admin", str),
    "JWT_ROLE_READ_WRITE": ("role_read_write", str),
    "JWT_ROLE_READ_ONLY": ("role_read_only", str),
}

QUEUE_ENVIRONMENT: Final[dict[str, tuple[str, Parser]]] = {
    "DEFAULT_LEASE_TIME": ("lease_seconds", _natural),
    "DEFAULT_RETRY_LIMIT": ("retry_limit", _natural),
    "DEFAULT_RETRY_DELAY": ("retry_delay_ms", _natural),
    "DEFAULT_MAX_SIZE": ("max_size", _natural),
    "DEFAULT_TTL": ("ttl_seconds", _natural),
    "DEFAULT_PRIORITY": ("priority", _integer),
    "DEFAULT_DELAYED_PROCESSING": ("delayed_processing_seconds", _natural),
    "DEFAULT_WINDOW_BUFFER": ("window_buffer_seconds", _natural),
    "DEFAULT_DLQ_ENABLED": ("dead_letter_queue", _boolean),
    "DEFAULT_DLQ_AFTER_MAX_RETRIES": ("dlq_after_max_retries", _boolean),
    "DEFAULT_RETENTION_SECONDS": ("retention_seconds", _natural),
    "DEFAULT_COMPLETED_RETENTION_SECONDS": ("completed_retention_seconds", _natural),
    "DEFAULT_RETENTION_ENABLED": ("retention_enabled", _boolean),
    "DEFAULT_MAX_WAIT_TIME_SECONDS": ("max_wait_time_seconds", _natural),
}

PG_NAMES: Final = ("PG_HOST", "PG_PORT", "PG_DB", "PG_USER", "PG_PASSWORD")


def load_settings(
    environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> tuple[Settings, list[str]]:
    """Settings from the environment (``os.environ`` unless given) and from flags; and what to tell the operator.

    Args:
        flags: field name → value; None is a flag that was not given. Flags win over the environment.

    Returns:
        The settings, and one sentence for each value that was set but cannot be honoured.

    Raises:
        StartupError: a value that no default can stand in for, such as a port out of range.
    """
    environ = os.environ if environ is None else environ
    notes: list[str] = []
    values = _read(environ, ENVIRONMENT, notes)
    options = _read(environ, QUEUE_ENVIRONMENT, notes)
    jwt = JwtSettings(**_read(environ, JWT_ENVIRONMENT, notes))
    cors = CorsSettings(**_read(environ, CORS_ENVIRONMENT, notes))
    pages = PageSettings(**_read(environ, PAGE_ENVIRONMENT, notes))
    if environ.get("ENABLE_LOGGING") and not _boolean(environ["ENABLE_LOGGING"]):
        values["log_level"] = "error"  # as near to silence as is wise
    if "database_url" not in values and any(environ.get(name) for name in PG_NAMES):
        port = environ.get("PG_PORT", "")
        if port and not is_port(port):
            notes.append("PG_PORT cannot be read: its default is used")
            environ = {**environ, "PG_PORT": ""}
        values["database_url"] = Secret(postgres_url(environ))
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    if "data_dir" in given and "database_url" not in given:
        values.pop("database_url", None)  # asked for on the command line: the embedded PostgreSQL, whatever PG_* says
    if "webapp_root" in values and not values["webapp_root"].is_dir():
        notes.append("WEBAPP_ROOT is no directory: no dashboard is served")
    if not jwt.enabled and _means_jwt(environ, jwt):
        notes.append("authentication is off: JWT_ENABLED is not true")
    values |= given
    if "host" not in values and (jwt.enabled or values.get("insecure")):
        values["host"] = EVERYWHERE
    # the default itself asks for nothing: environments of the reference spell its defaults out
    asked = {field: value for field, value in options.items() if value != getattr(QueueOptions(), field)}
    settings = Settings(queue_defaults=asked_for(QueueOptions(), asked), jwt=jwt, cors=cors, pages=pages, **values)
    _check(settings)
    return settings, notes


def _means_jwt(environ: Mapping[str, str], jwt: JwtSettings) -> bool:
    """Whether somebody may believe that authentication is on."""
    switch = environ.get("JWT_ENABLED", "").strip().lower()
    return switch != "false" and bool(switch or jwt.secret or jwt.public_key or jwt.jwks_url)


def _read(environ: Mapping[str, str], names: Mapping[str, tuple[str, Parser]], notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, (field, parse) in names.items():
        text = environ.get(name, "")
        if not text:
            continue  # set but empty is how shells and compose files say "not set"
        try:
            values[field] = parse(text)
        except Unusable:
            # The value stays out of the sentence: it may be a secret in the wrong place.
            notes.append(_USELESS_KEYS.get(name, f"{name} cannot be read: its default is used"))
    return values


def _check(settings: Settings) -> None:
    if settings.jwt.enabled:
        _check_jwt(settings.jwt)
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise StartupError("QUEEN_TLS_CERT and QUEEN_TLS_KEY go together: set both, or neither")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise StartupError(
            "QUEEN_TLS_CLIENT_CA asks clients for certificates: set QUEEN_TLS_CERT and QUEEN_TLS_KEY too"
        )
    if not 0 <= settings.port <= 65535:
        raise StartupError(f"port {settings.port} does not exist: give one from 1 to 65535, or 0 for any free one")
    if not 1 <= settings.workers <= 1024:
        raise StartupError(f"{settings.workers} workers cannot be run: give a number from 1 to 1024")
    if settings.database_url is not None:
        locate_database(settings.database_url.reveal())


def _check_jwt(jwt: JwtSettings) -> None:
    """Authentication that could let nobody in, or that is not what was meant, must not be served with."""
    if jwt.algorithm not in ALGORITHMS:
        raise StartupError(f"JWT_ALGORITHM is {jwt.algorithm!r}: give one of {', '.join(ALGORITHMS)}")
    has_public = jwt.public_key is not None or jwt.jwks_url is not None
    if jwt.algorithm == "HS256" and not jwt.secret:
        raise StartupError(
            "JWT_ENABLED is true and JWT_ALGORITHM is HS256: set JWT_SECRET, which tokens are signed with"
        )
    if jwt.algorithm in ("RS256", "EdDSA") and not has_public:
        raise StartupError(
            f"JWT_ENABLED is true and JWT_ALGORITHM is {jwt.algorithm}: set JWT_PUBLIC_KEY or JWT_JWKS_URL"
        )
    if jwt.algorithm == "auto" and not (jwt.secret or has_public):
        raise StartupError("JWT_ENABLED is true: set JWT_SECRET, JWT_PUBLIC_KEY or JWT_JWKS_URL to verify tokens with")
    if jwt.jwks_url is not None and jwt.jwks_url.reveal().partition("://")[0] not in ("https", "http"):
        raise StartupError("JWT_JWKS_URL must begin with https:// or http://")


def postgres_url(environ: Mapping[str, str]) -> str:
    """The URL that PG_HOST, PG_PORT, PG_DB, PG_USER, PG_PASSWORD and PG_USE_SSL describe, with their defaults."""

    def part(name: str, default: str) -> str:
        return quote(environ.get(name) or default, safe="")

    host, port = environ.get("PG_HOST") or "localhost", environ.get("PG_PORT") or "5432"
    query: dict[str, str] = {}
    if host.startswith("/"):  # a directory with a unix socket
        query = {"host": host, "port": port}
        location = ""
    else:
        location = f"{'[' + host + ']' if ':' in host else host}:{port}"
    if _boolean(environ.get("PG_USE_SSL", "")):
        if environ.get("PG_SSL_REJECT_UNAUTHORIZED", "true").strip().lower() == "true":
            query["sslmode"] = "verify-full"
            authorities = ssl.get_default_verify_paths().cafile
            if authorities is not None:
                query["sslrootcert"] = authorities
        else:
            query["sslmode"] = "require"
    who = f"{part('PG_USER', 'postgres')}:{part('PG_PASSWORD', 'postgres')}"
    url = f"postgresql://{who}@{location}/{part('PG_DB', 'postgres')}"
    return f"{url}?{urlencode(query)}" if query else url


def encode_settings(settings: Settings) -> bytes:
    """One line of JSON with the secrets in clear: for the private channel to a worker, never for a log or argv."""
    return msgspec.json.encode(settings, enc_hook=_encode_hook)


def decode_settings(line: bytes | msgspec.Raw) -> Settings:
    """The inverse of ``encode_settings``."""
    return msgspec.json.decode(line, type=Settings, dec_hook=_decode_hook)


def _encode_hook(value: object) -> object:
    if isinstance(value, Secret):
        return value.reveal()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"settings hold no {type(value).__name__}")


def _decode_hook(wanted: type, value: object) -> object:
    if wanted in (Secret, Path) and isinstance(value, str):
        return wanted(value)
    raise NotImplementedError(f"settings hold no {wanted.__name__}")
