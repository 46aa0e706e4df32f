"""The table of subscriptions: their declarations, and each one's position in the log."""

import secrets
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast
from uuid import UUID

import asyncpg
from typing_extensions import TypeAliasType, TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import Status
from domain.transitions import Verdict
from projections.postgres import Connection
from service.database.operations import Actor, record_operation
from service.event_log import store
from service.standard_webhooks import SECRET_PREFIX

# Named types have their own schemas in the contract.
SubscriptionState = TypeAliasType("SubscriptionState", Literal["active", "paused", "disabled"])
# Why a subscription is not active. "gone": its endpoint responded with 410. "loop": it leads back here.
SubscriptionReason = TypeAliasType("SubscriptionReason", Literal["operator", "log_went_back", "gone", "loop"])
Include: TypeAlias = Literal["body"]

# Each costs its deliverer up to IN_FLIGHT_MAX connections.
SUBSCRIPTIONS_MAX: Final = 100
VERDICTS_DEFAULT: Final[tuple[Verdict, ...]] = ("advanced",)
SECRET_BYTES: Final = 32
# How long the previous secret still signs after a rotation. In the meantime, the receiver gets the new one.
ROTATION_OVERLAP: Final = timedelta(hours=24)

# Every subscription, oldest first, or the one with the id $1.
LIST: Final = """
    SELECT subscription_id, url, verdicts, statuses, include, state, state_reason, created_at, log_id, position,
        delivered, failed, down_since, responses, previous_secret_until,
        (SELECT count(*) FROM public.held_orders AS held
         WHERE held.subscription_id = subscriptions.subscription_id) AS held_orders
    FROM public.subscriptions WHERE $1::uuid IS NULL OR subscription_id = $1
    ORDER BY created_at, subscription_id
"""
ADD: Final = """
    INSERT INTO public.subscriptions (url, verdicts, statuses, include, secret, log_id, position)
    SELECT $1, $2, $3, $4, $5, log_id, $6 FROM public.log_identity
    WHERE (SELECT count(*) FROM public.subscriptions) < $7
    RETURNING subscription_id
"""
LOCK: Final = "SELECT FROM public.subscriptions WHERE subscription_id = $1 FOR UPDATE"
# A higher revision makes the deliverer save and load the subscription again.
CHANGE: Final = """
    UPDATE public.subscriptions
    SET url = $2, verdicts = $3, statuses = $4, include = $5, revision = revision + 1
    WHERE subscription_id = $1
"""
# Another endpoint, or another selection, may accept or pass over what is held.
RETRY_ALL: Final = "UPDATE public.held_orders SET retry_requested = true WHERE subscription_id = $1"
# After the log has lost events: those of held orders are not what was held any more.
RELEASE_LOST: Final = """
    DELETE FROM public.held_orders AS held WHERE subscription_id = $1 AND NOT EXISTS (
        SELECT FROM public.order_events
        WHERE originator_id = held.order_no AND originator_version IN (held.version, held.version - 1)
            AND notification_id = held.position
    )
"""
PAUSE: Final = """
    UPDATE public.subscriptions SET state = 'paused', state_reason = 'operator'
    WHERE subscription_id = $1 AND state = 'active'
"""
# A position beyond the head never existed in this log.
RESUME: Final = """
    UPDATE public.subscriptions
    SET state = 'active', state_reason = NULL,
        position = least(position, $2),
        report_id = CASE WHEN state_reason = 'log_went_back' THEN NULL ELSE report_id END,
        log_id = (SELECT log_id FROM public.log_identity)
    WHERE subscription_id = $1
"""
# The events above the position are sent again. An order that is held behind it is read from the log again. A
# save of what is in flight must not move the position forward, so the generation rises too.
REPLAY: Final = """
    WITH moved AS (
        UPDATE public.subscriptions
        SET position = $2, report_id = NULL, revision = revision + 1, generation = generation + 1,
            log_id = (SELECT log_id FROM public.log_identity)
        WHERE subscription_id = $1
    )
    DELETE FROM public.held_orders WHERE subscription_id = $1 AND position > $2
"""
ROTATE: Final = """
    UPDATE public.subscriptions
    SET previous_secret = secret, previous_secret_until = $3, secret = $2, revision = revision + 1
    WHERE subscription_id = $1
"""
REMOVE: Final = "DELETE FROM public.subscriptions WHERE subscription_id = $1 RETURNING url"
SECRETS: Final = """
    SELECT secret, previous_secret, previous_secret_until FROM public.subscriptions WHERE subscription_id = $1
"""


class Response(TypedDict):
    """The result of one attempt to deliver. ``status`` is null if the endpoint did not respond."""

    at: str
    order_no: str
    version: int
    attempt: int
    status: int | None
    ms: int
    error: str | None


