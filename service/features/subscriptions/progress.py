"""What a deliverer saves: the position, the held orders and the counts. And which process delivers.

Nothing here waits for the disk (synchronous_commit is off): a crash of the server loses at most the latest
saves, whose messages are then sent again.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple
from uuid import UUID

from service.database.connections import DedicatedConnection
from service.database.operations import Actor, record_operation
from service.event_log.follow import HAS_PLACE, Place, PlaceLostError, has_place
from service.features.subscriptions.held_orders import apply_requests
from service.features.subscriptions.holding import Held
from service.features.subscriptions.message import Selection
from service.features.subscriptions.subscription import (
    Declaration,
    Response,
    SubscriptionReason,
    SubscriptionState,
    valid_secrets,
)

# The service's own actions in the record of operations.
SERVICE: Final = Actor("service", None)

STATES: Final = "SELECT subscription_id, state, revision, state_reason FROM public.subscriptions"
# The session that holds this lock delivers the subscription. The generation is the fence: see SAVE.
TRY_LEAD: Final = "SELECT pg_try_advisory_lock(hashtextextended('order_tracking subscription ' || $1, 0))"
GIVE_UP_LEAD: Final = "SELECT pg_advisory_unlock(hashtextextended('order_tracking subscription ' || $1, 0))"
TAKE: Final = """
    UPDATE public.subscriptions SET generation = generation + 1
    WHERE subscription_id = $1 AND state = 'active'
    RETURNING generation, revision, url, verdicts, statuses, include, secret, previous_secret,
        previous_secret_until, log_id, (SELECT log_id FROM public.log_identity) AS present_log_id, position,
        report_id
"""
END: Final = """
    UPDATE public.subscriptions SET state = $4, state_reason = $5
    WHERE subscription_id = $1 AND generation = $2 AND revision = $3 AND state = 'active'
"""
PAUSE_ALL: Final = """
    UPDATE public.subscriptions SET state = 'paused', state_reason = $1 WHERE state = 'active'
    RETURNING subscription_id
"""
HELD: Final = """
    SELECT order_no, version, position, held_since, attempts, last_attempt_at, next_attempt_at, last_error
    FROM public.held_orders WHERE subscription_id = $1
"""
# Saves nothing if an operator has changed the subscription since, another process has taken it over, the log
# has lost what was read, or an order was erased of which an endpoint's words are to be saved.
SAVE: Final = f"""
    WITH proof AS MATERIALIZED (
        SELECT {HAS_PLACE.format(position="$18::bigint", report_id="$19")} AS holds,
            NOT EXISTS (
                SELECT FROM public.erasures WHERE erasure_id > $20 AND order_no = ANY($21::text[])
            ) AS has_heard
    ), saved AS (
        UPDATE public.subscriptions
        SET position = $3, report_id = $4, delivered = delivered + $5, failed = failed + $6,
            responses = coalesce($7::json, responses), down_since = $17
        WHERE subscription_id = $1 AND generation = $2 AND (SELECT holds AND has_heard FROM proof)
        RETURNING subscription_id
    ), held AS (
        INSERT INTO public.held_orders AS held (subscription_id, order_no, version, position, held_since,
            attempts, last_attempt_at, next_attempt_at, last_error)
        SELECT saved.subscription_id, changed.* FROM saved, unnest($8::text[], $9::bigint[], $10::bigint[],
            $11::timestamptz[], $12::integer[], $13::timestamptz[], $14::timestamptz[], $15::text[]) AS changed
        ON CONFLICT (subscription_id, order_no) DO UPDATE SET version = excluded.version,
            position = excluded.position, attempts = excluded.attempts,
            last_attempt_at = excluded.last_attempt_at, next_attempt_at = excluded.next_attempt_at,
            last_error = excluded.last_error
    ), caught_up AS (
        DELETE FROM public.held_orders USING saved
        WHERE held_orders.subscription_id = saved.subscription_id AND order_no = ANY($16::text[])
    )
    SELECT (SELECT holds FROM proof), (SELECT has_heard FROM proof), EXISTS (SELECT FROM saved)
