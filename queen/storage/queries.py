"""Loads the migrations and splits SQL into statements. Executes nothing."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple


class Migration(NamedTuple):
    """One numbered migration: its statements run in order, in one transaction."""

    number: int
    name: str
    statements: tuple[str, ...]


def split_statements(text: str) -> tuple[str, ...]:
    """Split SQL at the semicolons that end a line, outside dollar-quoted bodies and comments.

    One statement an execute is what Citus demands of DDL. Our files quote bodies with ``$$`` alone.
    """
    statements: list[str] = []
    current: list[str] = []
    quoted = False
    for line in text.splitlines():
        if not quoted and line.lstrip().startswith("--"):
            continue
        current.append(line)
        if line.count("$$") % 2:
            quoted = not quoted
        if not quoted and line.rstrip().endswith(";"):
            statements.append("\n".join(current).strip())
            current = []
    rest = "\n".join(current).strip()
    if rest:
        raise ValueError(f"unfinished statement at the end: {rest[:60]!r}")
    return tuple(statements)


def load_migrations() -> tuple[Migration, ...]:
    """All migrations in order of their number, from ``sql/migrations/NNNN_name.sql``."""
    folder = resources.files("queen.storage").joinpath("sql/migrations")
    found = []
    for entry in folder.iterdir():
        if entry.name.endswith(".sql"):
            number, _, name = entry.name.removesuffix(".sql").partition("_")
            found.append(Migration(int(number), name, split_statements(entry.read_text(encoding="utf-8"))))
    return tuple(sorted(found))