class Subscription(TypedDict):
    """A subscription, without its secret.

    Every event up to ``position`` is delivered or did not match, except those of held orders. ``lag_events``
    and ``lag_seconds`` are about the events above it, whether they match or not. ``delivered`` and ``failed``
    count attempts. ``down_since`` is since when all attempts have failed, null while the endpoint accepts
    events. ``responses`` has the latest of them, newest first.
    """

    subscription_id: UUID
    url: str
    verdicts: list[Verdict]
    statuses: list[Status]
    include: list[Include]
    state: SubscriptionState
    reason: SubscriptionReason | None
    created_at: datetime
    log_id: UUID
    position: int
    lag_events: int
    lag_seconds: float
    held_orders: int
    delivered: int
    failed: int
    down_since: datetime | None
    responses: list[Response]
    previous_secret_until: datetime | None


class SubscriptionWithSecret(Subscription):
    """A new subscription, or one with a new secret, which cannot be read again."""

    secret: str


class UnknownSubscriptionError(Exception):
    """There is no subscription with this id. ``str()`` names it."""

    def __init__(self, subscription_id: UUID | str) -> None:
        super().__init__(f"no subscription has the id {subscription_id}: see the list of subscriptions")


class SubscriptionError(Exception):
    """The subscription cannot be added or changed so. ``str()`` says why and what to do."""


class Declaration(NamedTuple):
    """What an operator declares about a subscription.

    Attributes:
        url: the endpoint, which was checked.
        verdicts: the verdicts of the events to send; empty for all.
        statuses: the orders' statuses after these events; empty for all.
        include: what the body of a message has besides.
    """

    url: str
    verdicts: Sequence[Verdict] = VERDICTS_DEFAULT
    statuses: Sequence[Status] = ()
    include: Sequence[Include] = ()


def parse_subscription_id(text: str) -> UUID:
    """Return a subscription's id.

    Raises:
        UnknownSubscriptionError: the text is not a UUID.
    """
    try:
        return UUID(text)
    except ValueError:
        raise UnknownSubscriptionError(text) from None


def make_secret() -> str:
    """Return a new secret, in the form of Standard Webhooks."""
    return SECRET_PREFIX + b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


async def list_subscriptions(connection: Connection) -> list[Subscription]:
    """Return every subscription, oldest first."""
    return await _read(connection, None)


async def find_subscription(connection: Connection, subscription_id: UUID) -> Subscription:
    """Return one subscription.

    Raises:
        UnknownSubscriptionError: there is none with this id.
    """
    found = await _read(connection, subscription_id)
    if not found:
        raise UnknownSubscriptionError(subscription_id)
    return found[0]


async def _read(connection: Connection, subscription_id: UUID | None) -> list[Subscription]:
    subscriptions = []
    lags: dict[int, tuple[int, float]] = {}
    for row in await connection.fetch(LIST, subscription_id):
        fields = dict(row)
        position = fields["position"]
        if position not in lags:
            lags[position] = await store.read_lag(connection, position)
        fields["reason"] = fields.pop("state_reason")
        # orjson encodes UUIDs, but not those of the driver's own class.
        for name in ("subscription_id", "log_id"):
            fields[name] = UUID(int=fields[name].int)
        fields["lag_events"], fields["lag_seconds"] = lags[position]
        until = fields["previous_secret_until"]
        fields["previous_secret_until"] = until if until is not None and until > datetime.now(UTC) else None
        # In the order of the declaration, which is that of the documentation.
        subscriptions.append(
            cast("Subscription", {name: fields[name] for name in Subscription.__annotations__})
        )
    return subscriptions


async def add_subscription(
    connection: Connection, declaration: Declaration, position: int | None, actor: Actor
) -> SubscriptionWithSecret:
    """Add a subscription, and return it with its secret.

    Args:
        connection: a connection that is not in a transaction.
        declaration: what to send, and where.
        position: the events above it are sent; None for the head of the log.
        actor: the operator.

    Raises:
        SubscriptionError: there are SUBSCRIPTIONS_MAX already.
    """
    secret = make_secret()
    async with connection.transaction():
        start = await store.head_position(connection) if position is None else position
        subscription_id = await connection.fetchval(ADD, *declaration, secret, start, SUBSCRIPTIONS_MAX)
        if subscription_id is None:
            raise SubscriptionError(f"{SUBSCRIPTIONS_MAX} subscriptions exist already: remove one first")
        await record_operation(
            connection, actor, "subscription_added", str(subscription_id), f"from position {start}"
        )
        added = await find_subscription(connection, subscription_id)
    return {**added, "secret": secret}


