"""How a view follows the log: exactly once, one process at a time, and no event can stop it."""

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, cast

import asyncpg
import structlog

from domain.order import Order

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# Begins a transaction by the given statements, and commits it at the end of the block.
Transaction: TypeAlias = Callable[[str], AbstractAsyncContextManager[Connection]]

# Beneath the notifications, which are only hints: the longest that an unannounced event goes unseen.
POLL_SECONDS: Final = 1.0
# For one page; what takes longer is begun again on a new connection.
STEP_SECONDS_MAX: Final = 10.0
# How often a page is tried whole before the order at fault in it is looked for.
PAGE_ATTEMPTS_MAX: Final = 3
# Between two attempts at a page, and while the database is away.
RETRY_PAUSE_SECONDS: Final = 0.2
# How often a view is looked at while readers wait for a position that has not been announced.
LOOK_SECONDS: Final = 0.02

log = structlog.get_logger()


class Undecodable(NamedTuple):
    """What stands in the place of an event that could not be decoded."""

    originator_id: str
    originator_version: int
    reason: str


# A position and what was recorded there. Plain tuples: one for each event, for each view.
DecodedEvent: TypeAlias = tuple[int, Order.StatusReported]
LoggedEvent: TypeAlias = tuple[int, Order.StatusReported | Undecodable]

# Given a position and a limit, the events above that position in the order of the log.
ReadLog: TypeAlias = Callable[[int, int], Awaitable[Sequence[LoggedEvent]]]


@dataclass(frozen=True)
class View:
    """A view: its place, its definition, and its two ways to write what its one fold makes.

    Args:
        name: of its schema.
        fold_version: changed by hand whenever the fold is.
        tables_sql: makes its tables, by names that are not qualified.
        keys_sql: makes their keys and indexes.
        tables: the tables that are compared when a rebuild is verified.
        apply: writes events of any orders into tables that hold what came before them.
        copy: writes events in stream order into empty tables without keys; what is not complete yet is carried
            in the dictionary to the next call, and a call without events writes it.
        page_events_max: events that the live projection applies at once.
        rest_seconds: what it rests between two pages that are not full. A report that comes alone is projected
            at once.
    """

    name: str
    fold_version: int
    tables_sql: str
    keys_sql: str
    tables: tuple[str, ...]
    apply: Callable[[Connection, Sequence[DecodedEvent]], Awaitable[None]]
    copy: Callable[[Connection, Sequence[DecodedEvent], dict[str, Any]], Awaitable[None]]
    page_events_max: int
    rest_seconds: float

    @property
    def definition(self) -> str:
        """What tells one shape of this view from another: where it differs, the view is rebuilt."""
        text = f"{self.fold_version}\n{self.tables_sql}\n{self.keys_sql}"
        return hashlib.sha256(text.encode()).hexdigest()


# Errors about values, which would be met again each time: cardinality, data, constraints, limits of the server.
CONTENT_SQLSTATES: Final = ("21", "22", "23", "54")


class OutdatedViewError(Exception):
    """The view in the database was made by another definition than this code's."""


class ViewState(NamedTuple):
    """How far a view has come, by which definition it was made, and whether anything is set aside in it."""

    position: int
    definition: str
    sets_aside: bool


# One process at a time writes a view; the others wait here. The position is read after it, by a snapshot that
# is younger than the lock. A row lock on the position would not do: a waiter would go on with the tables of
# before a swap. Filled with the view's own name; one message to the server, since it is sent for every page.
BEGIN_WITH_VIEW_LOCK: Final = "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('view {view}', 0))"
TAKE_VIEW_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('view ' || $1, 0))"
VIEW_STATE: Final = "SELECT position, definition, EXISTS (SELECT FROM set_aside) FROM projection"

# The second line behind the lock: nobody else has moved the view meanwhile.
ADVANCE: Final = "UPDATE projection SET position = $2 WHERE position = $1"

ORDERS_SET_ASIDE: Final = "SELECT order_no FROM set_aside WHERE order_no = ANY($1)"
SET_ASIDE: Final = """
    INSERT INTO set_aside (order_no, since_version, position, reason) VALUES ($1, $2, $3, $4)
"""


async def view_state(connection: Connection) -> ViewState:
    """Return the state of the view that the connection's search path names."""
    row = await connection.fetchrow(VIEW_STATE)
    if row is None:
        raise OutdatedViewError("the view has no position")
    return ViewState(*row)


async def advance(connection: Connection, old: int, new: int) -> None:
    """Move the view's position, in the transaction that wrote what lies between."""
    if await connection.execute(ADVANCE, old, new) != "UPDATE 1":
        raise RuntimeError("the view was moved by another process that held no lock")


async def apply_page(
    connection: Connection,
    view: View,
    page: Sequence[LoggedEvent],
    *,
    sets_aside: bool,
    one_by_one: bool = False,
) -> None:
    """Write a page of the log into a view, but for the orders that are set aside in it.

    Args:
        connection: in a transaction, its search path on the view's schema.
        view: the view.
        page: events in the order of the log.
        sets_aside: whether anything is set aside in the view already.
        one_by_one: apply each order by itself and set aside those that fail; else a failure is raised.
    """
    decoded = await _not_aside(connection, view, page, sets_aside=sets_aside)
    if not one_by_one:
        if decoded:
            await view.apply(connection, decoded)
        return
    by_order: defaultdict[str, list[DecodedEvent]] = defaultdict(list)
    for position, event in decoded:
        by_order[event.originator_id].append((position, event))
    for events in by_order.values():
        await _apply_order(connection, view, events)


