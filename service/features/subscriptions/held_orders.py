"""Held orders: of each, one event could not be delivered yet, and its later events wait behind it."""

from datetime import datetime
from typing import Final, cast
from uuid import UUID

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection
from service.database.operations import Actor, check_reason, record_operation

# With so many held orders, a subscription reads no further event until an operator retries or skips some.
HELD_ORDERS_MAX: Final = 10_000

# An operator's request waits in the row until the deliverer applies it. An event that was delivered in the
# meantime is not skipped.
IS_SKIPPED: Final = "skip_version IS NOT DISTINCT FROM version"
IS_DUE: Final = f"(retry_requested OR {IS_SKIPPED})"
VERSION: Final = f"version + ({IS_SKIPPED})::integer"
ATTEMPTS: Final = f"CASE WHEN {IS_DUE} THEN 0 ELSE attempts END"
NEXT_ATTEMPT_AT: Final = f"CASE WHEN {IS_DUE} THEN now() ELSE next_attempt_at END"
LAST_ERROR: Final = f"CASE WHEN NOT ({IS_SKIPPED}) THEN last_error END"
# Each order as the deliverer will have it.
COLUMNS: Final = f"""
    order_no, {VERSION} AS version, position, held_since, {ATTEMPTS} AS attempts, last_attempt_at,
    {NEXT_ATTEMPT_AT} AS next_attempt_at, {LAST_ERROR} AS last_error
"""
APPLY_REQUESTS: Final = f"""
    UPDATE public.held_orders
    SET version = {VERSION}, attempts = {ATTEMPTS}, next_attempt_at = {NEXT_ATTEMPT_AT},
        last_error = {LAST_ERROR}, retry_requested = false, skip_version = NULL
    WHERE subscription_id = $1 AND (retry_requested OR skip_version IS NOT NULL)
"""  # noqa: S608 - our own columns
# The held orders of a subscription above an id, oldest first.
PAGE: Final = f"""
    SELECT held_id, {COLUMNS} FROM public.held_orders
    WHERE subscription_id = $1 AND held_id > $2 ORDER BY held_id LIMIT $3
"""  # noqa: S608 - our own columns
FIND: Final = f"""
    SELECT held_id, {COLUMNS} FROM public.held_orders WHERE subscription_id = $1 AND order_no = $2
"""  # noqa: S608 - our own columns
# The deliverer reads its held orders again when the revision rises.
RAISE_REVISION: Final = """
    UPDATE public.subscriptions SET revision = revision + 1 WHERE subscription_id = $1
"""
RETRY: Final = """
    UPDATE public.held_orders SET retry_requested = true
    WHERE subscription_id = $1 AND order_no = $2
"""
SKIP: Final = """
    UPDATE public.held_orders SET skip_version = version
    WHERE subscription_id = $1 AND order_no = $2 AND version = $3
"""


class HeldOrder(TypedDict):
    """An order whose event ``version`` is not delivered yet.

    ``attempts`` is how often it was attempted. ``next_attempt_at`` is null after the last attempt of the
    schedule: the order stays held until an operator retries or skips the event.
    """

    held_id: int
    order_no: str
    version: int
    position: int
    held_since: datetime
    attempts: int
    last_attempt_at: datetime | None
    next_attempt_at: datetime | None
    last_error: str | None


class NotHeldError(Exception):
    """The subscription does not hold the order. ``str()`` names the order."""


async def held_orders_page(
    connection: Connection, subscription_id: UUID, after: int, limit: int
) -> list[HeldOrder]:
    """Return held orders with ids above ``after``, those that have been held for longest first."""
    return [cast("HeldOrder", dict(row)) for row in await connection.fetch(PAGE, subscription_id, after, limit)]


async def find_held(connection: Connection, subscription_id: UUID, order_no: str) -> HeldOrder:
    """Return one held order.

    Raises:
        NotHeldError: the subscription does not hold it.
    """
    row = await connection.fetchrow(FIND, subscription_id, order_no)
    if row is None:
        raise NotHeldError(f"the subscription does not hold the order {order_no}: see the list of held orders")
    return cast("HeldOrder", dict(row))


async def apply_requests(connection: Connection, subscription_id: UUID) -> None:
    """Apply what operators have requested about the held orders of a subscription."""
    await connection.execute(APPLY_REQUESTS, subscription_id)


async def retry_held(connection: Connection, subscription_id: UUID, order_no: str, actor: Actor) -> HeldOrder:
    """Attempt a held order's event at once, and then by the whole schedule again.

    Raises:
        NotHeldError: the subscription does not hold it.
    """
    async with connection.transaction():
        # Before the order's row, as the deliverer does.
        await connection.execute(RAISE_REVISION, subscription_id)
        held = await find_held(connection, subscription_id, order_no)
        await connection.execute(RETRY, subscription_id, order_no)
        subject = f"{subscription_id} {order_no} version {held['version']}"
        await record_operation(connection, actor, "delivery_retried", subject)
        return await find_held(connection, subscription_id, order_no)


async def skip_held(
    connection: Connection, subscription_id: UUID, order_no: str, reason: str, actor: Actor
) -> HeldOrder:
    """Give up the event of a held order, and go on with the order's next one.

    Args:
        connection: a connection that is not in a transaction.
        subscription_id: the subscription.
        order_no: the order.
        reason: why; it is recorded.
        actor: the operator.

    Returns:
        The order as it was held, with the version that is given up.

    Raises:
        ValueError: the reason is empty, not printable, or longer than REASON_CHARACTERS_MAX.
        NotHeldError: the subscription does not hold the order.
    """
    check_reason(reason)
    async with connection.transaction():
        await connection.execute(RAISE_REVISION, subscription_id)
        held = await find_held(connection, subscription_id, order_no)
        await connection.execute(SKIP, subscription_id, order_no, held["version"])
        subject = f"{subscription_id} {order_no} version {held['version']}"
        await record_operation(connection, actor, "delivery_skipped", subject, reason)
        return held