async def change_subscription(
    connection: Connection,
    subscription_id: UUID,
    declaration: Declaration,
    changed: Sequence[str],
    actor: Actor,
) -> None:
    """Change what a subscription sends, or where.

    Args:
        connection: a connection in a transaction.
        subscription_id: the subscription.
        declaration: its whole new declaration.
        changed: the names of the changed members, for the record of operations.
        actor: the operator.
    """
    await connection.execute(CHANGE, subscription_id, *declaration)
    await connection.execute(RETRY_ALL, subscription_id)
    await record_operation(connection, actor, "subscription_changed", str(subscription_id), ", ".join(changed))


async def lock_subscription(connection: Connection, subscription_id: UUID) -> Subscription:
    """Return a subscription that no other operator can change until the end of the transaction.

    Raises:
        UnknownSubscriptionError: there is none with this id.
    """
    await connection.execute(LOCK, subscription_id)
    return await find_subscription(connection, subscription_id)


async def pause_subscription(connection: Connection, subscription_id: UUID, actor: Actor) -> None:
    """Stop the deliveries of a subscription, in a transaction. What is in flight is completed."""
    if await connection.execute(PAUSE, subscription_id) == "UPDATE 1":
        await record_operation(connection, actor, "subscription_paused", str(subscription_id), "operator")


async def resume_subscription(connection: Connection, subscription_id: UUID, actor: Actor) -> None:
    """Make a subscription active again, in a transaction. A position beyond the head becomes the head."""
    reason = (await lock_subscription(connection, subscription_id))["reason"]
    if reason == "log_went_back":
        await connection.execute(RELEASE_LOST, subscription_id)
    elif reason in {"gone", "loop"}:
        # The operator has corrected the endpoint.
        await connection.execute(RETRY_ALL, subscription_id)
    await connection.execute(RESUME, subscription_id, await store.head_position(connection))
    await record_operation(connection, actor, "subscription_resumed", str(subscription_id))


async def replay_subscription(
    connection: Connection, subscription_id: UUID, position: int, actor: Actor
) -> None:
    """Send the events above a position again, each under the same id as before.

    Args:
        connection: a connection that is not in a transaction.
        subscription_id: the subscription.
        position: a position of the log that is not above the subscription's.
        actor: the operator.

    Raises:
        SubscriptionError: the position is above the subscription's: it would leave events out.
    """
    async with connection.transaction():
        present = (await lock_subscription(connection, subscription_id))["position"]
        if position > present:
            raise SubscriptionError(
                f"a replay goes back, but position {position} is above the subscription's, {present}: "
                "to leave events out, remove the subscription and add one that begins there"
            )
        await connection.execute(REPLAY, subscription_id, position)
        await record_operation(
            connection, actor, "subscription_replayed", str(subscription_id), f"from position {position}"
        )


async def rotate_secret(connection: Connection, subscription_id: UUID, actor: Actor) -> SubscriptionWithSecret:
    """Give a subscription a new secret, and return both. The previous one also signs for ROTATION_OVERLAP.

    Raises:
        UnknownSubscriptionError: there is none with this id.
    """
    secret = make_secret()
    async with connection.transaction():
        await connection.execute(ROTATE, subscription_id, secret, datetime.now(UTC) + ROTATION_OVERLAP)
        rotated = await find_subscription(connection, subscription_id)
        await record_operation(connection, actor, "secret_rotated", str(subscription_id))
    return {**rotated, "secret": secret}


async def remove_subscription(connection: Connection, subscription_id: UUID, actor: Actor) -> None:
    """Remove a subscription with its held orders.

    Raises:
        UnknownSubscriptionError: there is none with this id.
    """
    async with connection.transaction():
        if await connection.fetchval(REMOVE, subscription_id) is None:
            raise UnknownSubscriptionError(subscription_id)
        await record_operation(connection, actor, "subscription_removed", str(subscription_id))


async def begin_test(
    connection: Connection, subscription_id: UUID, actor: Actor
) -> tuple[Subscription, tuple[str, ...]]:
    """Record that an operator tests a subscription; return it and the secrets that sign, the newest first.

    Raises:
        UnknownSubscriptionError: there is no subscription with this id.
    """
    found = await find_subscription(connection, subscription_id)
    row = await connection.fetchrow(SECRETS, subscription_id)
    if row is None:
        raise UnknownSubscriptionError(subscription_id)
    await record_operation(connection, actor, "subscription_tested", str(subscription_id))
    return found, valid_secrets(row, datetime.now(UTC))


def valid_secrets(row: Mapping[str, Any] | asyncpg.Record, now: datetime) -> tuple[str, ...]:
    """Return the secrets of a row that sign at a time, the newest first."""
    until = row["previous_secret_until"]
    return (row["secret"], row["previous_secret"]) if until is not None and until > now else (row["secret"],)
