"""The reference pages say what the code does: every setting with its true default, every error code, every route."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from queen import errors
from queen.config.settings import Settings
from queen.config.sources import (
    CORS_ENVIRONMENT,
    ENVIRONMENT,
    JWT_ENVIRONMENT,
    PAGE_ENVIRONMENT,
    PG_NAMES,
    QUEUE_ENVIRONMENT,
    load_settings,
    postgres_url,
)
from queen.routes import ROUTES

ROOT: Final = Path(__file__).parents[2]
REFERENCE: Final = ROOT / "docs" / "reference"

COMPUTED: Final = {"usable cores", "unset", "per user", "by terminal", "all"}
"""What stands where a default is no text that could be set."""

PG_SWITCHES: Final = {"PG_USE_SSL", "PG_SSL_REJECT_UNAUTHORIZED"}

SETTING: Final = re.compile(r"^\| `([A-Z_]+)` \|(?: (?:`--[a-z-]+`)? ?\|)? (`[^`]*`|[^|]*?) \|", re.MULTILINE)


def documented_settings() -> list[tuple[str, str]]:
    found = SETTING.findall((REFERENCE / "settings.md").read_text())
    return [(name, default) for name, default in found]


def test_every_setting_is_documented_once_and_no_other() -> None:
    names = [name for name, _ in documented_settings()]

    assert sorted(names) == sorted(
        [
            *ENVIRONMENT,
            *JWT_ENVIRONMENT,
            *CORS_ENVIRONMENT,
            *PAGE_ENVIRONMENT,
            *QUEUE_ENVIRONMENT,
            *PG_NAMES,
            *PG_SWITCHES,
            "ENABLE_LOGGING",  # another way to say LOG_LEVEL
        ]
    )


@pytest.mark.parametrize(("name", "default"), documented_settings())
def test_a_documented_default_is_the_default(name: str, default: str) -> None:
    if name in PG_NAMES or name in PG_SWITCHES:
        given = {"PG_HOST": "localhost"} | {name: default.strip("`")}
        assert postgres_url(given) == postgres_url({"PG_HOST": "localhost"})
    elif name in JWT_ENVIRONMENT and default in COMPUTED:
        assert getattr(load_settings({})[0].jwt, JWT_ENVIRONMENT[name][0]) is None
    elif name in PAGE_ENVIRONMENT and default in COMPUTED:
        assert getattr(load_settings({})[0].pages, PAGE_ENVIRONMENT[name][0]) is None
    elif default in COMPUTED:
        field, _ = ENVIRONMENT[name]
        assert getattr(load_settings({})[0], field) == getattr(Settings(), field)
    else:
        assert default.startswith("`")
        assert load_settings({name: default.strip("`")}) == load_settings({})


def test_every_error_is_documented_with_its_status() -> None:
    page = (REFERENCE / "errors.md").read_text()
    documented = {code: int(status) for code, status in re.findall(r"^\| `([a-z_]+)` \| (\d+) \|", page, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.QueenError)]

    assert documented == {kind.code: kind.status for kind in kinds if kind is not errors.StartupError}


def test_every_route_is_documented_and_no_other() -> None:
    pages = (REFERENCE / "http.md").read_text() + (REFERENCE / "admin.md").read_text()
    documented = re.findall(r"^\| \[?`([A-Z]+) (/[^`]*)`", pages, re.MULTILINE)

    assert sorted(documented) == sorted((route.method, route.path) for route in ROUTES)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_can_be_found_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            waiting += [page.parent / target for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())]

    assert {page.resolve() for page in ROOT.glob("docs/**/*.md")} <= seen
