"""The live projection: it applies each event of the log to a view exactly once, in one process at a time.

No event can stop it: an order whose event cannot be applied is parked, and the view continues without it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Final, NamedTuple, TypeAlias, cast

import structlog

from domain.logged import DecodedEvent, FailedEvent, LoggedEvent
from projections import parked
from projections.parked import ParkedOrder
from projections.postgres import Connection, is_event_at_fault
from projections.view import View
from service.event_log.erasures import PAGE_ERASURES_MAX, last_versions, read_erasures
from service.event_log.follow import HAS_PLACE, Log, Place, PlaceLostError, has_place, place_of
from service.event_log.store import head_position
from service.projecting.locks import BEGIN_WITH_VIEW_LOCK, GIVE_UP_LEAD, TRY_LEAD
from service.projecting.position import ViewPosition

# Begins a transaction with the given statements, and commits it at the end of the block.
Transaction: TypeAlias = Callable[[str], AbstractAsyncContextManager[Connection]]

# The time limit for one batch. A step that takes longer is repeated on a new connection.
STEP_SECONDS_MAX: Final = 10.0
# Attempts at a whole batch before its orders are applied one by one, to find the order at fault.
BATCH_ATTEMPTS_MAX: Final = 3
# How often a process that does not project the view looks at its position while no reader waits.
LOOK_SECONDS: Final = 0.5
# How long the view may stay behind the log without a move before another process stands in for its leader.
LEADER_SECONDS_MAX: Final = 2.0

logger = structlog.get_logger()


class OutdatedViewError(Exception):
    """The view in the database was built with another definition, or has lost its position."""


class ViewState(NamedTuple):
    """A view's state, and the newest erasure at the same moment.

    Attributes:
        position: the position that it has reached.
        definition: the hash of its definition.
        has_parked: whether any order is parked in it.
        erasure_id: the last erasure that it has applied, 0 if there is none.
        newest_erasure_id: the newest erasure, 0 if there is none.
    """

    position: int
    definition: str
    has_parked: bool
    erasure_id: int
    newest_erasure_id: int


# Makes unqualified names refer to a view's tables until the end of the transaction.
SELECT_VIEW: Final = "SELECT set_config('search_path', $1, true)"
VIEW_STATE: Final = """
    SELECT position, definition, EXISTS (SELECT FROM parked_orders), erasure_id,
        (SELECT coalesce(max(erasure_id), 0) FROM public.erasures)
    FROM projection
"""
SAVE_ERASURE: Final = "UPDATE projection SET erasure_id = $1"
# Whether this session leads the view from now on. A process of another release must not lead it.
LOOK: Final = """
    SELECT position, definition, CASE definition WHEN $1 THEN {try_lead} ELSE false END FROM projection
"""
# The first condition fails only if another process moved the view without the lock. The second one fails if the
# batch is from another server's log.
ADVANCE: Final = f"""
    UPDATE projection SET position = $2::bigint
    WHERE position = $1 AND {HAS_PLACE.format(position="$2::bigint", report_id="$3")}
