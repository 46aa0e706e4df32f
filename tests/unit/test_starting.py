"""What is logged while a service waits for its database."""

from math import inf

import pytest
from structlog.testing import capture_logs

from service.api.starting import Starting
from service.database.connections import StorageUnavailableError


def lost(cause: Exception) -> StorageUnavailableError:
    error = StorageUnavailableError(f"cannot connect to db1:5432: {cause}")
    error.__cause__ = cause
    return error


REFUSED, SILENT = lost(ConnectionRefusedError("refused")), lost(TimeoutError("no answer"))


@pytest.mark.parametrize(
    ("reminder_seconds", "causes"),
    [
        (inf, ["unreachable", "no_answer", "unreachable"]),
        (0, ["unreachable", "unreachable", "no_answer", "unreachable", "unreachable"]),
    ],
)
def test_a_cause_is_logged_when_it_changes_and_after_a_while(
    reminder_seconds: float, causes: list[str]
) -> None:
    """The first failure, each change and a reminder are logged, with the database's host and the error."""
    waiting = Starting("db1:5432", 3.0, reminder_seconds)
    with capture_logs() as lines:
        firsts = [waiting.note(error) for error in (REFUSED, REFUSED, SILENT, REFUSED, REFUSED)]
    assert firsts == [True, False, False, False, False]
    assert waiting.cause == "unreachable"
    assert [line["cause"] for line in lines] == causes
    assert {line["database"] for line in lines} == {"db1:5432"}
    assert lines[0]["error"] == "cannot connect to db1:5432: refused"
