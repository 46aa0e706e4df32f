"""The log in the database: one statement appends events; reads return batches in commit or in version order.

The table has the layout that the ``eventsourcing`` library's own PostgreSQL recorder uses for an application
named ``order`` with text ids. Every function takes a connection.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import asyncpg
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.order import NEW_ORDER, Order, OrderState, evolve
from domain.transitions import TABLE
from projections.postgres import Connection
from service.database.sequences import require_rising_numbers
from service.event_log.codec import (
    StatusReported,
    UndecodableEventError,
    decode_event,
    encode_event,
    read_fields,
    read_status_reported,
)

# The channel on which PostgreSQL notifies listeners of new events.
CHANNEL: Final = "order_events"
# Every writer of the log takes this lock, in any process. The number is the word "ORDER" in ASCII.
APPEND_LOCK: Final = 0x4F52444552
# A batch is limited by rows and by bytes, since a body may be a thousand times larger than usual.
BATCH_BYTES_MAX: Final = 2 * 1024 * 1024
# Counting the events behind the head stops here: a larger number is no more useful.
LAG_EVENTS_MAX: Final = 100_000


class VersionTakenError(Exception):
    """Another writer recorded one of these versions first. The append recorded nothing."""


class LogWentBackError(Exception):
    """The log no longer has an event that this process has seen. The append recorded nothing."""


# Of the log's constraints, the only one that a report can meet: two writers decided on the same version.
VERSIONS_KEY: Final = "order_events_pkey"
UNREPLICATED: Final = "the commit's wait for a standby was cancelled"


class UnreplicatedCommitError(ConnectionError):
    """A commit is durable on this server, but its wait for a standby was cancelled."""


class SeenEvent(NamedTuple):
    """An event that this process has read or committed: its place in the log, and when it was recorded.

    A failover or a restore loses the end of a log, never its middle. So a log that still has this event has all
    earlier events that this process has seen, and has them unchanged. The report's id would not do: a report
    whose append was lost may be appended again, to another log, at the same position and version.
    """

    position: int
    order_no: str
    version: int
    recorded_at: datetime


class Appended(NamedTuple):
    """The positions of events that were appended together, and the last of them."""

    positions: list[int]
    last: SeenEvent


class RecordedEvent(NamedTuple):
    """An event in the log, not decoded."""

    position: int
    order_no: str
    version: int
    topic: str
    state: bytes
    recorded_at: datetime

    @property
    def report_id(self) -> str | None:
        """The id of the event's report, None if the event's bytes are unreadable."""
        return (read_fields(self.state) or {}).get("report_id")


class LogEvent(TypedDict):
    """One recorded event in the log of all orders; ``data`` is null if this release does not know it."""

    position: int
    order_no: str
    version: int
    type: str
    recorded_at: datetime
    data: StatusReported | None


def to_log_event(event: RecordedEvent, *, with_bodies: bool) -> LogEvent:
    """Return a recorded event as the API shows it.

    Args:
        event: the event.
        with_bodies: whether the reader may see the body and the sender's address.
    """
    return {
        "position": event.position,
        "order_no": event.order_no,
        "version": event.version,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": read_status_reported(event.topic, event.state, with_bodies=with_bodies),
    }


# The statement itself takes the lock, which saves a round trip. Only rows of the join draw a position, and the
# join has no rows until the lock is held, so positions increase in the order of the commits. It appends nothing
# if the sequence is behind the log, as after a cut-over by logical replication: no reader would see the event.
# Nor does it append if the log has lost an event that the decisions rely on. The statement locks the table
# before it looks, so that no restore can come in between.
APPEND: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state)
    SELECT event.*
    FROM (SELECT pg_advisory_xact_lock($5), pg_notify('order_events', '')) AS held,
         unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[]) AS event
    WHERE (SELECT last_value - 1 + is_called::integer FROM order_events_notification_id_seq)
        >= coalesce((SELECT max(notification_id) FROM order_events), 0)
      AND NOT EXISTS (
        SELECT FROM unnest($6::bigint[], $7::text[], $8::bigint[], $9::timestamptz[])
            AS seen (position, order_no, version, recorded_at)
        WHERE NOT EXISTS (
            SELECT FROM order_events AS logged
            WHERE notification_id = seen.position AND originator_id = seen.order_no
              AND originator_version = seen.version AND logged.recorded_at = seen.recorded_at))
    RETURNING originator_id, originator_version, notification_id, recorded_at
"""