"""  # noqa: S608 - our own texts


async def view_state(connection: Connection) -> ViewState:
    """Return the state of the view whose schema is the connection's search path.

    Raises:
        OutdatedViewError: the view has no position.
    """
    row = await connection.fetchrow(VIEW_STATE)
    if row is None:
        raise OutdatedViewError("the view has no position")
    return ViewState(*row)


async def advance(connection: Connection, old: int, last: LoggedEvent) -> None:
    """Move the view's position from ``old`` to that of the last event, in the transaction that applied it.

    Raises:
        PlaceLostError: the log of this connection's server does not have the event, or the view was moved.
    """
    place = place_of(*last)
    if await connection.execute(ADVANCE, old, *place) != "UPDATE 1":
        raise PlaceLostError(place)


async def apply_erasures(connection: Connection, view: View, state: ViewState) -> bool:
    """Apply the next erasures that a view lacks, in the transaction that holds its lock.

    The view need not have the erased events yet: the log gives them away without what was erased. That holds up
    to the newest erasure of ``state``, of which memory hears before the events are read. A later one waits for
    the next call, since memory may still hold its events as they were.

    Returns:
        Whether there may be more.
    """
    if state.erasure_id >= state.newest_erasure_id:
        return False
    read = await read_erasures(connection, state.erasure_id)
    if erasures := [one for one in read if one["erasure_id"] <= state.newest_erasure_id]:
        if view.erase is not None:
            await view.erase(connection, last_versions(erasures))
        await connection.execute(SAVE_ERASURE, erasures[-1]["erasure_id"])
    return len(read) == PAGE_ERASURES_MAX


async def prepare(connection: Connection, view: View) -> None:
    """Let the server parse the statements that run under the view's lock.

    A process that is suspended between the parsing and the execution of a statement is not idle, so that before
    PostgreSQL 17 no timeout ends its transaction.
    """
    await view_state(connection)
    await view.apply(connection, ())
    if view.erase is not None:
        await view.erase(connection, {})
    # No event is at position 0.
    await connection.execute(ADVANCE, 0, 0, "")


async def apply_batch(
    connection: Connection,
    view: View,
    batch: Sequence[LoggedEvent],
    *,
    has_parked: bool,
    one_by_one: bool = False,
) -> None:
    """Apply a batch of the log to a view, except the events of parked orders.

    Args:
        connection: a connection in a transaction, whose search path is the view's schema.
        view: the view.
        batch: events in the order of the log.
        has_parked: whether any order is parked in the view.
        one_by_one: apply each order separately and park those that fail; otherwise a failure is raised.
    """
    decoded = await without_parked(connection, view, batch, has_parked=has_parked)
    if not one_by_one:
        if decoded:
            await view.apply(connection, decoded)
        return
    by_order: defaultdict[str, list[DecodedEvent]] = defaultdict(list)
    for position, event in decoded:
        by_order[event.originator_id].append((position, event))
    for events in by_order.values():
        await _apply_order(connection, view, events)


async def without_parked(
    connection: Connection, view: View, batch: Sequence[LoggedEvent], *, has_parked: bool
) -> Sequence[DecodedEvent]:
    """Return the events of orders that are not parked; park the orders with an undecodable event."""
    if not has_parked and not any(type(event) is FailedEvent for _, event in batch):
        return cast("Sequence[DecodedEvent]", batch)
    parked_nos = await parked.find_parked(connection, {event.originator_id for _, event in batch})
    decoded: list[DecodedEvent] = []
    for position, event in batch:
        if event.originator_id in parked_nos:
            continue
        if isinstance(event, FailedEvent):
            await _park(connection, view, position, event)
            parked_nos.add(event.originator_id)
        else:
            decoded.append((position, event))
    return decoded


async def _apply_order(connection: Connection, view: View, events: Sequence[DecodedEvent]) -> None:
    """Apply one order's events one by one; park the order at the first that fails."""
    for position, event in events:
        await connection.execute("SAVEPOINT event")
        try:
            await view.apply(connection, [(position, event)])
        except Exception as error:
            if connection.is_closed() or not is_event_at_fault(error):
                raise
            await connection.execute("ROLLBACK TO SAVEPOINT event")
            # Only the first line: PostgreSQL's other lines quote the row.
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            failed = FailedEvent(event.originator_id, event.originator_version, reason)
            await _park(connection, view, position, failed)
            return
        await connection.execute("RELEASE SAVEPOINT event")


async def _park(connection: Connection, view: View, position: int, failed: FailedEvent) -> None:
    order_no, version, reason = failed
    logger.error("order parked", view=view.name, position=position, version=version, reason=reason)
    order = ParkedOrder(order_no=order_no, since_version=version, position=position, reason=reason)
    await parked.park(connection, [order])