"""  # noqa: S608 - our own texts


class Loaded(NamedTuple):
    """A subscription as its deliverer needs it.

    Attributes:
        is_other_log: whether the position belongs to another log, as after a restore.
        has_lost_events: whether the log has lost events that were read for the subscription.
    """

    generation: int
    revision: int
    url: str
    selection: Selection
    secrets: tuple[str, ...]
    secrets_until: datetime | None
    place: Place
    is_other_log: bool
    has_lost_events: bool
    held: dict[str, Held]


class Changes(NamedTuple):
    """What has changed since the last save, and the proof that the log still has what was read.

    Attributes:
        place: everything up to it is done, or its order is held.
        delivered: the number of successful attempts since the last save.
        failed: the number of the others.
        responses: the latest responses; None to keep those that were saved.
        held: the orders whose holding has changed, None for those that are held no longer.
        down_since: since when all attempts have failed; None while the endpoint is up.
        read: up to where the log was read, which it must still have.
        erasure_id: the last erasure that the texts of ``responses`` and ``held`` have lost.
    """

    place: Place
    delivered: int
    failed: int
    responses: Sequence[Response] | None
    held: Mapping[str, Held | None]
    down_since: datetime | None
    read: Place
    erasure_id: int


class Present(NamedTuple):
    """The present state of a subscription in the database."""

    state: SubscriptionState
    revision: int
    reason: SubscriptionReason | None


class ErasedError(Exception):
    """An order was erased, and what is to be saved may repeat what was erased."""


class LeadLostError(ConnectionError):
    """The connection with the locks was lost: another process may deliver by now."""


class Progress:
    """Loads and saves subscriptions, on the connection with the locks of those that this process delivers.

    Args:
        dedicated: the connection.
    """

    def __init__(self, dedicated: DedicatedConnection) -> None:
        self._dedicated = dedicated

    @property
    def session(self) -> int:
        """The number of the present connection. Locks that were taken with an earlier one are lost."""
        return self._dedicated.times_opened

    async def read_states(self) -> dict[UUID, Present]:
        """Return the state of every subscription."""
        async with self._dedicated.connection() as connection:
            return {row[0]: Present(*row[1:]) for row in await connection.fetch(STATES)}

    async def try_lead(self, subscription_id: UUID) -> bool:
        """Return whether this process delivers the subscription from now on."""
        async with self._dedicated.connection() as connection:
            return bool(await connection.fetchval(TRY_LEAD, str(subscription_id)))

    async def give_up_lead(self, subscription_id: UUID) -> None:
        """Let another process deliver the subscription."""
        async with self._dedicated.connection() as connection:
            await connection.fetchval(GIVE_UP_LEAD, str(subscription_id))

    async def has(self, place: Place) -> bool:
        """Return whether the log still has a place."""
        async with self._dedicated.connection() as connection:
            return await has_place(connection, place)

    async def load(
        self, subscription_id: UUID, session: int, now: datetime, reached: Place | None
    ) -> Loaded | None:
        """Take a subscription over, and return it; None if it is not active any more.

        Args:
            subscription_id: the subscription.
            session: the session with the lock.
            now: the time.
            reached: up to where this process has ever read for it. The saved place may have gone back with the
                log, and what was delivered above it is proved by this alone.

        Raises:
            LeadLostError: the session with the lock has ended.
        """
        async with self._dedicated.connection() as connection:
            self._require(session)
            row = await connection.fetchrow(TAKE, subscription_id)
            if row is None:
                return None
            await apply_requests(connection, subscription_id)
            held = {order_no: Held(*rest) for order_no, *rest in await connection.fetch(HELD, subscription_id)}
            place = Place(row["position"], row["report_id"])
            has_lost_events = not await has_place(connection, place)
            if reached is not None:
                has_lost_events = has_lost_events or not await has_place(connection, reached)
        declaration = Declaration(row["url"], row["verdicts"], row["statuses"], row["include"])
        secrets = valid_secrets(row, now)
        return Loaded(
            generation=row["generation"],
            revision=row["revision"],
            url=row["url"],
            selection=Selection.of(declaration),
            secrets=secrets,
            secrets_until=row["previous_secret_until"] if len(secrets) > 1 else None,
            place=place,
            is_other_log=row["log_id"] != row["present_log_id"],
            has_lost_events=has_lost_events,
            held=held,
        )

    async def save(self, subscription_id: UUID, session: int, generation: int, changes: Changes) -> bool:
        """Save what was delivered. Return whether the subscription has not changed in the meantime.

        Args:
            subscription_id: the subscription.
            session: the session with the lock.
            generation: the generation that was loaded.
            changes: what to save.

        Raises:
            ErasedError: an order of ``responses`` or ``held`` was erased since. Nothing was saved.
            PlaceLostError: the log lacks ``read``.
            LeadLostError: the session with the lock has ended.
        """
        kept = [(order_no, one) for order_no, one in changes.held.items() if one is not None]
        columns = [
            [order_no for order_no, _ in kept],
            [one.version for _, one in kept],
            [one.position for _, one in kept],
            [one.since for _, one in kept],
            [one.attempts for _, one in kept],
            [one.last_attempt_at for _, one in kept],
            [one.next_attempt_at for _, one in kept],
            [one.last_error for _, one in kept],
        ]
        quoted = {order_no for order_no, one in kept if one.last_error is not None}
        quoted |= {one["order_no"] for one in changes.responses or () if one["error"] is not None}
        caught_up = [order_no for order_no, one in changes.held.items() if one is None]
        async with self._dedicated.connection() as connection:
            self._require(session)
            counted = (changes.delivered, changes.failed, changes.responses)
            values = (subscription_id, generation, *changes.place, *counted, *columns, caught_up)
            proof = (changes.down_since, *changes.read, changes.erasure_id, [*quoted])
            ((is_proved, has_heard, is_saved),) = await connection.fetch(SAVE, *values, *proof)
        if not is_proved:
            raise PlaceLostError(changes.read)
        if not has_heard:
            raise ErasedError
        return bool(is_saved)

    async def end(
        self, subscription_id: UUID, loaded: Loaded, state: SubscriptionState, reason: SubscriptionReason
    ) -> bool:
        """Stop the deliveries of a subscription until an operator resumes them.

        Returns:
            False if an operator has changed it since it was loaded: the reason may be gone.
        """
        place = (subscription_id, loaded.generation, loaded.revision)
        async with self._dedicated.transaction() as connection:
            if await connection.execute(END, *place, state, reason) != "UPDATE 1":
                return False
            await record_operation(connection, SERVICE, "subscription_paused", str(subscription_id), reason)
        return True

    async def pause_all(self) -> list[UUID]:
        """Pause every subscription, since the log has lost events; return those that were active.

        Which of these events an endpoint has accepted, from whichever process, is unknown.
        """
        reason: SubscriptionReason = "log_went_back"
        async with self._dedicated.transaction() as connection:
            paused = [row[0] for row in await connection.fetch(PAUSE_ALL, reason)]
            for subscription_id in paused:
                await record_operation(connection, SERVICE, "subscription_paused", str(subscription_id), reason)
        return paused

    def _require(self, session: int) -> None:
        if self.session != session:
            raise LeadLostError("the connection with the locks of the subscriptions was lost")
