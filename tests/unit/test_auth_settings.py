"""What the environment says about authentication, and what a server will not start with."""

from __future__ import annotations

import logging

import pytest
import structlog

from queen.cli.run import say_who_may_enter
from queen.config.settings import JwtSettings, Secret, Settings
from queen.config.sources import decode_settings, encode_settings, load_settings
from queen.errors import StartupError

ON = {"JWT_ENABLED": "true", "JWT_SECRET": "a secret"}


def test_every_variable_has_its_field() -> None:
    settings, notes = load_settings(
        {
            "JWT_ENABLED": "true",
            "JWT_ALGORITHM": "auto",
            "JWT_SECRET": "a secret",
            "JWT_PUBLIC_KEY": "-----BEGIN PUBLIC KEY-----\\nMCow\\n-----END PUBLIC KEY-----",
            "JWT_JWKS_URL": "https://id.example/keys",
            "JWT_JWKS_REFRESH_INTERVAL": "60",
            "JWT_JWKS_TIMEOUT_MS": "2500",
            "JWT_ISSUER": "us",
            "JWT_AUDIENCE": "queen",
            "JWT_CLOCK_SKEW": "0",
            "JWT_SKIP_PATHS": "/health, /public/,/",
            "JWT_ROLES_CLAIM": "grant",
            "JWT_ROLES_ARRAY_CLAIM": "grants",
            "JWT_ROLE_ADMIN": "root",
            "JWT_ROLE_READ_WRITE": "rw",
            "JWT_ROLE_READ_ONLY": "ro",
        }
    )

    assert notes == []
    assert settings.jwt == JwtSettings(
        enabled=True,
        algorithm="auto",
        secret=Secret("a secret"),
        public_key="-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----",
        jwks_url=Secret("https://id.example/keys"),
        jwks_refresh_seconds=60,
        jwks_timeout_seconds=2.5,
        issuer="us",
        audience="queen",
        clock_skew_seconds=0,
        skip_paths=("/health", "/public/", "/"),
        roles_claim="grant",
        roles_array_claim="grants",
        role_admin="root",
        role_read_write="rw",
        role_read_only="ro",
    )
    assert decode_settings(encode_settings(settings)) == settings


def test_no_path_can_be_left_open() -> None:
    settings, _ = load_settings(ON | {"JWT_SKIP_PATHS": ","})

    assert settings.jwt.skip_paths == ()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "JWT_ENABLED is true and JWT_ALGORITHM is HS256: set JWT_SECRET"),
        ({"JWT_PUBLIC_KEY": "x"}, "JWT_ENABLED is true and JWT_ALGORITHM is HS256: set JWT_SECRET"),
        ({"JWT_ALGORITHM": "RS256", "JWT_SECRET": "x"}, "set JWT_PUBLIC_KEY or JWT_JWKS_URL"),
        ({"JWT_ALGORITHM": "EdDSA"}, "set JWT_PUBLIC_KEY or JWT_JWKS_URL"),
        ({"JWT_ALGORITHM": "auto"}, "set JWT_SECRET, JWT_PUBLIC_KEY or JWT_JWKS_URL"),
        (
            {"JWT_ALGORITHM": "none", "JWT_SECRET": "x"},
            "JWT_ALGORITHM is 'none': give one of HS256, RS256, EdDSA, auto",
        ),
        ({"JWT_ALGORITHM": "RS256", "JWT_JWKS_URL": "id.example"}, "JWT_JWKS_URL must begin with https:// or http://"),
    ],
)
def test_authentication_that_cannot_work_is_refused(environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(StartupError) as raised:
        load_settings({"JWT_ENABLED": "true"} | environment)

    assert sentence in raised.value.detail


def test_what_is_wrong_with_it_does_not_matter_while_it_is_off() -> None:
    settings, notes = load_settings({"JWT_ENABLED": "false", "JWT_ALGORITHM": "none", "JWT_SECRET": "x"})

    assert settings.jwt.enabled is False
    assert notes == []


@pytest.mark.parametrize(
    "environment", [{"JWT_ENABLED": "1"}, {"JWT_ENABLED": "yes"}, {"JWT_SECRET": "x"}, {"JWT_JWKS_URL": "http://x"}]
)
def test_who_may_believe_that_it_is_on_is_told_that_it_is_not(environment: dict[str, str]) -> None:
    settings, notes = load_settings(environment)

    assert settings.jwt.enabled is False
    assert notes == ["authentication is off: JWT_ENABLED is not true"]


@pytest.mark.parametrize(
    ("environment", "flags", "host"),
    [
        ({}, {}, "127.0.0.1"),
        ({"QUEEN_INSECURE": "true"}, {}, "0.0.0.0"),
        ({}, {"insecure": True}, "0.0.0.0"),
        (ON, {}, "0.0.0.0"),
        (ON | {"HOST": "10.0.0.1"}, {}, "10.0.0.1"),
        (ON, {"host": "127.0.0.1"}, "127.0.0.1"),
        ({"HOST": "0.0.0.0"}, {}, "0.0.0.0"),
        ({"HOST": "127.0.0.1"}, {"insecure": True}, "127.0.0.1"),
        ({"JWT_ENABLED": "1"}, {}, "127.0.0.1"),
    ],
)
def test_a_server_is_open_to_others_when_that_is_settled(
    environment: dict[str, str], flags: dict[str, object], host: str
) -> None:
    assert load_settings(environment, flags)[0].host == host


@pytest.mark.parametrize(
    ("settings", "level", "words"),
    [
        (Settings(), logging.INFO, "only this machine can reach the port: no authentication is set up"),
        (Settings(host="localhost"), logging.INFO, "only this machine can reach the port"),
        (Settings(host="0.0.0.0"), logging.WARNING, "anyone who can reach this port"),
        (Settings(host="0.0.0.0", insecure=True), None, ""),
        (Settings(host="0.0.0.0", jwt=JwtSettings(enabled=True)), logging.INFO, "authentication is on"),
    ],
)
def test_it_says_who_may_enter(settings: Settings, level: int | None, words: str) -> None:
    with structlog.testing.capture_logs() as logs:
        say_who_may_enter(settings)

    assert [logging.getLevelName(entry["log_level"].upper()) for entry in logs] == ([] if level is None else [level])
    assert "".join(entry["event"] for entry in logs).startswith(words)
