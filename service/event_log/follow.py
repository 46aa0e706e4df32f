"""Following the log: everything after the commit reads the log on from a place of its own.

A view, the live streams, a subscription and a tree are *followers*. A follower hears of erasures, reads the
next events, does its work and saves its place. It saves the place itself, since only it knows with what: a view
and a tree in the transaction of their work, a subscription after its endpoint has answered. Here is what all
of them share: reading, from memory if this process wrote the events, else from the database; the proof that the
log still has what was read; the wake; the loop.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from time import monotonic
from typing import Final, NamedTuple, NoReturn, TypeAlias

from domain.logged import DecodedEvent, FailedEvent, LoggedEvent
from domain.order import Order
from projections.postgres import Connection
from service.background import wait_for_event
from service.database.connections import DedicatedConnection
from service.event_log import store
from service.event_log.codec import UndecodableEventError, decode_event
from service.event_log.erasures import HeardErasures
from service.event_log.store import RecordedEvent

# The last committed events stay in memory: the followers read them milliseconds later.
MEMORY_EVENTS_MAX: Final = 4_096
MEMORY_CHARACTERS_MAX: Final = 8 * 1024 * 1024
# The events of one order that are read at a time.
ORDER_EVENTS_MAX: Final = 100

# How often a waiting reader has the follower check its position, in case no notification arrives.
CHECK_SECONDS: Final = 0.02

# Whether the log has a place. It then has all that was ever read below it: a failover or a restore loses the
# end of a log, never its middle, and each report has its own id. Any event's bytes contain the empty string.
HAS_PLACE: Final = """
    CASE WHEN {report_id}::text IS NULL
         THEN coalesce((SELECT max(notification_id) FROM public.order_events), 0) >= {position}
         ELSE EXISTS (
             SELECT FROM public.order_events
             WHERE notification_id = {position} AND position(convert_to({report_id}, 'UTF8') IN state) > 0
         )
    END
"""
PROVE: Final = f"SELECT {HAS_PLACE.format(position='$1::bigint', report_id='$2')}"

# Is awaited after each step that had events, with their number.
Rest: TypeAlias = Callable[[int], Awaitable[object]]


class Place(NamedTuple):
    """A place in the log, up to which it was read.

    Attributes:
        position: the position.
        report_id: the id of the report there. None if it is unknown whether the position has an event: the log
            must then at least reach it. Empty if it has one whose report is unknown.
    """

    position: int
    report_id: str | None


# Before the first event.
START: Final = Place(0, None)


class PlaceLostError(ConnectionError):
    """The log has lost the event at a place, by a failover or a restore, or this is the log of another server.

    ``str()`` names the place. It is a lost connection too, since another one may find the right server.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(f"the log does not have the event {place.report_id} at position {place.position}")


def place_of(position: int, event: Order.StatusReported | FailedEvent) -> Place:
    """Return the place of an event in the log."""
    return Place(position, "" if isinstance(event, FailedEvent) else event.report_id)


async def has_place(connection: Connection, place: Place) -> bool:
    """Return whether the log of a connection's server still has a place."""
    return bool(await connection.fetchval(PROVE, *place))


async def require_place(connection: Connection, place: Place) -> None:
    """Prove that the log of a connection's server still has all that was read up to a place.

    Raises:
        PlaceLostError: it has not.
    """
    if not await has_place(connection, place):
        raise PlaceLostError(place)


async def read_after(connection: Connection, after: Place, limit: int) -> Sequence[RecordedEvent]:
    """Return the events above a place, at most ``limit``, and prove the place.

    Raises:
        PlaceLostError: the log ends before the place, or has another event there.
    """
    # The event at the place is read again, so that one statement reads and proves.
    recorded = await store.read_log(connection, max(0, after.position - 1), limit + 1)
    if recorded and recorded[0].position == after.position:
        if after.report_id and recorded[0].report_id != after.report_id:
            raise PlaceLostError(after)
        return recorded[1:]
    if after.report_id is None:
        # A gap has no event, but the log goes on above it.
        await require_place(connection, after)
    else:
        raise PlaceLostError(after)
    return recorded


async def read_end(connection: Connection) -> Place:
    """Return the place at the end of the log."""
    head = await store.head_position(connection)
    recorded = await store.read_log(connection, max(0, head - 1), 1)
    return Place(recorded[-1].position, recorded[-1].report_id or "") if recorded else START


def decode_logged(recorded: RecordedEvent) -> LoggedEvent:
    """Return a position and its event, a FailedEvent if the event cannot be decoded."""
    position, order_no, version, topic, state, *_ = recorded
    try:
        return position, decode_event(order_no, version, topic, state)
    except UndecodableEventError as error:
        return position, FailedEvent(order_no, version, str(error))


