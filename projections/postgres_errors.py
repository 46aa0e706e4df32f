"""asyncpg's connection type, and the classification of PostgreSQL's errors."""

from typing import Final, TypeAlias

import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# Errors caused by values, so that every further attempt would fail too: cardinality, data, constraints.
_VALUE_SQLSTATES: Final = ("21", "22", "23")
# Errors of the connection, the server, its resources or limits, and transactions ended by a conflict or
# a lock. The statement is not at fault: another attempt may succeed, at once or after an operator has acted.
_LOST_SQLSTATES: Final = ("08", "25", "28", "3D", "40", "42501", "53", "54", "55", "57", "58", "XX")


def is_connection_lost(error: BaseException) -> bool:
    """Return whether the outcome of the failed statement is unknown, or another attempt may succeed."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(_LOST_SQLSTATES)
    # asyncpg also raises InternalClientError when the server dies.
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError)


def is_value_refused(error: BaseException) -> bool:
    """Return whether a statement failed because of its values, so that every further attempt would fail."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(_VALUE_SQLSTATES)
    # Of the other errors only these, which arise before anything is sent: after a commit, another attempt would
    # record twice.
    return isinstance(error, UnicodeError | OverflowError)


def is_event_at_fault(error: Exception) -> bool:
    """Return whether applying an event failed because of the event, not of the server or the connection.

    A server that is full or restarting must not cause healthy orders to be parked.
    """
    if isinstance(error, asyncpg.PostgresError):
        # A view's statement meets a limit of the server only through an event's values.
        return is_value_refused(error) or isinstance(error, asyncpg.ProgramLimitExceededError)
    return not isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)
