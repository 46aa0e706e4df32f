"""Erasure of an order's personal data from the log, the quarantine and the views: one path for every caller."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, NamedTuple

import asyncpg

from projections.postgres import Connection
from projections.view import View
from projections.views import VIEWS
from service.database.operations import Actor, record_operation
from service.database.schema import act_as_owner
from service.event_log.erasures import HEARD_SECONDS_MAX
from service.event_log.store import CHANNEL
from service.projecting.locks import TAKE_VIEW_LOCK
from service.projecting.projector import SELECT_VIEW, OutdatedViewError, apply_erasures, view_state

ERASE_ORDER: Final = "CALL erase_order($1, $2, $3)"
ERASED: Final = """
    SELECT erasure_id, events, entries
    FROM erasures WHERE order_no = $1 ORDER BY erasure_id DESC LIMIT 1
"""
# Bodies that name the order, although no event was recorded from them.
EMPTY_ENTRIES: Final = """
    WITH emptied AS (
        UPDATE quarantine
        SET body = NULL, remote = NULL, resolved_at = coalesce(resolved_at, now()),
            discard_reason = coalesce(discard_reason, 'erased'), state = 'discarded'
        WHERE named_order_no = $1 AND state <> 'retried' AND body IS NOT NULL
          AND ($2::timestamptz IS NULL OR last_seen_at < $2)
        RETURNING quarantine_id
    ) SELECT count(*) FROM emptied
"""
# Bodies in which the order number occurs in some other way; those of earlier releases have no order number.
ENTRIES_WITH: Final = """
    SELECT quarantine_id FROM quarantine
    WHERE position(convert_to($1, 'UTF8') IN body) > 0 AND state <> 'retried'
      AND named_order_no IS DISTINCT FROM $1
    ORDER BY quarantine_id LIMIT $2
"""
# More of them are not listed.
LISTED_MAX: Final = 100
COUNT_ENTRIES: Final = "UPDATE erasures SET entries = $2 WHERE erasure_id = $1"
ERASE_ECHOES: Final = "SELECT erase_echoes($1)"
# Only a hint: a service that misses it looks within a second.
NOTIFY: Final = f"SELECT pg_notify('{CHANNEL}', '')"
# How long an erasure waits for another writer of a view, such as a service that applies a batch.
VIEW_LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = '10s'"
# Until then, the old versions of the rows keep their bytes. If another session is vacuuming a table or creating
# an index on it, the erasure does not wait: that VACUUM, or the next automatic one, does the same.
VACUUM: Final = "VACUUM (SKIP_LOCKED) order_events, quarantine, idempotency_keys, history_salts"


class Erased(NamedTuple):
    """What an erasure did.

    Attributes:
        events: the number of emptied events.
        entries: the number of emptied quarantine entries.
    """

    events: int
    entries: int


async def erase_order(  # noqa: PLR0913, PLR0917 - what is erased, why, by whom, and where
    owner: Connection,
    order_no: str,
    reason: str,
    actor: Actor,
    version: int | None = None,
    before: datetime | None = None,
) -> Erased:
    """Erase an order's bodies, addresses and words outside the vocabulary from the log; then call ``settle``.

    Args:
        owner: a connection whose role may act as the log's owner.
        order_no: the order.
        reason: why it is erased.
        actor: who erases it.
        version: the last version to erase; None for all.
        before: only quarantine entries that were seen last before this time; None for all.

    Raises:
        asyncpg.NoDataFoundError: no event was recorded for the order.
    """
    async with owner.transaction():
        await act_as_owner(owner)
        await owner.execute(ERASE_ORDER, order_no, reason, version)
        ((erasure_id, events, entries),) = await owner.fetch(ERASED, order_no)
        if named := await owner.fetchval(EMPTY_ENTRIES, order_no, before):
            await owner.execute(COUNT_ENTRIES, erasure_id, entries + named)
        await record_operation(owner, actor, "order_erased", order_no, reason)
    with suppress(asyncpg.ProgramLimitExceededError):
        await owner.execute(NOTIFY)
    return Erased(events, entries + named)


async def settle(owner: Connection, service: Connection, order_nos: Sequence[str]) -> list[str]:
    """Bring erasures to the views and to every process, so that nothing of them leaves any process afterwards.

    Each service applies them by itself too, but later if it is busy or stopped.

    Args:
        owner: a connection whose role may act as the log's owner.
        service: a connection as the service's role, which owns the views. A trigger of that role must not run
            with the owner's rights, so ``owner`` does not write the views.
        order_nos: the orders, which are erased from the log already.

    Returns:
        The views that could not be written: they lack the erasures until a service or ``replay`` applies them.
    """
    late = [view.name for view in VIEWS if not await _apply_to_view(service, view)]
    # Each memory reads the erasures again after this time.
    await asyncio.sleep(HEARD_SECONDS_MAX)
    async with owner.transaction():
        await act_as_owner(owner)
        for order_no in order_nos:
            # A deliverer may have saved an endpoint's response before it knew of the erasure.
            await owner.execute(ERASE_ECHOES, order_no)
    return late


async def find_left(owner: Connection, order_no: str) -> list[int]:
    """Return at most LISTED_MAX entries with an order number in them that an erasure does not reach."""
    return [number for (number,) in await owner.fetch(ENTRIES_WITH, order_no, LISTED_MAX)]


async def _apply_to_view(service: Connection, view: View) -> bool:
    """Apply all erasures to a view under its fence, as its projector does; return whether that was possible."""
    try:
        async with service.transaction():
            await service.execute(SELECT_VIEW, view.name)
            await service.execute(VIEW_LOCK_TIMEOUT)
            await service.execute(TAKE_VIEW_LOCK, view.name)
            state = await view_state(service)
            if state.definition != view.definition:
                return False
            while await apply_erasures(service, view, state):
                state = await view_state(service)
    except (OutdatedViewError, asyncpg.LockNotAvailableError):
        return False
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        # The view of another release.
        return False
    return True