CLEAR_NOTIFICATIONS: Final = "SELECT pg_notification_queue_usage()"
# The same without the notification, which is only a hint: listeners also poll.
APPEND_SILENTLY: Final = APPEND.replace(", pg_notify('order_events', '')", "")

# Inserting no rows takes the table's lock before the advisory lock, as the append and the library's recorder
# do: another order could deadlock. A grant on columns does not allow LOCK TABLE.
LOCK_TABLE: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state)
    SELECT '', 0, '', '' WHERE false
"""
BEGIN_LOCKED: Final = f"BEGIN; {LOCK_TABLE}"
TAKE_APPEND_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"

# A transaction that has written something waits at its end for the standby, and so for all commits before it.
WRITE_MESSAGE: Final = "SELECT pg_logical_emit_message(true, 'order_tracking', '')"

# When the last report arrived or, before the first one, when the schema was created.
LAST_ARRIVAL: Final = """
    SELECT coalesce(
        (SELECT recorded_at FROM order_events ORDER BY notification_id DESC LIMIT 1),
        (SELECT min(applied_at) FROM public.schema_version))
"""

# The last event of each of these orders, if it lies above the version that is known.
LAST_EVENTS: Final = """
    SELECT last.notification_id, last.recorded_at, requested.order_no, last.originator_version, last.topic,
        last.state
    FROM unnest($1::text[], $2::bigint[]) AS requested (order_no, known_version),
    LATERAL (
        SELECT notification_id, recorded_at, originator_version, topic, state
        FROM order_events
        WHERE originator_id = requested.order_no AND originator_version > requested.known_version
        ORDER BY originator_version DESC
        LIMIT 1
    ) AS last
"""

# The events with these order numbers and versions.
EVENTS_AT: Final = """
    SELECT logged.notification_id, logged.recorded_at,
        logged.originator_id, logged.originator_version, logged.topic, logged.state
    FROM unnest($1::text[], $2::bigint[]) AS requested (order_no, version)
    JOIN order_events AS logged
      ON logged.originator_id = requested.order_no AND logged.originator_version = requested.version
"""

HAS_SEEN: Final = """
    SELECT EXISTS (
        SELECT FROM order_events
        WHERE notification_id = $1 AND originator_id = $2 AND originator_version = $3 AND recorded_at = $4)
"""

# A batch of one order's events above a version. The first event is returned whatever its size.
STREAM: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
    FROM (
        SELECT *, sum(length(state)) OVER (ORDER BY originator_version) - length(state) AS bytes_before
        FROM order_events
        WHERE originator_id = $1 AND originator_version > $2
        ORDER BY originator_version
        LIMIT $3
    ) AS batch
    WHERE bytes_before < $4
    ORDER BY originator_version
"""

# An order's version at a position. A reader that resumes is mostly near the order's end.
VERSION_AT: Final = """
    SELECT originator_version FROM order_events
    WHERE originator_id = $1 AND notification_id <= $2
    ORDER BY originator_version DESC LIMIT 1
"""

# A batch of the log above a position. The first event is returned whatever its size.
LOG: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
    FROM (
        SELECT *, sum(length(state)) OVER (ORDER BY notification_id) - length(state) AS bytes_before
        FROM order_events
        WHERE notification_id > $1
        ORDER BY notification_id
        LIMIT $2
    ) AS batch
    WHERE bytes_before < $3
    ORDER BY notification_id
"""

# The events at some positions, in their order. The first event is returned whatever its size.
AT_POSITIONS: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
    FROM (
        SELECT *, sum(length(state)) OVER (ORDER BY notification_id) - length(state) AS bytes_before
        FROM unnest($1::bigint[]) AS requested (position)
        CROSS JOIN LATERAL (
            SELECT * FROM order_events WHERE notification_id = requested.position LIMIT 1
        ) AS logged
    ) AS batch
    WHERE bytes_before < $2
    ORDER BY notification_id
"""

