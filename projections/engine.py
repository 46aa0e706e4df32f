"""How a view follows the log: exactly once, one process at a time, and no event can stop it."""

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import structlog

from domain.order import Order

if TYPE_CHECKING:
    import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Transaction: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

# Larger pages gain no throughput and make webhooks wait: 2,000 took their p99 from 2.3 to 3 times.
PAGE_EVENTS_MAX: Final = 300
# Beneath the notifications, which are only hints: the longest that an unannounced event goes unseen.
POLL_SECONDS: Final = 1.0
# How often a page is tried whole before the order at fault in it is looked for.
PAGE_ATTEMPTS_MAX: Final = 3
# Between two attempts at a page, and while the database is away.
RETRY_PAUSE_SECONDS: Final = 0.2
# How often a standing-by process looks how far the projecting one has come, while readers wait for it.
STANDBY_LOOK_SECONDS: Final = 0.02

log = structlog.get_logger()


class LoggedEvent(NamedTuple):
    """One event of the log as a projection is given it.

    ``event`` is None where it could not be decoded; ``reason`` then says why.
    """

    position: int
    order_no: str
    version: int
    event: Order.StatusReported | None
    reason: str | None = None


class DecodedEvent(NamedTuple):
    """A logged event that could be decoded: what a view's fold is given."""

    position: int
    event: Order.StatusReported


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
    """

    name: str
    fold_version: int
    tables_sql: str
    keys_sql: str
    tables: tuple[str, ...]
    apply: Callable[[Connection, Sequence[DecodedEvent]], Awaitable[None]]
    copy: Callable[[Connection, Sequence[DecodedEvent], dict[str, Any]], Awaitable[None]]

    @property
    def definition(self) -> str:
        """What tells one shape of this view from another: where it differs, the view is rebuilt."""
        text = f"{self.fold_version}\n{self.tables_sql}\n{self.keys_sql}"
        return hashlib.sha256(text.encode()).hexdigest()


class OutdatedViewError(Exception):
    """The view in the database was made by another definition than this code's."""


class ViewState(NamedTuple):
    """How far a view has come, by which definition it was made, and whether anything is set aside in it."""

    position: int
    definition: str
    sets_aside: bool


# In a transaction these two come first, in this order: the position must be read by a snapshot that is younger
# than the lock. A row lock on the position would not do: a waiter would go on with the tables of before a swap.
TRY_VIEW_LOCK: Final = "SELECT pg_try_advisory_xact_lock(hashtextextended('view ' || $1, 0))"
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
    aside: set[str] = set()
    if sets_aside:
        order_nos = list({logged.order_no for logged in page})
        aside = {row[0] for row in await connection.fetch(ORDERS_SET_ASIDE, order_nos)}
    decoded: list[DecodedEvent] = []
    for logged in page:
        if logged.order_no in aside:
            continue
        if logged.event is None:
            await _set_aside(connection, view, logged, logged.reason or "it could not be decoded")
            aside.add(logged.order_no)
        else:
            decoded.append(DecodedEvent(logged.position, logged.event))
    if not one_by_one:
        if decoded:
            await view.apply(connection, decoded)
        return
    by_order: defaultdict[str, list[DecodedEvent]] = defaultdict(list)
    for item in decoded:
        by_order[item.event.originator_id].append(item)
    for events in by_order.values():
        await _apply_order(connection, view, events)


async def _apply_order(connection: Connection, view: View, events: Sequence[DecodedEvent]) -> None:
    """Apply one order's events one after the other; set it aside at the first that fails."""
    for item in events:
        await connection.execute("SAVEPOINT event")
        try:
            await view.apply(connection, [item])
        except Exception as error:
            if connection.is_closed():
                raise
            await connection.execute("ROLLBACK TO SAVEPOINT event")
            logged = LoggedEvent(item.position, item.event.originator_id, item.event.originator_version, None)
            await _set_aside(connection, view, logged, f"{type(error).__name__}: {_first_line(error)}")
            return
        await connection.execute("RELEASE SAVEPOINT event")


def _first_line(error: Exception) -> str:
    # A database's error goes on with the row that it was about.
    return next(iter(str(error).splitlines()), "")


async def _set_aside(connection: Connection, view: View, logged: LoggedEvent, reason: str) -> None:
    log.error(
        "order set aside", view=view.name, position=logged.position, version=logged.version, reason=reason
    )
    await connection.execute(SET_ASIDE, logged.order_no, logged.version, logged.position, reason)


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
        self.is_outdated = False
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
                while await self.step():
                    pass
            except Exception as error:  # noqa: BLE001 - whatever it is, webhooks go on and so does this
                self._note_failure(error)
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        self.is_outdated = isinstance(error, OutdatedViewError)
        if repr(error) != self._last_failure:
            self._last_failure = repr(error)
            log.warning("projection failed; it goes on trying", view=self.view.name, error=repr(error))

    async def step(self) -> bool:
        """Apply the next page; return whether there may be more to do now.

        Raises:
            OutdatedViewError: another definition made the view; it is not this code's to write.
        """
        async with self._transaction() as connection:
            is_mine = await connection.fetchval(TRY_VIEW_LOCK, self.view.name)
            state = await view_state(connection)
            if state.definition != self.view.definition:
                raise OutdatedViewError(f"the view {self.view.name} was made by another definition")
            position = state.position
            # Where another process holds the lock it is projecting, or swapping; it is notified as we are.
            page = await self._read_log(position, PAGE_EVENTS_MAX) if is_mine else ()
            if page:
                position = page[-1].position
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
        return bool(page)

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
                async with asyncio.timeout(min(left, STANDBY_LOOK_SECONDS)), self._moved:
                    await self._moved.wait()
            except TimeoutError:
                # Standing by, or not notified: look again how far it has come.
                self.wake()
        return True

    async def _reach(self, position: int) -> None:
        if position != self.position:
            async with self._moved:
                self.position = position
                self._moved.notify_all()
