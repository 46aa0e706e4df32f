"""The log: events appended in one statement, positions in the order of their commits.

The table is laid out as the ``eventsourcing`` library's own PostgreSQL recorder would (an application named
``order``, with text ids), and the bytes are those of its JSON transcoder, so either can read and write the
other's orders.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from datetime import datetime
from typing import Any, Final, NamedTuple

import asyncpg
import orjson
from eventsourcing.persistence import DatetimeAsISO, Mapper, StoredEvent, Transcoder

from domain.order import UNHEARD, Order, Report, Standing
from domain.transitions import TABLE
from service.database.connections import Connection, HeldConnection

# Shared by every writer of the log, of whatever process; the number is the word "ORDER" in ASCII.
APPEND_LOCK: Final = 0x4F52444552

_DATETIME: Final = DatetimeAsISO()


def _encode_datetime(time: datetime) -> dict[str, str]:
    return {"_type_": "datetime_iso", "_data_": time.isoformat()}


class OrjsonTranscoder(Transcoder):
    """The library's JSONTranscoder, byte for byte, by orjson."""

    def encode(self, obj: Any) -> bytes:
        """Return the bytes that the library's own transcoder would."""
        return orjson.dumps(obj, default=self._encode_obj, option=orjson.OPT_PASSTHROUGH_DATETIME)

    def decode(self, data: bytes) -> Any:
        """Return what was encoded, typed values included."""
        return self._restore(orjson.loads(data))

    @staticmethod
    def _encode_obj(obj: Any) -> dict[str, str]:
        if isinstance(obj, datetime):
            return _encode_datetime(obj)
        raise TypeError(f"{type(obj)} has no place in an event")

    def _restore(self, value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"_type_", "_data_"}:
                if value["_type_"] != _DATETIME.name:
                    raise TypeError(f"an event holds a value of the unknown type {value['_type_']!r}")
                return _DATETIME.decode(value["_data_"])
            return {key: self._restore(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._restore(item) for item in value]
        return value


MAPPER: Final[Mapper[str]] = Mapper(OrjsonTranscoder())

_CLASS_VERSION: Final = getattr(Order.StatusReported, "class_version", 1)
_FIELDS: Final = frozenset(field.name for field in fields(Order.StatusReported))
_STATE_FIELDS: Final = _FIELDS - {"originator_id", "originator_version"}


def encode_event(event: Order.StatusReported) -> bytes:
    """Return the bytes that the mapper would store, in a third of its time."""
    state = vars(event).copy()
    del state["originator_id"], state["originator_version"]
    state["timestamp"] = _encode_datetime(event.timestamp)
    if event.occurred_at is not None:
        state["occurred_at"] = _encode_datetime(event.occurred_at)
    if event.previous_since is not None:
        state["previous_since"] = _encode_datetime(event.previous_since)
    return orjson.dumps(state)


class UndecodableEventError(Exception):
    """What lies in the log is not an event that this release can read."""


def decode_event(order_no: str, version: int, topic: str, state: bytes) -> Order.StatusReported:
    """Return a recorded event, in its present form.

    The common case, an event of the present class version, takes a third of the mapper's time.

    Raises:
        UndecodableEventError: the bytes, their topic or their class version are not ours to read.
    """
    try:
        values = orjson.loads(state)
        if topic == Order.StatusReported.TOPIC and values.keys() == _STATE_FIELDS:
            values["timestamp"] = datetime.fromisoformat(values["timestamp"]["_data_"])
            if values["occurred_at"] is not None:
                values["occurred_at"] = datetime.fromisoformat(values["occurred_at"]["_data_"])
            if values["previous_since"] is not None:
                values["previous_since"] = datetime.fromisoformat(values["previous_since"]["_data_"])
            values["originator_id"] = order_no
            values["originator_version"] = version
            event = object.__new__(Order.StatusReported)
            object.__setattr__(event, "__dict__", values)
            return event
        return _decode_by_mapper(StoredEvent(order_no, version, topic, state), values)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UndecodableEventError(f"{type(error).__name__}: {reason}") from error


def _decode_by_mapper(stored: StoredEvent, values: dict[str, Any]) -> Order.StatusReported:
    """Decode what may be of an earlier class version; the mapper would take a later one for the present."""
    if values.get("class_version", 1) > _CLASS_VERSION:
        raise ValueError("it was written by a later release")
    event = MAPPER.to_domain_event(stored)
    if not isinstance(event, Order.StatusReported) or vars(event).keys() != _FIELDS:
        raise TypeError(f"{stored.topic} with these fields is not an event of an order")
    return event


def plain_fields(state: bytes) -> dict[str, Any] | None:
    """Return a recorded event's fields as plain JSON values, None where they are no JSON object."""
    try:
        values = orjson.loads(state)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(values, dict):
        return None
    return {
        name: value["_data_"] if isinstance(value, dict) and value.keys() == {"_type_", "_data_"} else value
        for name, value in values.items()
    }


class VersionTakenError(Exception):
    """Another writer recorded one of these versions first; nothing of the append was kept."""


class RecordedEvent(NamedTuple):
    """An event as it lies in the log, undecoded."""

    position: int
    order_no: str
    version: int
    topic: str
    state: bytes
    recorded_at: datetime


class Seen(NamedTuple):
    """The event that a claim brought, its position, and whether it brought it with the same body."""

    event: Order.StatusReported
    position: int
    same_body: bool


class Claim(NamedTuple):
    """What lets a report be recorded once only, such as a sender's key: kept together with its event."""

    find: Callable[[Connection, Report], Awaitable[Seen | None]]
    keep: Callable[[Connection, Report, Order.StatusReported], Awaitable[None]]


# The lock stands in the statement itself: one round trip. The identity is drawn only for rows of the join,
# which there are none of until the lock is held; so positions are drawn in the order of the commits.
APPEND: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state)
    SELECT given.*
    FROM (SELECT pg_advisory_xact_lock($5), pg_notify('order_events', '')) AS held,
         unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[]) AS given
    RETURNING originator_id, originator_version, notification_id