async def _not_aside(
    connection: Connection, view: View, page: Sequence[LoggedEvent], *, sets_aside: bool
) -> Sequence[DecodedEvent]:
    """Return the events of orders that are not set aside, and set aside those that cannot be decoded."""
    if not sets_aside and not any(type(event) is Undecodable for _, event in page):
        return cast("Sequence[DecodedEvent]", page)
    order_nos = list({event.originator_id for _, event in page})
    aside = {order_no for (order_no,) in await connection.fetch(ORDERS_SET_ASIDE, order_nos)}
    decoded: list[DecodedEvent] = []
    for position, event in page:
        if event.originator_id in aside:
            continue
        if isinstance(event, Undecodable):
            await _set_aside(connection, view, position, event)
            aside.add(event.originator_id)
        else:
            decoded.append((position, event))
    return decoded


def is_of_content(error: Exception) -> bool:
    """Tell whether an error is about the event itself, not about the server's or the connection's state.

    A server without room, or one that is restarted, must not be taken for an event that cannot be handled.
    """
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return str(sqlstate).startswith(CONTENT_SQLSTATES)
    return not isinstance(error, OSError | asyncpg.InterfaceError | asyncpg.InternalClientError)


async def _apply_order(connection: Connection, view: View, events: Sequence[DecodedEvent]) -> None:
    """Apply one order's events one after the other; set it aside at the first that fails."""
    for position, event in events:
        await connection.execute("SAVEPOINT event")
        try:
            await view.apply(connection, [(position, event)])
        except Exception as error:
            if connection.is_closed() or not is_of_content(error):
                raise
            await connection.execute("ROLLBACK TO SAVEPOINT event")
            # The first line: a database's error goes on with the row that it was about.
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            failed = Undecodable(event.originator_id, event.originator_version, reason)
            await _set_aside(connection, view, position, failed)
            return
        await connection.execute("RELEASE SAVEPOINT event")


async def _set_aside(connection: Connection, view: View, position: int, failed: Undecodable) -> None:
    order_no, version, reason = failed
    log.error("order set aside", view=view.name, position=position, version=version, reason=reason)
    await connection.execute(SET_ASIDE, order_no, version, position, reason)


class Projector:
    """Keeps one view at the head of the log.

    Args:
        view: the view.
        transaction: begins a transaction on a connection whose search path is the view's schema.
        read_log: the events after a position.
    """

    def __init__(self, view: View, transaction: Transaction, read_log: ReadLog) -> None:
        self.view = view
        self.position = 0
        self.is_outdated = True  # until it has been looked at
        self._begin = BEGIN_WITH_VIEW_LOCK.format(view=view.name)
        self._transaction = transaction
        self._read_log = read_log
        self._wake = asyncio.Event()
        self._moved = asyncio.Condition()
        self._failures = 0
        self._last_failure = ""

    def wake(self) -> None:
        """Say that the log has grown."""
        self._wake.set()

    async def run(self) -> None:
        """Follow the log for ever. Nothing but its cancellation ends this."""
        while True:
            self._wake.clear()
            try:
                while events := await self._step_in_time():
                    if events < self.view.page_events_max:
                        await asyncio.sleep(self.view.rest_seconds)
            except Exception as error:  # noqa: BLE001 - whatever it is, webhooks go on and so does this
                self._note_failure(error)
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _step_in_time(self) -> int:
        # A connection that died in silence would be waited for without end.
        async with asyncio.timeout(STEP_SECONDS_MAX):
            return await self.step()

    def _note_failure(self, error: Exception) -> None:
        self._failures += is_of_content(error)
        if isinstance(error, OutdatedViewError):
            # Until a step has succeeded: what fails otherwise says nothing of it.
            self.is_outdated = True
        if repr(error) != self._last_failure:
            self._last_failure = repr(error)
            log.warning("projection failed; it goes on trying", view=self.view.name, error=repr(error))

    async def step(self) -> int:
        """Apply the next page; return how many events it had.

        Raises:
            OutdatedViewError: another definition made the view; it is not this code's to write.
        """
        async with self._transaction(self._begin) as connection:
            state = await view_state(connection)
            if state.definition != self.view.definition:
                raise OutdatedViewError(f"the view {self.view.name} was made by another definition")
            position = state.position
            page = await self._read_log(position, self.view.page_events_max)
            if page:
                position, _ = page[-1]
                await apply_page(
                    connection,
                    self.view,
                    page,
                    sets_aside=state.sets_aside,
                    one_by_one=self._failures >= PAGE_ATTEMPTS_MAX,
                )
                await advance(connection, state.position, position)
        self._failures = 0
        self._last_failure = ""
        self.is_outdated = False
        await self._reach(position)
        return len(page)

    async def reached(self, position: int, seconds_max: float) -> bool:
        """Wait until the view has a position; return whether it has, within the time."""
        if self.position >= position:
            return True
        deadline = asyncio.get_running_loop().time() + seconds_max
        while self.position < position:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            try:
                async with asyncio.timeout(min(left, LOOK_SECONDS)), self._moved:
                    await self._moved.wait()
            except TimeoutError:
                # Another process has moved it, or the notification was lost: look again.
                self.wake()
        return True

    async def _reach(self, position: int) -> None:
        if position != self.position:
            async with self._moved:
                self.position = position
                self._moved.notify_all()
