"""Erasure of an order's personal data from the log, the quarantine and the views: one path for every caller."""

import asyncio
from datetime import datetime
from typing import Final, NamedTuple

from projections.erasure import erase_words
from projections.locks import HOLD_REBUILD_LOCK, RELEASE_REBUILD_LOCK
from projections.postgres import Connection
from service.database.operations import Actor, record_operation
from service.database.schema import act_as_owner
from service.event_log import store

ERASE_ORDER: Final = "CALL erase_order($1, $2, $3)"
ERASED: Final = """
    SELECT erasure_id, events, entries, version
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
# Whether the order has words outside the vocabulary.
HAS_WORDS: Final = """
    SELECT EXISTS (
        SELECT FROM order_events
        WHERE originator_id = $1 AND convert_from(state, 'UTF8')::jsonb ->> 'verdict' = 'unrecognised')
"""
# How long the views may take to apply events that were recorded before the erasure.
VIEWS_SECONDS_MAX: Final = 10.0
POLL_SECONDS: Final = 0.05
# Until then, the old versions of the rows keep their bytes. If another session is vacuuming a table or creating
# an index on it, the erasure does not wait: that VACUUM, or the next automatic one, does the same.
VACUUM: Final = "VACUUM (SKIP_LOCKED) order_events, quarantine, idempotency_keys, history_salts"


class Erased(NamedTuple):
    """What an erasure did.

    Attributes:
        events: the number of emptied events.
        entries: the number of emptied quarantine entries.
        has_old_views: whether the views still have the order's words outside the vocabulary, which a replay
            removes.
    """

    events: int
    entries: int
    has_old_views: bool


async def erase_order(  # noqa: PLR0913, PLR0917 - what is erased, why, by whom, and where
    owner: Connection,
    service: Connection,
    order_no: str,
    reason: str,
    actor: Actor,
    version: int | None = None,
    before: datetime | None = None,
) -> Erased:
    """Erase an order's bodies, addresses and words outside the vocabulary.

    Args:
        owner: a connection whose role may act as the log's owner.
        service: a connection as the service's role, which owns the views. A trigger of that role must not run
            with the owner's rights, so ``owner`` does not write the views.
        order_no: the order.
        reason: why it is erased.
        actor: who erases it.
        version: the last version to erase; None for all.
        before: only quarantine entries that were seen last before this time; None for all.

    Raises:
        asyncpg.NoDataFoundError: no event was recorded for the order.
    """
    has_words: bool = await owner.fetchval(HAS_WORDS, order_no)
    if not has_words:
        erased, _ = await _erase_from_log(owner, order_no, reason, actor, version, before)
        return erased
    # A rebuild that began before would bring the words back.
    await owner.execute(HOLD_REBUILD_LOCK)
    try:
        erased, last = await _erase_from_log(owner, order_no, reason, actor, version, before)
        head = await store.head_position(owner)
        return erased._replace(has_old_views=not await _erase_from_views(service, order_no, last, head))
    finally:
        await owner.execute(RELEASE_REBUILD_LOCK)


async def find_left(owner: Connection, order_no: str) -> list[int]:
    """Return at most LISTED_MAX entries with an order number in them that an erasure does not reach."""
    return [number for (number,) in await owner.fetch(ENTRIES_WITH, order_no, LISTED_MAX)]


async def _erase_from_log(  # noqa: PLR0913, PLR0917 - as above
    owner: Connection,
    order_no: str,
    reason: str,
    actor: Actor,
    version: int | None,
    before: datetime | None,
) -> tuple[Erased, int]:
    """Erase from the log and the quarantine; return what was erased, and the last erased version."""
    async with owner.transaction():
        await act_as_owner(owner)
        await owner.execute(ERASE_ORDER, order_no, reason, version)
        ((erasure_id, events, entries, last),) = await owner.fetch(ERASED, order_no)
        if named := await owner.fetchval(EMPTY_ENTRIES, order_no, before):
            await owner.execute(COUNT_ENTRIES, erasure_id, entries + named)
        await record_operation(owner, actor, "order_erased", order_no, reason)
    return Erased(events, entries + named, has_old_views=False), last


async def _erase_from_views(service: Connection, order_no: str, version: int, head: int) -> bool:
    """Empty the order's words in the views; return False if the views are too far behind."""
    deadline = asyncio.get_running_loop().time() + VIEWS_SECONDS_MAX
    while not await erase_words(service, order_no, version, head):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True
