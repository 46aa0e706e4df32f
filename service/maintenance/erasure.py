"""Erasure of an order's personal data from the log, the quarantine and the views: one path for every caller."""

import asyncio
from datetime import UTC, datetime
from typing import Final, NamedTuple

from domain.order import Arrival
from projections.erasure import erase_words
from projections.locks import HOLD_REBUILD_LOCK, RELEASE_REBUILD_LOCK
from projections.postgres_errors import Connection
from service.database.operations import Actor, record_operation
from service.database.schema import act_as_owner
from service.event_log import store
from service.ingest.parser import UnreadableError, parse

ERASE_ORDER: Final = "CALL erase_order($1, $2, $3)"
ERASED: Final = """
    SELECT erasure_id, events, entries FROM erasures WHERE order_no = $1 ORDER BY erasure_id DESC LIMIT 1
"""
# Bodies that contain the order number, although no event was recorded from them.
BODIES_WITH: Final = """
    SELECT quarantine_id, body FROM quarantine
    WHERE position(convert_to($1, 'UTF8') IN body) > 0 AND state <> 'retried'
"""
EMPTY_ENTRIES: Final = """
    UPDATE quarantine
    SET body = NULL, remote = NULL, resolved_at = coalesce(resolved_at, now()),
        discard_reason = coalesce(discard_reason, 'erased'), state = 'discarded'
    WHERE quarantine_id = ANY($1::bigint[])
"""
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
# What VACUUM removes: the old versions of the rows.
VACUUM: Final = "VACUUM order_events, quarantine, idempotency_keys"


class Erased(NamedTuple):
    """What an erasure did.

    Attributes:
        events: the number of emptied events.
        entries: the number of emptied quarantine entries.
        left: entries that contain the order number, but were not read as a report of this order.
        has_old_views: whether the views still have the order's words outside the vocabulary, which a replay
            removes.
    """

    events: int
    entries: int
    left: list[int]
    has_old_views: bool


async def erase_order(  # noqa: PLR0913, PLR0917 - what is erased, why, by whom, and where
    owner: Connection, service: Connection, order_no: str, reason: str, actor: Actor, version: int | None = None
) -> Erased:
    """Erase an order's bodies, addresses and words outside the vocabulary.

    Args:
        owner: a connection whose role may act as the log's owner.
        service: a connection as the service's role, which owns the views. A trigger of that role must not run
            with the owner's rights, so the views are not written through ``owner``.
        order_no: the order.
        reason: why it is erased.
        actor: who erases it.
        version: the last version to erase; None for all.

    Raises:
        asyncpg.NoDataFoundError: no event was recorded for the order.
    """
    has_words: bool = await owner.fetchval(HAS_WORDS, order_no)
    if not has_words:
        return await _erase_from_log(owner, order_no, reason, actor, version)
    # A rebuild that began before would bring the words back.
    await owner.execute(HOLD_REBUILD_LOCK)
    try:
        erased = await _erase_from_log(owner, order_no, reason, actor, version)
        head = await store.head_position(owner)
        return erased._replace(has_old_views=not await _erase_from_views(service, order_no, version, head))
    finally:
        await owner.execute(RELEASE_REBUILD_LOCK)


async def _erase_from_log(
    owner: Connection, order_no: str, reason: str, actor: Actor, version: int | None
) -> Erased:
    async with owner.transaction():
        await act_as_owner(owner)
        await owner.execute(ERASE_ORDER, order_no, reason, version)
        ((erasure_id, events, entries),) = await owner.fetch(ERASED, order_no)
        named: list[int] = []
        left: list[int] = []
        for quarantine_id, body in await owner.fetch(BODIES_WITH, order_no):
            (named if _read_order_no(body) == order_no else left).append(quarantine_id)
        if named:
            await owner.execute(EMPTY_ENTRIES, named)
            await owner.execute(COUNT_ENTRIES, erasure_id, entries + len(named))
        await record_operation(owner, actor, "order_erased", order_no, reason)
    return Erased(events, entries + len(named), left, has_old_views=False)


async def _erase_from_views(service: Connection, order_no: str, version: int | None, head: int) -> bool:
    """Empty the order's words in the views; return False if the views are too far behind."""
    deadline = asyncio.get_running_loop().time() + VIEWS_SECONDS_MAX
    while not await erase_words(service, order_no, version, head):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


def _read_order_no(body: bytes) -> str | None:
    """Return the order number of a body that no event was recorded from, None if it cannot be read."""
    try:
        return parse(body, Arrival("", datetime.now(UTC))).order_no
    except UnreadableError as error:
        return error.order_no
