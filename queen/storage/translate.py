"""What PostgreSQL and asyncpg raise, as errors of ours. By SQLSTATE and class, never by text."""

from __future__ import annotations

import asyncio

import asyncpg

from queen.errors import OutcomeUnknown, Overloaded, QueenError, StorageUnavailable

RETRYABLE = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""Undone completely by PostgreSQL: the same work may be done again at once."""

CONNECTION_LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a query meets when the server has just said goodbye
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    ConnectionError,
    OSError,
    asyncio.TimeoutError,
)
"""After these the connection is not to be used again."""


def was_undone(error: BaseException) -> bool:
    """Whether a lost connection shows that nothing was committed on it.

    PostgreSQL ended it and says so in place of an answer: it holds such an end back while it commits, and sends the
    answer before it looks again (CommitTransaction and PostgresMain in its source). Waiting for a synchronous standby
    it says it as a warning, which this is not. Or it was closed before all of a statement was sent, of which nothing
    runs then. What is done in one go on a connection is one transaction, so that its other statements are undone too.
    """
    if isinstance(error, asyncpg.InternalClientError):  # asyncpg knows of the end already, and has sent nothing
        return True
    if isinstance(error, asyncpg.ConnectionDoesNotExistError) and isinstance(error.__cause__, BrokenPipeError):
        return True  # of sending: nothing else breaks so
    told: BaseException | None = error
    while told is not None and not isinstance(told, asyncpg.AdminShutdownError):
        told = told.__cause__ or told.__context__
    return told is not None and told.severity_en == "FATAL"


def translate(error: BaseException, *, sent: bool) -> BaseException:
    """The error a caller sees. ``sent``: a statement that writes may have reached PostgreSQL before the break.

    What is not ours to explain (a bug) is returned as it is.
    """
    if isinstance(error, QueenError):
        return error
    if isinstance(error, asyncpg.TooManyConnectionsError):
        return StorageUnavailable(
            "PostgreSQL has no connection left for this server; try again, or raise max_connections"
        )
    if isinstance(error, (asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError)):
        return Overloaded("PostgreSQL took longer than the statement or lock timeout; nothing was applied; try again")
    if isinstance(error, asyncpg.InsufficientResourcesError):
        return StorageUnavailable(f"PostgreSQL is out of resources (SQLSTATE {error.sqlstate}); nothing was applied")
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return StorageUnavailable("PostgreSQL takes no writes now (read-only, perhaps a standby); nothing was applied")
    if isinstance(error, RETRYABLE):
        return Overloaded(
            "PostgreSQL undid the work because of a conflict, several times; nothing was applied; try again"
        )
    if isinstance(error, CONNECTION_LOST):
        if sent and not was_undone(error) and not isinstance(error, asyncpg.CannotConnectNowError):
            return OutcomeUnknown(
                "the connection to PostgreSQL broke before it answered; whether this was applied is unknown; "
                "repeat it with the same transaction ids"
            )
        return StorageUnavailable("PostgreSQL cannot be reached; nothing was applied; try again")
    return error