"""

# The table's lock first, as in the append itself and in the library's own recorder: one order for all.
BEGIN_LOCKED: Final = "BEGIN; SELECT public.lock_order_events()"
TAKE_APPEND_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"

LAST_EVENTS: Final = """
    SELECT wanted.order_no, last.originator_version, last.topic, last.state
    FROM unnest($1::text[]) AS wanted (order_no),
    LATERAL (
        SELECT originator_version, topic, state
        FROM order_events
        WHERE originator_id = wanted.order_no
        ORDER BY originator_version DESC
        LIMIT 1
    ) AS last
"""

POSITIONS_OF_EVENTS: Final = """
    SELECT logged.notification_id, logged.topic, logged.state, logged.originator_id, logged.originator_version
    FROM unnest($1::text[], $2::bigint[]) AS wanted (order_no, version)
    JOIN order_events AS logged
      ON logged.originator_id = wanted.order_no AND logged.originator_version = wanted.version
"""

# A page ends at a number of rows or of bytes: bodies may be a thousand times larger than usual. It has a row at
# least.
PAGE_BYTES_MAX: Final = 2 * 1024 * 1024

STREAM: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
    FROM (
        SELECT *, sum(length(state)) OVER (ORDER BY originator_version) - length(state) AS bytes_before
        FROM order_events
        WHERE originator_id = $1 AND originator_version > $2
        ORDER BY originator_version
        LIMIT $3
    ) AS page
    WHERE bytes_before < $4
    ORDER BY originator_version
"""

LOG: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
    FROM (
        SELECT *, sum(length(state)) OVER (ORDER BY notification_id) - length(state) AS bytes_before
        FROM order_events
        WHERE notification_id > $1
        ORDER BY notification_id
        LIMIT $2
    ) AS page
    WHERE bytes_before < $3
    ORDER BY notification_id
"""

HEAD: Final = "SELECT notification_id FROM order_events ORDER BY notification_id DESC LIMIT 1"

OLDEST_AFTER: Final = """
    SELECT recorded_at FROM order_events WHERE notification_id > $1 ORDER BY notification_id LIMIT 1
"""

COUNT_AFTER: Final = """
    SELECT count(*) FROM (SELECT FROM order_events WHERE notification_id > $1 LIMIT $2) AS behind