# Of whatever server the connection is to, and whatever its search path.
HEAD: Final = "SELECT notification_id FROM public.order_events ORDER BY notification_id DESC LIMIT 1"
OLDEST_AFTER: Final = """
    SELECT recorded_at FROM order_events WHERE notification_id > $1 ORDER BY notification_id LIMIT 1
"""
COUNT_AFTER: Final = """
    SELECT count(*) FROM (SELECT FROM order_events WHERE notification_id > $1 LIMIT $2) AS behind
"""


async def append(
    connection: Connection,
    events: Sequence[Order.StatusReported],
    seen: Sequence[SeenEvent] = (),
    *,
    notify: bool = True,
) -> Appended:
    """Append events in one statement, all or none, and return their positions.

    Args:
        connection: a connection to the log.
        events: the events, each with the next version of its order.
        seen: the events that their decisions rely on, which the log must still have.
        notify: notify the listeners. In a transaction they never are: a full queue would fail its commit.

    Raises:
        asyncpg.ProgramLimitExceededError: the notification queue is full. Nothing was appended.
        VersionTakenError: another writer recorded one of the versions first.
        LogWentBackError: the log has lost one of ``seen``.
        UnsupportedServerError: the next position would lie within the log.
    """
    values = (
        [event.originator_id for event in events],
        [event.originator_version for event in events],
        [event.TOPIC for event in events],
        [encode_event(event) for event in events],
        APPEND_LOCK,
        [event.position for event in seen],
        [event.order_no for event in seen],
        [event.version for event in seen],
        [event.recorded_at for event in seen],
    )
    try:
        statement = APPEND if notify and not connection.is_in_transaction() else APPEND_SILENTLY
        rows = await connection.fetch(statement, *values)
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != VERSIONS_KEY:
            raise
        raise VersionTakenError(str(error)) from error
    if not rows:
        await require_rising_numbers(connection)
        raise LogWentBackError("the log has lost events that this process has seen")
    # An event is recorded only if the server returned its position; the absence of an error is not enough.
    places = {(order_no, version): place for order_no, version, *place in rows}
    return _appended(events, [places[event.originator_id, event.originator_version] for event in events])


def _appended(events: Sequence[Order.StatusReported], places: Sequence[Sequence[Any]]) -> Appended:
    last, (position, recorded_at) = events[-1], places[-1]
    seen = SeenEvent(position, last.originator_id, last.originator_version, recorded_at)
    return Appended([position for position, _ in places], seen)


async def clear_notifications(connection: Connection) -> None:
    """Drop the notifications that every listener has read. PostgreSQL does not, once the queue is full."""
    await connection.execute(CLEAR_NOTIFICATIONS)


async def prepare(connection: Connection) -> None:
    """Let the server parse the statements that run under the append lock.

    A process that is suspended between the parsing and the execution of a statement is in no state that the
    server limits: it would keep the lock for as long as it is suspended.
    """
    # A lock that no other session takes, and no event.
    own_lock = (APPEND_LOCK << 20) + connection.get_server_pid()
    await connection.fetch(APPEND_SILENTLY, [], [], [], [], own_lock, [], [], [], [])
    await connection.fetch(LAST_EVENTS, [], [])
    await connection.fetch(EVENTS_AT, [], [])
    await connection.fetch(WRITE_MESSAGE)
    await connection.fetchval(HAS_SEEN, 0, "", 0, datetime.now(UTC))


async def take_append_lock(connection: Connection) -> None:
    """Keep all other writers from appending until the end of the transaction, which BEGIN_LOCKED began."""
    await connection.fetchval(TAKE_APPEND_LOCK, APPEND_LOCK)


async def await_standby(connection: Connection) -> None:
    """Make the transaction's end wait until a synchronous standby, if there is one, has all earlier commits."""
    await connection.execute(WRITE_MESSAGE)


async def order_states(connection: Connection, order_nos: Iterable[str]) -> dict[str, OrderState]:
    """Return the states of these orders; see ``read_states``."""
    states, _ = await read_states(connection, order_nos)
    return states