class Memory:
    """The last events that this process has committed, without what was erased.

    It gives an event away only if the newest erasure was looked for within the last second: see ``hear``. So an
    erased body or word leaves no process later than that.

    Args:
        dedicated: the connection for erasures, which the readers of the log share.

    Attributes:
        erasures: the latest erasures, which the memory has applied.
    """

    def __init__(self, dedicated: DedicatedConnection) -> None:
        self._dedicated = dedicated
        self.erasures = HeardErasures()
        # Counts the erasures that were heard: a reader's own copies from before are stale.
        self.changes = 0
        # Events at consecutive positions, so that no event of another process lies between them.
        self._events: list[DecodedEvent] = []
        self._characters = 0

    def remember(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        """Keep events that were just committed, in the order of the log."""
        for event, position in zip(events, positions, strict=True):
            if self.erasures.has_erased(event.originator_id, event.originator_version):
                # It was erased before this process heard of its commit.
                self._drop()
                continue
            if self._events and position != self._events[-1][0] + 1:
                self._drop()
            self._events.append((position, event))
            self._characters += len(event.body)
        if len(self._events) > MEMORY_EVENTS_MAX or self._characters > MEMORY_CHARACTERS_MAX:
            del self._events[: len(self._events) // 2]
            self._characters = sum(len(event.body) for _, event in self._events)

    def forget(self) -> None:
        """Drop everything, because commits may have been lost, and perhaps erasures too."""
        self._drop()
        self.changes += 1
        self.erasures.forget()

    def _drop(self) -> None:
        self._events, self._characters = [], 0

    async def hear(self, erasure_id: int, at: float) -> None:
        """Apply the erasures up to the newest one.

        Args:
            erasure_id: the id of the newest erasure, 0 if there is none.
            at: when it was the newest one, or earlier (monotonic clock).
        """
        if erasure_id != self.erasures.last_id:
            await self._read_erasures()
        self.erasures.confirm(at)

    async def hear_in_time(self, *, at_once: bool = False) -> None:
        """Find out whether there are new erasures, unless that was found out a short time ago."""
        if at_once or not self.erasures.is_fresh:
            began = monotonic()
            await self._read_erasures()
            self.erasures.confirm(began)

    async def _read_erasures(self) -> None:
        # While this connection is held, no read of the log from before an erasure can end after it.
        async with self._dedicated.connection() as connection:
            erased = await self.erasures.read(connection)
        if erased == {}:
            return
        self.changes += 1
        if erased is None or any(
            event.originator_version <= erased.get(event.originator_id, 0) for _, event in self._events
        ):
            self._drop()

    def recall(self, after: int, limit: int) -> Sequence[DecodedEvent]:
        """Return the events above a position, empty if memory may lack some of them, or an erasure.

        Call ``hear`` or ``hear_in_time`` before.
        """
        if self._events and self.erasures.is_fresh:
            start = after + 1 - self._events[0][0]
            if 0 <= start < len(self._events):
                return self._events[start : start + limit]
        return ()


class Log:
    """The log as a follower reads it: decoded, from memory if that has the events, else from the database.

    Args:
        dedicated: the connection for events that are not in memory.
        memory: the memory of the process; None for one that stays empty.
    """

    def __init__(self, dedicated: DedicatedConnection, memory: Memory | None = None) -> None:
        self._dedicated = dedicated
        self.memory = Memory(dedicated) if memory is None else memory
        # The events that were read last, above a position: the views read the same ones one after the other.
        self._batch_after = 0
        self._batch: Sequence[LoggedEvent] = ()
        self._batch_changes = 0

    async def read_log(self, after: int, limit: int) -> Sequence[LoggedEvent]:
        """Return the events above a position, at most ``limit``, in the order of the log.

        This proves nothing. Call ``Memory.hear`` before, and prove the last event's place where you save it.
        """
        if recalled := self.memory.recall(after, limit):
            return recalled
        async with self._dedicated.connection() as connection:
            # The views wake together. While this one waited for its turn, another may have read the same ones.
            is_kept = self._batch and self._batch_changes == self.memory.changes
            if is_kept and self._batch_after <= after < self._batch[-1][0]:
                start = bisect_right(self._batch, after, key=itemgetter(0))
                return self._batch[start : start + limit]
            changes = self.memory.changes
            batch = [decode_logged(one) for one in await store.read_log(connection, after, limit)]
            if batch:
                self._batch_after, self._batch, self._batch_changes = after, batch, changes
            return batch

    async def read_after(self, after: Place, limit: int) -> Sequence[LoggedEvent]:
        """Return the next events above a place, at most ``limit``, and prove the place.

        Raises:
            PlaceLostError: the log ends before the place, or has another event there.
        """
        await self.memory.hear_in_time()
        # Memory proves the place if it has the event there: it holds consecutive events of one log.
        recalled = self.memory.recall(after.position - 1, limit + 1)
        if len(recalled) > 1 and place_of(*recalled[0]) == after:
            return recalled[1:]
        async with self._dedicated.connection() as connection:
            return [decode_logged(one) for one in await read_after(connection, after, limit)]

    async def read_order(self, order_no: str, after: int, place: Place = START) -> Sequence[LoggedEvent]:
        """Return one order's events above a version, at most ORDER_EVENTS_MAX.

        Args:
            order_no: the order.
            after: the version.
            place: up to where the log was read, which it must still have.

        Raises:
            PlaceLostError: it has not.
        """
        async with self._dedicated.connection() as connection:
            recorded = await store.read_stream(connection, order_no, after, ORDER_EVENTS_MAX)
            # Afterwards: a log that still has the place had it when the events were read.
            if place.position:
                await require_place(connection, place)
        return [decode_logged(one) for one in recorded]

    async def head(self) -> int:
        """Return the highest position, 0 for an empty log."""
        async with self._dedicated.connection() as connection:
            return await store.head_position(connection)


class Followers:
    """The followers of one process, by name: what must wake when the log has grown."""

    def __init__(self, on_failure: Callable[[str, Exception], object]) -> None:
        self._on_failure = on_failure
        self._wakes: dict[str, Callable[[], object]] = {}

    @property
    def names(self) -> list[str]:
        """The names."""
        return [*self._wakes]

    def join(self, name: str, wake: Callable[[], object]) -> None:
        """Call ``wake`` from now on whenever the log may have grown."""
        self._wakes[name] = wake

    def wake(self, *_notification: object) -> None:
        """Wake every follower. None can keep the others asleep."""
        for name, wake in self._wakes.items():
            try:
                wake()
            except Exception as error:  # noqa: BLE001 - reported; the other followers must be woken
                self._on_failure(name, error)


async def follow(
    step: Callable[[], Awaitable[int]], wake: asyncio.Event, *, poll_seconds: float, rest: Rest | None = None
) -> NoReturn:
    """Repeat: call ``step`` as long as the log has new events, then wait until it may have grown.

    Args:
        step: handles the next batch of events, and returns their number.
        wake: set by others when the log has grown.
        poll_seconds: the longest wait, in case a wake is lost.
        rest: is awaited after each batch, None for no rest. It does not delay the first event after a wait.

    Raises:
        Exception: whatever the step raises. Run this under ``supervise``.
    """
    while True:
        wake.clear()
        while events := await step():
            if rest is not None:
                await rest(events)
        await wait_for_event(wake, poll_seconds)


def rest_unless_full(batch_events_max: int, idle_seconds: float) -> Rest:
    """Return a rest after each batch that was not full, so that the next batch is larger under load."""

    async def rest(events: int) -> None:
        if events < batch_events_max:
            await asyncio.sleep(idle_seconds)

    return rest


class AwaitedPosition:
    """A follower's position, for which readers wait.

    The follower calls ``move`` once the work up to a position is committed, and ``forget`` when commits may
    have been lost. It is only a hint for the right moment to read: what a reader then gets is for the database
    to say.

    Args:
        check: called every CHECK_SECONDS while a reader waits. It makes the follower check its position, which
            another process may have moved.

    Attributes:
        position: the position, 0 until the first move.
    """

    def __init__(self, check: Callable[[], object]) -> None:
        self.position = 0
        self._check = check
        self._readers = 0
        # Set by the next move, which replaces it.
        self._moved = asyncio.Event()

    @property
    def has_readers(self) -> bool:
        """Whether a reader waits."""
        return self._readers > 0

    def move(self, position: int) -> None:
        """Set the position, which may also be lower, and wake the readers."""
        if position != self.position:
            self.position = position
            self._moved.set()
            self._moved = asyncio.Event()

    def forget(self) -> None:
        """Believe no position until the next move. The readers keep waiting."""
        self.position = 0

    async def wait_for(self, position: int, seconds_max: float) -> bool:
        """Wait until the position is reached, and return True; return False after ``seconds_max``."""
        now = asyncio.get_running_loop().time
        deadline = now() + seconds_max
        self._readers += 1
        try:
            while self.position < position:
                if now() >= deadline:
                    return False
                moved = self._moved
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, now() + CHECK_SECONDS)):
                        await moved.wait()
                if not moved.is_set():
                    self._check()
        finally:
            self._readers -= 1
        return True