"""


async def append(connection: Connection, events: Sequence[Order.StatusReported]) -> list[int]:
    """Append events in one statement, all or none, and return their positions.

    Success is what the server returned for each (order, version), never the absence of an error.

    Raises:
        VersionTakenError: another writer was first with one of them.
    """
    return await append_encoded(
        connection,
        [event.originator_id for event in events],
        [event.originator_version for event in events],
        [event.TOPIC for event in events],
        [encode_event(event) for event in events],
    )


async def append_encoded(
    connection: Connection,
    order_nos: Sequence[str],
    versions: Sequence[int],
    topics: Sequence[str],
    states: Sequence[bytes],
) -> list[int]:
    """Append encoded events; see ``append``."""
    try:
        rows = await connection.fetch(APPEND, order_nos, versions, topics, states, APPEND_LOCK)
    except asyncpg.UniqueViolationError as error:
        raise VersionTakenError(str(error)) from error
    positions = {(order_no, version): position for order_no, version, position in rows}
    return [positions[key] for key in zip(order_nos, versions, strict=True)]


async def standings(connection: Connection, order_nos: Sequence[str]) -> dict[str, Standing]:
    """Return where each of these orders stands, from its last event alone; UNHEARD where it has none.

    Raises:
        UndecodableEventError: the last event of one of them cannot be read, or left it where no row of the
            transition table begins, so nothing can be judged by it.
    """
    found: dict[str, Standing] = dict.fromkeys(order_nos, UNHEARD)
    for order_no, version, topic, state in await connection.fetch(LAST_EVENTS, order_nos):
        event = decode_event(order_no, version, topic, state)
        if (event.status, event.leg) not in TABLE:
            raise UndecodableEventError("the transition table does not know where its order stands")
        found[order_no] = event.standing
    return found


async def positions_of(connection: Connection, events: Sequence[Order.StatusReported]) -> list[int] | None:
    """Return the positions of events whose append had no answer, None where it did not come about.

    To be asked under the append lock: the transaction that may have written them has ended then.
    """
    rows = await connection.fetch(
        POSITIONS_OF_EVENTS,
        [event.originator_id for event in events],
        [event.originator_version for event in events],
    )
    found = {
        (order_no, version, _report_id(order_no, version, topic, state)): position
        for position, topic, state, order_no, version in rows
    }
    positions = [
        found.get((event.originator_id, event.originator_version, event.report_id)) for event in events
    ]
    known = [position for position in positions if position is not None]
    if not known:
        return None
    if len(known) != len(events):
        raise RuntimeError("an append was committed in part, which one statement cannot do")
    return known


def _report_id(order_no: str, version: int, topic: str, state: bytes) -> str | None:
    try:
        return decode_event(order_no, version, topic, state).report_id
    except UndecodableEventError:
        # Another writer's: what was sent from here can be read here.
        return None


async def read_stream(connection: Connection, order_no: str, after: int, limit: int) -> list[RecordedEvent]:
    """Return an order's events with versions above ``after``, oldest first: a page of at most ``limit``."""
    return [
        RecordedEvent(*row) for row in await connection.fetch(STREAM, order_no, after, limit, PAGE_BYTES_MAX)
    ]


async def read_log(connection: Connection, after: int, limit: int) -> list[RecordedEvent]:
    """Return the events above a position in the order of the commits: a page of at most ``limit``."""
    return [RecordedEvent(*row) for row in await connection.fetch(LOG, after, limit, PAGE_BYTES_MAX)]


async def head_position(connection: Connection) -> int:
    """Return the highest position in the log, 0 where it is empty."""
    return await connection.fetchval(HEAD) or 0


async def oldest_after(connection: Connection, position: int) -> datetime | None:
    """Return when the first event above a position was recorded, None where there is none."""
    recorded_at: datetime | None = await connection.fetchval(OLDEST_AFTER, position)
    return recorded_at


async def count_after(connection: Connection, position: int, limit: int) -> int:
    """Return how many events lie above a position; counting stops at ``limit``."""
    count: int = await connection.fetchval(COUNT_AFTER, position, limit)
    return count


class EventStore:
    """The two ways to append: at once in one round trip, or with the log held still before judging."""

    def __init__(self, held: HeldConnection) -> None:
        self._held = held

    async def standings(self, order_nos: Sequence[str]) -> dict[str, Standing]:
        """Return where these orders stand now; see ``standings``."""
        async with self._held.use() as connection:
            return await standings(connection, order_nos)

    async def append(self, events: Sequence[Order.StatusReported]) -> list[int]:
        """Append in a transaction of its own; see ``append``."""
        async with self._held.use() as connection:
            return await append(connection, events)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[Connection]:
        """Hold the log still: until the end of the block nobody else appends, so what is read stays true.

        Committed at the end of the block.
        """
        async with self._held.transaction(BEGIN_LOCKED) as connection:
            await connection.fetchval(TAKE_APPEND_LOCK, APPEND_LOCK)
            yield connection

    async def close(self) -> None:
        """Close the connection."""
        await self._held.close()
