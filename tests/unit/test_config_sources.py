"""Settings from the environment and from flags."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from queen.config.settings import Secret, Settings
from queen.config.sources import ENVIRONMENT, QUEUE_ENVIRONMENT, decode_settings, encode_settings, load_settings
from queen.errors import StartupError
from queen.model.queue import QueueOptions


def test_without_anything_set_the_server_is_open_to_this_machine_only() -> None:
    settings, notes = load_settings({})

    assert (settings.host, settings.port) == ("127.0.0.1", 6632)
    assert settings.database_url is None
    assert settings.queue_defaults == QueueOptions()
    assert notes == []


def test_flags_win_over_the_environment_and_flags_not_given_do_not() -> None:
    settings, _ = load_settings({"PORT": "7000", "HOST": "0.0.0.0"}, {"port": 8000, "host": None})

    assert settings.port == 8000
    assert settings.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("environment", "field", "value"),
    [
        ({"NUM_WORKERS": "3"}, "workers", 3),
        ({"NUM_WORKERS": "3", "QUEEN_WORKERS": "5"}, "workers", 5),
        ({"MAX_BODY_SIZE": "1000"}, "max_body_bytes", 1000),
        ({"DEFAULT_TIMEOUT": "2500"}, "default_timeout_seconds", 2.5),
        ({"MAX_TIMEOUT": "60000"}, "max_timeout_seconds", 60.0),
        ({}, "max_timeout_seconds", None),
        ({"RETENTION_INTERVAL": "2000"}, "retention_interval_seconds", 2.0),
        ({"DB_STATEMENT_TIMEOUT": "0"}, "db_statement_timeout_seconds", 0.0),
        ({"QUEEN_DB_STATEMENT_CACHE": "off"}, "db_statement_cache", False),
        ({"LOG_LEVEL": "WARNING"}, "log_level", "warn"),
        ({"LOG_FORMAT": "json"}, "log_format", "json"),
        ({"LOG_FORMAT": "pretty"}, "log_format", "console"),
        ({"QUEEN_INSECURE": "true"}, "insecure", True),
        ({"QUEEN_INSECURE": "yes"}, "insecure", False),
        ({"PORT": ""}, "port", 6632),
    ],
)
def test_a_variable_sets_its_field(environment: dict[str, str], field: str, value: object) -> None:
    settings, notes = load_settings(environment)

    assert getattr(settings, field) == value
    assert notes == []


@pytest.mark.parametrize(
    "environment",
    [{"PORT": "abc"}, {"DEFAULT_BATCH_SIZE": "0"}, {"RETENTION_INTERVAL": "0"}, {"LOG_LEVEL": "loud"}, {"PORT": "1e3"}],
)
def test_a_value_that_cannot_be_read_means_the_default_and_is_said(environment: dict[str, str]) -> None:
    settings, notes = load_settings(environment)

    assert settings == Settings()
    assert notes == [f"{next(iter(environment))} cannot be read: its default is used"]


def test_unknown_variables_are_ignored() -> None:
    assert load_settings({"QUEEN_VEGAS_ALPHA": "7", "SIDECAR_POOL": "x"}) == (Settings(), [])


def test_zero_is_a_value_of_a_queue_default() -> None:
    settings, _ = load_settings(
        {"DEFAULT_RETRY_LIMIT": "0", "DEFAULT_LEASE_TIME": "0", "DEFAULT_RETENTION_ENABLED": "true"}
    )

    assert settings.queue_defaults == QueueOptions(retry_limit=0, lease_seconds=0, retention_enabled=True)


@pytest.mark.parametrize("key", ["abc", "g" * 64, "a" * 63])
def test_an_encryption_key_that_is_none_turns_encryption_off_without_showing_it(key: str) -> None:
    settings, notes = load_settings({"QUEEN_ENCRYPTION_KEY": key})

    assert settings.encryption_key is None
    assert notes == ["QUEEN_ENCRYPTION_KEY is not 64 hexadecimal characters: encryption is off"]


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({"PG_HOST": "db"}, "postgresql://postgres:postgres@db:5432/postgres"),
        ({"PG_DB": "queen"}, "postgresql://postgres:postgres@localhost:5432/queen"),
        (
            {"PG_HOST": "db", "PG_PORT": "6000", "PG_USER": "me@home", "PG_PASSWORD": "a/b:c", "PG_DB": "q"},
            "postgresql://me%40home:a%2Fb%3Ac@db:6000/q",
        ),
        (
            {"PG_HOST": "/run/pg"},
            "postgresql://postgres:postgres@/postgres?host=%2Frun%2Fpg&port=5432",
        ),
        ({"PG_HOST": "::1"}, "postgresql://postgres:postgres@[::1]:5432/postgres"),
        (
            {"PG_HOST": "db", "PG_USE_SSL": "true", "PG_SSL_REJECT_UNAUTHORIZED": "false"},
            "postgresql://postgres:postgres@db:5432/postgres?sslmode=require",
        ),
        ({"PG_HOST": "db", "QUEEN_DATABASE_URL": "postgresql://x/y"}, "postgresql://x/y"),
    ],
)
def test_the_database_that_the_environment_names(environment: dict[str, str], url: str) -> None:
    settings, _ = load_settings(environment)

    assert settings.database_url == Secret(url)


def test_a_port_of_the_database_that_cannot_be_read() -> None:
    settings, notes = load_settings({"PG_HOST": "db", "PG_PORT": "five"})

    assert settings.database_url == Secret("postgresql://postgres:postgres@db:5432/postgres")
    assert notes == ["PG_PORT cannot be read: its default is used"]


def test_a_certificate_is_checked_unless_told_not_to() -> None:
    settings, _ = load_settings({"PG_HOST": "db", "PG_USE_SSL": "true"})

    assert settings.database_url is not None
    assert "sslmode=verify-full" in settings.database_url.reveal()


def test_a_data_directory_asked_for_by_flag_wins_over_a_database_of_the_environment() -> None:
    settings, _ = load_settings({"PG_HOST": "db"}, {"data_dir": "/data"})

    assert settings.database_url is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"port": -1}, "port -1 does not exist"),
        ({"workers": 0}, "0 workers cannot be run"),
        ({"database_url": Secret("here")}, "must begin with postgresql://"),
        ({"database_url": Secret("postgresql://me:pw@db:abc/q")}, "the database URL cannot be read"),
        ({"database_url": Secret("postgresql://me:pw@db:99999/q")}, "the database URL cannot be read"),
        ({"database_url": Secret("postgresql://me:p/w@db/q")}, "the database URL cannot be read"),
        ({"database_url": Secret("postgresql://[::1/q")}, "the database URL cannot be read"),
    ],
)
def test_what_no_default_can_stand_in_for_stops_the_start(flags: dict[str, object], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        load_settings({}, flags)


def test_settings_survive_the_way_to_a_worker() -> None:
    settings, _ = load_settings(
        {
            "QUEEN_DATABASE_URL": "postgresql://me:pässword@db/q",
            "QUEEN_DATA_DIR": "/data",
            "QUEEN_ENCRYPTION_KEY": "ab" * 32,
            "DEFAULT_RETRY_LIMIT": "0",
        }
    )

    line = encode_settings(settings)

    assert b"\n" not in line
    assert decode_settings(msgspec.Raw(line)) == settings


def test_no_secret_shows_when_settings_are_printed() -> None:
    settings, _ = load_settings(
        {"QUEEN_DATABASE_URL": "postgresql://me:sesame@db/q", "QUEEN_ENCRYPTION_KEY": "ab" * 32}
    )

    assert "sesame" not in repr(settings)
    assert "abab" not in repr(settings)


def test_each_variable_names_a_field_that_exists() -> None:
    assert {field for field, _ in ENVIRONMENT.values()} <= set(Settings.__struct_fields__)
    assert {field for field, _ in QUEUE_ENVIRONMENT.values()} <= set(QueueOptions.__struct_fields__)


def test_a_ttl_or_retry_delay_of_the_environment_is_enforced_unless_it_is_the_default() -> None:
    spelled_out = load_settings({"DEFAULT_TTL": "3600", "DEFAULT_RETRY_DELAY": "1000"})[0].queue_defaults
    asked = load_settings({"DEFAULT_TTL": "60", "DEFAULT_RETRY_DELAY": "0"})[0].queue_defaults

    assert spelled_out == QueueOptions()
    assert (asked.ttl_seconds, asked.ttl_enforced) == (60, True)
    assert (asked.retry_delay_ms, asked.retry_delay_enforced) == (0, True)


def test_old_encryption_keys_are_a_list_with_names_or_without() -> None:
    settings, notes = load_settings({"QUEEN_ENCRYPTION_KEYS": f"{'11' * 32}, 2025:{'22' * 32},"})

    assert settings.encryption_keys == (Secret("11" * 32), Secret("22" * 32))
    assert notes == []
    assert decode_settings(encode_settings(settings)) == settings


@pytest.mark.parametrize("text", ["11", "x" * 64, f"{'11' * 32},22", "2025:"])
def test_a_list_of_old_encryption_keys_that_is_none_is_told_without_its_text(text: str) -> None:
    settings, notes = load_settings({"QUEEN_ENCRYPTION_KEYS": text})

    assert settings.encryption_keys == ()
    assert len(notes) == 1
    assert "QUEEN_ENCRYPTION_KEYS" in notes[0]
    assert text not in notes[0]


def test_logging_that_is_switched_off_still_tells_of_errors() -> None:
    assert load_settings({"ENABLE_LOGGING": "false", "LOG_LEVEL": "debug"})[0].log_level == "error"
    assert load_settings({"ENABLE_LOGGING": "true", "LOG_LEVEL": "debug"})[0].log_level == "debug"


def test_origins_and_page_lengths_are_read() -> None:
    settings, notes = load_settings(
        {"CORS_ALLOWED_ORIGINS": "https://a.test, https://b.test,", "CORS_MAX_AGE": "7", "API_MAX_LIMIT": "5"}
    )

    assert settings.cors.allowed_origins == ("https://a.test", "https://b.test")
    assert (settings.cors.max_age_seconds, settings.pages.max_limit, notes) == (7, 5, [])


def test_a_header_that_would_be_two_is_not_sent() -> None:
    settings, notes = load_settings({"CORS_ALLOWED_HEADERS": "X-A\r\nSet-Cookie: a=b"})

    assert settings.cors.allowed_headers == Settings().cors.allowed_headers
    assert notes == ["CORS_ALLOWED_HEADERS cannot be read: its default is used"]


def test_a_dashboard_that_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "index.html").touch()

    assert load_settings({"WEBAPP_ROOT": str(tmp_path)})[1] == []
    assert load_settings({"WEBAPP_ROOT": str(tmp_path / "index.html")})[1] == [
        "WEBAPP_ROOT is no directory: no dashboard is served"
    ]
