"""What PostgreSQL and the driver raise, as errors of ours: by SQLSTATE and class, never by text."""

from __future__ import annotations

import asyncpg
import pytest

from queen.errors import OutcomeUnknown, Overloaded, QueenError, StorageUnavailable
from queen.storage.translate import CONNECTION_LOST, RETRYABLE, translate, was_undone

BROKEN = [
    asyncpg.ConnectionDoesNotExistError("gone"),
    asyncpg.ConnectionFailureError("gone"),
    asyncpg.InterfaceError("connection is closed"),
    asyncpg.AdminShutdownError("terminating connection"),  # with no severity: not PostgreSQL's own word
    asyncpg.CrashShutdownError("terminating connection"),
    asyncpg.IdleInTransactionSessionTimeoutError("too long"),
    ConnectionResetError(104, "reset"),
    BrokenPipeError(32, "broken"),
    OSError(113, "no route"),
    TimeoutError(),
]


def named(error: BaseException) -> str:
    return type(error).__name__


@pytest.mark.parametrize("error", BROKEN, ids=named)
def test_a_broken_connection_leaves_the_outcome_open_only_where_something_was_sent(error: Exception) -> None:
    assert isinstance(error, CONNECTION_LOST)
    assert isinstance(translate(error, sent=True), OutcomeUnknown)
    assert isinstance(translate(error, sent=False), StorageUnavailable)


def ended(severity: str) -> asyncpg.AdminShutdownError:
    error = asyncpg.AdminShutdownError("terminating connection due to administrator command")
    error.severity_en = severity
    return error


def after(error: Exception, first: Exception) -> Exception:
    """``error``, raised because of ``first`` or while that was handled."""
    error.__cause__ = first
    return error


def test_an_end_that_postgresql_says_in_place_of_an_answer_has_undone_the_work() -> None:
    gone = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    not_sent = asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress")
    leaving = asyncpg.InterfaceError("cannot call Transaction.__aexit__(): the underlying connection is closed")
    for error in (ended("FATAL"), after(gone, ended("FATAL")), after(leaving, gone), not_sent):
        assert isinstance(error, CONNECTION_LOST)
        assert was_undone(error)
        assert isinstance(translate(error, sent=True), StorageUnavailable)

    warned = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
    assert not was_undone(after(warned, ended("WARNING")))


def test_a_statement_that_could_not_be_sent_whole_has_done_nothing() -> None:
    for broken, undone in ((BrokenPipeError(32, "broken"), True), (ConnectionResetError(104, "reset"), False)):
        gone = asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        assert was_undone(after(gone, broken)) is undone


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (asyncpg.CannotConnectNowError("starting up"), StorageUnavailable),
        (asyncpg.TooManyConnectionsError("sorry"), StorageUnavailable),
        (asyncpg.DiskFullError("no space"), StorageUnavailable),
        (asyncpg.OutOfMemoryError("no memory"), StorageUnavailable),
        (asyncpg.ReadOnlySQLTransactionError("standby"), StorageUnavailable),
        (asyncpg.QueryCanceledError("statement timeout"), Overloaded),
        (asyncpg.LockNotAvailableError("lock timeout"), Overloaded),
        (asyncpg.DeadlockDetectedError("deadlock"), Overloaded),
        (asyncpg.SerializationError("conflict"), Overloaded),
    ],
    ids=lambda value: named(value) if isinstance(value, Exception) else "",
)
def test_what_postgresql_undid_is_told_as_not_applied(error: Exception, expected: type[QueenError]) -> None:
    for sent in (True, False):
        translated = translate(error, sent=sent)
        assert type(translated) is expected
        assert translated.status == 503
        assert translated.retry_after_seconds


def test_conflicts_are_those_that_may_be_tried_again_at_once() -> None:
    assert isinstance(asyncpg.DeadlockDetectedError(), RETRYABLE)
    assert isinstance(asyncpg.SerializationError(), RETRYABLE)
    assert not isinstance(asyncpg.UniqueViolationError(), RETRYABLE)


def test_our_own_errors_and_bugs_are_left_as_they_are() -> None:
    for error in (Overloaded("full"), ZeroDivisionError(), asyncpg.UndefinedTableError("no table"), KeyError("x")):
        assert translate(error, sent=True) is error
    assert not isinstance(asyncpg.UndefinedTableError(), CONNECTION_LOST)


def test_a_bad_argument_is_a_bug_and_no_broken_connection() -> None:
    """The driver refuses it before anything is sent, and the connection stays good."""
    error = asyncpg.DataError("invalid input for query argument $1: 2**40 (value out of int32 range)")

    assert translate(error, sent=True) is error
    assert not isinstance(error, CONNECTION_LOST)
