"""Contradictions: the refused reports, and which of them an operator has handled."""

from datetime import datetime
from typing import Any, Final, cast

import asyncpg
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import Status
from projections.postgres import Connection
from projections.windows import WALKED_ROWS_MAX, Window
from service.database.operations import Actor, check_reason, record_operation

# The columns of a contradiction.
COLUMNS: Final = """
    entry.order_no, entry.version, entry.position, entry.recognised, entry.previous_status,
    entry.reported_status, entry.reason, entry.received_at,
    performed_at AS handled_at, actor AS handled_by, operations.reason AS note
"""
# Refused reports below a position, newest first, each with its handling. The walked rows are limited before
# they are filtered.
PAGE: Final = f"""
    SELECT {COLUMNS}
    FROM (
        SELECT * FROM timeline.entries WHERE verdict = 'refused' AND position < $1
        ORDER BY position DESC LIMIT $2
    ) AS entry
    LEFT JOIN public.handled_contradictions AS handled USING (order_no, version)
    LEFT JOIN public.operations USING (operation_id)
    WHERE $3::boolean IS NULL OR (operation_id IS NOT NULL) = $3
    ORDER BY entry.position DESC
    LIMIT $4
"""  # noqa: S608 - our own columns
# The position at which a walk of $2 rows ends; null if there are fewer.
REACHED: Final = """
    SELECT position FROM timeline.entries WHERE verdict = 'refused' AND position < $1
    ORDER BY position DESC OFFSET $2 - 1 LIMIT 1
"""
CONTRADICTION: Final = f"""
    SELECT {COLUMNS}
    FROM timeline.entries AS entry
    LEFT JOIN public.handled_contradictions AS handled USING (order_no, version)
    LEFT JOIN public.operations USING (operation_id)
    WHERE entry.order_no = $1 AND entry.version = $2 AND entry.verdict = 'refused'
"""  # noqa: S608 - our own columns
HANDLED_VERSIONS: Final = """
    SELECT version, performed_at, actor, reason
    FROM public.handled_contradictions JOIN public.operations USING (operation_id)
    WHERE order_no = $1
"""
HANDLE: Final = """
    INSERT INTO public.handled_contradictions (order_no, version, operation_id) VALUES ($1, $2, $3)
"""


class Contradiction(TypedDict):
    """A refused report: it contradicts ``previous_status``, which the order kept.

    ``handled_at``, ``handled_by`` and ``note`` are null until an operator has handled it.
    """

    order_no: str
    version: int
    position: int
    recognised: Status | None
    previous_status: Status | None
    reported_status: str
    reason: str | None
    received_at: datetime
    handled_at: datetime | None
    handled_by: str | None
    note: str | None


class UnknownContradictionError(Exception):
    """The order has no refused report with this version. ``str()`` names both."""


class AlreadyHandledError(Exception):
    """The contradiction has been handled before. ``str()`` says when and by whom."""


async def contradictions_page(
    connection: Connection, before: int, limit: int, *, handled: bool | None
) -> Window[Contradiction]:
    """Return refused reports below a position, newest first.

    Args:
        connection: a connection.
        before: the position.
        limit: the most rows to return.
        handled: only those that were handled, or only those that were not; None for all.
    """
    rows: list[Contradiction] = []
    walked = 0
    reached: int | None = before
    while reached is not None and len(rows) < limit and walked < WALKED_ROWS_MAX:
        # A first walk, which is short, is enough where most contradictions match.
        rows_max = limit if walked == 0 else WALKED_ROWS_MAX
        found = await connection.fetch(PAGE, reached, rows_max, handled, limit - len(rows))
        rows += [_to_contradiction(row) for row in found]
        reached = await connection.fetchval(REACHED, reached, rows_max)
        walked += rows_max
    return Window(rows, reached)


async def find_contradiction(connection: Connection, order_no: str, version: int) -> Contradiction:
    """Return a refused report.

    Raises:
        UnknownContradictionError: there is none.
    """
    row = await connection.fetchrow(CONTRADICTION, order_no, version)
    if row is None:
        raise UnknownContradictionError(f"{order_no} has no refused report with the version {version}")
    return _to_contradiction(row)


async def handled_versions(
    connection: Connection, order_no: str
) -> dict[int, tuple[datetime, str | None, str]]:
    """Return when, by whom and with which note the contradictions of an order were handled, by version."""
    rows = await connection.fetch(HANDLED_VERSIONS, order_no)
    return {version: (at, actor, note) for version, at, actor, note in rows}


async def handle_contradiction(
    connection: Connection, order_no: str, version: int, note: str, actor: Actor
) -> Contradiction:
    """Mark a refused report as handled, and record who did it and why.

    Args:
        connection: a connection that is not in a transaction.
        order_no: the order.
        version: the report's version.
        note: the operator's note.
        actor: the operator.

    Raises:
        ValueError: the note is empty, not printable, or longer than REASON_CHARACTERS_MAX.
        UnknownContradictionError: the view has no refused report with this version.
        AlreadyHandledError: it was handled before.
    """
    check_reason(note, "note")
    try:
        async with connection.transaction():
            _refuse_handled(await find_contradiction(connection, order_no, version))
            subject = f"{order_no} version {version}"
            operation_id = await record_operation(connection, actor, "contradiction_handled", subject, note)
            await connection.execute(HANDLE, order_no, version, operation_id)
            return await find_contradiction(connection, order_no, version)
    except asyncpg.UniqueViolationError:
        _refuse_handled(await find_contradiction(connection, order_no, version))
        raise


def _refuse_handled(contradiction: Contradiction) -> None:
    if (at := contradiction["handled_at"]) is not None:
        by = contradiction["handled_by"] or "an operator without a key"
        raise AlreadyHandledError(f"it was handled at {at.isoformat(timespec='seconds')} by {by}")


def _to_contradiction(row: Any) -> Contradiction:
    return cast("Contradiction", dict(row))
