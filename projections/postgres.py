"""asyncpg's connection type, and the classification of PostgreSQL's errors."""

from typing import Final, TypeAlias

import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

# What the values of a report can cause in the statements that record it: a character that the encoding does not
# have (22021), such as NUL, or that cannot be converted (22P05). Anything else, such as a constraint that
# an operator has added, or a sequence at its end, fails good reports too.
_REPORT_SQLSTATES: Final = ("22021", "22P05")
# What the values of an event can cause in a view, whose tables are the service's own: cardinality, data and
# constraints.
_VIEW_SQLSTATES: Final = ("21", "22", "23")
# Errors of the connection, the server, its resources or limits, and transactions ended by a conflict or
# a lock. The statement is not at fault: another attempt may succeed, at once or after an operator has acted.
_LOST_SQLSTATES: Final = ("08", "25", "28", "3D", "40", "42501", "53", "54", "55", "57", "58", "XX")
# A table that is being restored, a schema that may not be used: the statements that record are correct.
_SCHEMA_SQLSTATES: Final = ("3F", "42")
# Errors that one row can cause where another one passes.
_ROW_SQLSTATES: Final = ("22", "23", "P0")
# A sequence at its end, although it has the class of data errors.
_SEQUENCE_ENDED: Final = "2200H"


def is_connection_lost(error: BaseException) -> bool:
    """Return whether the outcome of the failed statement is unknown, or another attempt may succeed."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(_LOST_SQLSTATES)
    # asyncpg also raises InternalClientError when the server dies.
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError)


def is_worth_repeating(error: BaseException) -> bool:
    """Return whether recording failed for a cause that may pass, or that an operator may end, at once."""
    if isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(_SCHEMA_SQLSTATES):
        return True
    return is_connection_lost(error)


def is_row_at_fault(error: BaseException) -> bool:
    """Return whether one report among several may have failed the recording, whether or not it is to blame."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(_ROW_SQLSTATES) and error.sqlstate != _SEQUENCE_ENDED
    return is_report_at_fault(error)


def is_report_at_fault(error: BaseException) -> bool:
    """Return whether recording failed because of a report's values, so that every attempt would fail."""
    if isinstance(error, asyncpg.PostgresError):
        return error.sqlstate in _REPORT_SQLSTATES
    # Of the other errors only these, which arise before anything is sent: after a commit, another attempt would
    # record twice.
    return isinstance(error, UnicodeError | OverflowError)


def is_event_at_fault(error: Exception) -> bool:
    """Return whether applying an event failed because of the event, not of the server or the connection.

    A server that is full or restarting must not cause healthy orders to be parked.
    """
    if isinstance(error, asyncpg.PostgresError):
        # A view's statement meets a limit of the server only through an event's values.
        is_limit = isinstance(error, asyncpg.ProgramLimitExceededError)
        return is_limit or (error.sqlstate or "").startswith(_VIEW_SQLSTATES)
    return not isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)
