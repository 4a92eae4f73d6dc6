"""SQL files are split into statements as PostgreSQL would read them."""

from __future__ import annotations

import pytest

from queen.storage.queries import load_migrations, split_statements


def test_statements_end_with_a_semicolon_at_the_end_of_a_line() -> None:
    assert split_statements("SELECT 1;\n\nSELECT\n  2;\n") == ("SELECT 1;", "SELECT\n  2;")


def test_a_quoted_body_is_one_statement_whatever_is_in_it() -> None:
    body = "CREATE FUNCTION f() RETURNS void AS $$\nBEGIN\n  SELECT 1;\n  -- not the end;\nEND;\n$$ LANGUAGE plpgsql;"

    assert split_statements(body + "\nSELECT 2;") == (body, "SELECT 2;")


def test_a_body_quoted_on_one_line_does_not_swallow_what_follows() -> None:
    assert split_statements("SELECT $$a;$$;\nSELECT 2;") == ("SELECT $$a;$$;", "SELECT 2;")


def test_comments_between_statements_are_left_out() -> None:
    assert split_statements("-- a banner; with a semicolon;\nSELECT 1;\n  -- the end;\n") == ("SELECT 1;",)


def test_a_semicolon_within_a_line_does_not_end_a_statement() -> None:
    assert split_statements("SELECT ';' AS a,\n';b' AS b;") == ("SELECT ';' AS a,\n';b' AS b;",)


@pytest.mark.parametrize("text", ["SELECT 1", "SELECT 1;\nSELECT 2", "SELECT $$\n1;\n"])
def test_an_unfinished_statement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unfinished"):
        split_statements(text)


def test_migrations_are_numbered_once_each_and_in_order_and_have_one_statement_an_execute() -> None:
    migrations = load_migrations()
    numbers = [migration.number for migration in migrations]

    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1
    assert all(migration.statements for migration in migrations)
    for migration in migrations:
        for statement in migration.statements:
            assert statement.split(maxsplit=1)[0] in ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE"), (
                statement
            )
            assert statement.count("CREATE OR REPLACE FUNCTION") <= 1