async def read_states(
    connection: Connection, order_nos: Iterable[str], known: Mapping[str, OrderState] = MappingProxyType({})
) -> tuple[dict[str, OrderState], SeenEvent | None]:
    """Return the states of these orders, each from its last event alone; NEW_ORDER if an order has none.

    Args:
        connection: a connection to the log.
        order_nos: the orders.
        known: states that may be stale. Only the events of later versions are read.

    Returns:
        The states, and the newest event that was read, if any.

    Raises:
        UndecodableEventError: an order's last event cannot be read, or left the order in a status that the
            transition table does not have.
    """
    states = {order_no: known.get(order_no, NEW_ORDER) for order_no in order_nos}
    versions = [state.version for state in states.values()]
    newest: SeenEvent | None = None
    rows = await connection.fetch(LAST_EVENTS, [*states], versions)
    for position, recorded_at, order_no, version, topic, state in rows:
        event = decode_event(order_no, version, topic, state)
        if (event.status, event.leg) not in TABLE:
            raise UndecodableEventError(f"the transition table does not have the status of {order_no}")
        states[order_no] = evolve(NEW_ORDER, event)
        if newest is None or position > newest.position:
            newest = SeenEvent(position, order_no, version, recorded_at)
    return states, newest


async def find_appended(connection: Connection, events: Sequence[Order.StatusReported]) -> Appended | None:
    """Return the positions of events whose append was not confirmed, None if it was not committed.

    Call this under the append lock, so that the transaction that may have written them has ended.
    """
    rows = await connection.fetch(
        EVENTS_AT,
        [event.originator_id for event in events],
        [event.originator_version for event in events],
    )
    places = {_report_id(*event): (position, recorded_at) for position, recorded_at, *event in rows}
    found = [places[event.report_id] for event in events if event.report_id in places]
    if not found:
        return None
    if len(found) != len(events):
        raise RuntimeError("an append was committed in part, although it is one statement")
    return _appended(events, found)


async def has_event(connection: Connection, seen: SeenEvent) -> bool:
    """Return whether the log still has an event."""
    has: bool = await connection.fetchval(HAS_SEEN, *seen)
    return has


def _report_id(order_no: str, version: int, topic: str, state: bytes) -> str | None:
    try:
        return decode_event(order_no, version, topic, state).report_id
    except UndecodableEventError:
        # Another writer's event: this process can read its own.
        return None


async def read_stream(connection: Connection, order_no: str, after: int, limit: int) -> list[RecordedEvent]:
    """Return one order's next events above version ``after``, at most ``limit`` and about BATCH_BYTES_MAX."""
    return [
        RecordedEvent(*row) for row in await connection.fetch(STREAM, order_no, after, limit, BATCH_BYTES_MAX)
    ]


async def version_at(connection: Connection, order_no: str, position: int) -> int:
    """Return an order's version at a position of the log, 0 if its first event lies above."""
    return await connection.fetchval(VERSION_AT, order_no, position) or 0


async def read_log(connection: Connection, after: int, limit: int) -> list[RecordedEvent]:
    """Return the next events above a position in commit order, at most ``limit`` and about BATCH_BYTES_MAX."""
    return [RecordedEvent(*row) for row in await connection.fetch(LOG, after, limit, BATCH_BYTES_MAX)]


async def read_positions(connection: Connection, positions: Sequence[int]) -> list[RecordedEvent]:
    """Return the first of the events at these positions, about BATCH_BYTES_MAX of them."""
    return [RecordedEvent(*row) for row in await connection.fetch(AT_POSITIONS, positions, BATCH_BYTES_MAX)]


async def last_arrival(connection: Connection) -> datetime:
    """Return when the last event was recorded; before the first one, when the log was created."""
    last: datetime = await connection.fetchval(LAST_ARRIVAL)
    return last


async def head_position(connection: Connection) -> int:
    """Return the highest position in the log, 0 if it is empty."""
    head: int | None = await connection.fetchval(HEAD)
    return head or 0


async def read_lag_seconds(connection: Connection, position: int) -> float:
    """Return how long ago the first event above a position was recorded; 0 if there is no such event."""
    recorded_at: datetime | None = await connection.fetchval(OLDEST_AFTER, position)
    return 0.0 if recorded_at is None else max(0.0, (datetime.now(UTC) - recorded_at).total_seconds())


async def read_lag(connection: Connection, position: int) -> tuple[int, float]:
    """Return how many events lie above a position, LAG_EVENTS_MAX at most, and the first one's age in s."""
    events: int = await connection.fetchval(COUNT_AFTER, position, LAG_EVENTS_MAX)
    return events, await read_lag_seconds(connection, position) if events else 0.0