class Projector:
    """Keeps one view at the head of the log, as its follower.

    Of all processes, one leads: it projects the view. The others look at the view's position for their readers.
    If the leader's session ends, another process leads; if the leader only stops to work, such as a suspended
    process, another one stands in for it until it moves the view again.

    Args:
        position: where the view's position is noted.
        transaction: begins a transaction on a connection whose search path is the view's schema.
        log: the log.
    """

    def __init__(self, position: ViewPosition, transaction: Transaction, log: Log) -> None:
        self.position = position
        self.view = view = position.view
        self._begin = BEGIN_WITH_VIEW_LOCK.format(view=view.name)
        self._look_statement = LOOK.format(try_lead=TRY_LEAD.format(view=view.name))
        self._leads = False
        self._stands_in = False
        self._behind_since: float | None = None
        self._look_at = 0.0
        self._transaction = transaction
        self._log = log
        self._failures = 0

    async def step(self) -> int:
        """Apply the next erasures and events, and return the number of events; 0 if another process leads.

        Raises:
            OutdatedViewError: the view was built with another definition, so this code must not write to it, or
                it has events that the log has lost.
        """
        try:
            # Without a limit, a connection that died unnoticed would block the view forever.
            async with asyncio.timeout(STEP_SECONDS_MAX):
                if not self._leads and not await self._look():
                    return 0
                events = await self._apply_next_batch()
        except OutdatedViewError:
            self.position.is_outdated = True
            self._look_at = 0.0
            if self._leads:
                await self._give_up_lead()
            raise
        except Exception as error:
            self._failures += is_event_at_fault(error)
            raise
        self._failures = 0
        self.position.is_outdated = False
        return events

    async def _look(self) -> bool:
        """Look at the view, and return whether this process projects its next batch."""
        now = asyncio.get_running_loop().time()
        if not self.position.reach.has_readers and not self._stands_in and now < self._look_at:
            return False
        async with self._transaction("BEGIN") as connection:
            row = await connection.fetchrow(self._look_statement, self.view.definition)
            # On the same connection: another one may be to another server, such as during a failover.
            head = await head_position(connection)
        if row is None:
            raise OutdatedViewError("the view has no position")
        position, definition, self._leads = row
        if definition != self.view.definition:
            raise OutdatedViewError(f"the view {self.view.name} was built with another definition")
        if not self._leads:
            self._stand_in(self._must_stand_in(position, head, now))
            self.position.reach.move(position)
            self.position.is_outdated = False
        self._look_at = now + LOOK_SECONDS
        if not (self._leads or self._stands_in):
            return False
        async with self._transaction("BEGIN") as connection:
            await prepare(connection, self.view)
        return True

    def _must_stand_in(self, position: int, head: int, now: float) -> bool:
        """Return whether the leader has left the view behind the log for too long."""
        if position > head:
            raise OutdatedViewError(f"the view {self.view.name} has events that the log has lost")
        if position != self.position.reach.position:
            # Another process moves the view.
            self._behind_since = None
            return False
        if position == head:
            self._behind_since = None
            return self._stands_in
        if self._behind_since is None:
            self._behind_since = now
        return self._stands_in or now - self._behind_since >= LEADER_SECONDS_MAX

    def _stand_in(self, stands_in: bool) -> None:  # noqa: FBT001 - the new value of a flag
        if stands_in and not self._stands_in:
            logger.warning(
                "the process that leads the view leaves it behind the log, so this one stands in",
                view=self.view.name,
                seconds=LEADER_SECONDS_MAX,
            )
        elif self._stands_in and not stands_in:
            logger.info("another process moves the view again", view=self.view.name)
        self._stands_in = stands_in

    async def _give_up_lead(self) -> None:
        """Let a process lead whose release has the view's definition."""
        self._leads = self._stands_in = False
        async with self._transaction("BEGIN") as connection:
            await connection.execute(GIVE_UP_LEAD)

    async def _apply_next_batch(self) -> int:
        began = monotonic()
        async with self._transaction(self._begin) as connection:
            state = await view_state(connection)
            if state.definition != self.view.definition:
                raise OutdatedViewError(f"the view {self.view.name} was built with another definition")
            position = state.position
            has_more_erasures = await apply_erasures(connection, self.view, state)
            await self._log.memory.hear(state.newest_erasure_id, began)
            batch = await self._log.read_log(position, self.view.batch_events_max)
            if batch:
                position, _ = batch[-1]
                one_by_one = self._failures >= BATCH_ATTEMPTS_MAX
                await apply_batch(
                    connection, self.view, batch, has_parked=state.has_parked, one_by_one=one_by_one
                )
                await advance(connection, state.position, batch[-1])
            elif not await has_place(connection, Place(position, None)):
                raise OutdatedViewError(f"the view {self.view.name} has events that the log has lost")
        self.position.reach.move(position)
        return len(batch) or has_more_erasures

    def forget(self) -> None:
        """Wait for the next step before a position is believed again, because commits may have been lost.

        A new connection does not lead either.
        """
        self.position.forget()
        self._leads = self._stands_in = False
        self._behind_since = None
        self._look_at = 0.0
