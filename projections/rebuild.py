"""Rebuild views from the log beside the live ones, and swap them in while everything goes on."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, cast

import asyncpg
import structlog

from projections.engine import (
    TAKE_VIEW_LOCK,
    Connection,
    DecodedEvent,
    LoggedEvent,
    OutdatedViewError,
    ReadLog,
    Undecodable,
    View,
    advance,
    apply_page,
    is_of_content,
    view_state,
)

# Dropping what was swapped out waits for its last readers, a dump among them, but never makes others wait.
DROP_LOCK_TIMEOUT: Final = "SET lock_timeout = '200ms'"
DROP_ATTEMPTS_MAX: Final = 50
DROP_PAUSE_SECONDS: Final = 0.2

# Pages decoded and waiting for each view: enough that nobody waits for nothing, and few for the memory.
PAGES_AHEAD_MAX: Final = 2
# How often what arrived meanwhile is applied before the swap: each round leaves less to the next.
CATCH_UP_ROUNDS: Final = 3

TRY_REBUILD_LOCK: Final = "SELECT pg_try_advisory_lock(hashtextextended('rebuild', 0))"
HOLD_VIEW: Final = "SELECT pg_advisory_lock(hashtextextended('view ' || $1, 0))"
IS_ALIVE: Final = "SELECT 1"
BEGIN_PROJECTION: Final = "INSERT INTO projection (position, definition) VALUES ($1, $2)"
SET_ASIDE_ROWS: Final = ("order_no", "since_version", "position", "reason")
COUNT_SET_ASIDE: Final = "SELECT count(*) FROM set_aside"

# Names of schemas and tables cannot be parameters. They are the views' own constants, never a caller's.
DROP_SCHEMA: Final = "DROP SCHEMA IF EXISTS {schema} CASCADE"
# Whoever rebuilds may make no schemas; the database lends these two ways of making those of views.
CREATE_SCHEMA: Final = "SELECT public.make_view_schema($1)"
SWAP_SCHEMAS: Final = "SELECT public.swap_view_schemas($1)"
COUNT_DIFFERENCES: Final = """
    SELECT (SELECT count(*) FROM (TABLE {view}.{table} EXCEPT ALL TABLE {view}_next.{table}) AS only_live)
         + (SELECT count(*) FROM (TABLE {view}_next.{table} EXCEPT ALL TABLE {view}.{table}) AS only_rebuilt)
"""

log = structlog.get_logger()


class RebuildRunningError(Exception):
    """Another rebuild is running already."""


class Log(Protocol):
    """The log, as a rebuild reads it."""

    async def read_log(self, after: int, limit: int) -> Sequence[LoggedEvent]:
        """Return the events above a position, in the order of the log."""
        ...

    async def head(self) -> int:
        """Return the highest position."""
        ...

    async def count(self, head: int) -> int:
        """Return about how many events lie up to a position."""
        ...

    def read_streams(self, head: int) -> AsyncGenerator[Sequence[LoggedEvent]]:
        """Yield the events up to a position, ordered by order and version, in pages."""
        ...


Connect = Callable[[str], Awaitable[Connection]]
Progress = Callable[[int, int], None]


class RebuiltView(NamedTuple):
    """What came of one view: what is set aside in it, and where a verification found it different."""

    name: str
    set_aside: int
    differences: int


@dataclass
class _Fill:
    """One view being filled: its connection, what its copy carries, and the orders set aside so far."""

    view: View
    connection: Connection
    carried: dict[str, object] = field(default_factory=dict)
    aside: dict[str, tuple[int, Undecodable]] = field(default_factory=dict)

    async def take(self, page: Sequence[LoggedEvent]) -> None:
        if self.aside or any(type(event) is Undecodable for _, event in page):
            page = [*self._not_aside(page)]
        if page:
            await self.view.copy(self.connection, cast("Sequence[DecodedEvent]", page), self.carried)

    def _not_aside(self, page: Sequence[LoggedEvent]) -> Iterator[LoggedEvent]:
        for position, event in page:
            if isinstance(event, Undecodable):
                self.aside.setdefault(event.originator_id, (position, event))
            elif event.originator_id not in self.aside:
                yield position, event


async def rebuild(
    views: Sequence[View], connect: Connect, log_reader: Log, progress: Progress, *, verify: bool = False
) -> list[RebuiltView]:
    """Rebuild views and swap them in, or compare them with the live ones and leave those alone.

    Args:
        views: the views; the log is read once for all of them.
        connect: opens a connection with the given search path.
        log_reader: the log.
        progress: told how many events are folded, and of how many.
        verify: compare instead of swapping.

    Raises:
        RebuildRunningError: another rebuild is running, in this process or another.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def open_connection(search_path: str) -> Connection:
            connection = await connect(search_path)
            stack.push_async_callback(connection.close)
            return connection

        async def empty_fills() -> list[_Fill]:
            return [_Fill(view, await open_connection(f"{view.name}_next")) for view in views]

        guard = await open_connection("public")
        if not await guard.fetchval(TRY_REBUILD_LOCK):
            raise RebuildRunningError
        fills = await empty_fills()
        head = await log_reader.head()
        try:
            await _fill(fills, guard, log_reader, head, progress)
        except Exception as error:
            if any(fill.connection.is_closed() for fill in fills) or not is_of_content(error):
                raise
            # Some event cannot be written: find which, the slow way, and set its order aside. A COPY that was
            # cancelled half way may keep its connection, and with it the locks of its tables: both are left.
            log.warning("the rebuild goes on event by event", error=repr(error))
            for fill in fills:
                fill.connection.terminate()
            fills = await empty_fills()
            await _fill_carefully(fills, guard, log_reader, head, progress)
        read_log = log_reader.read_log
        for fill in fills:
            # Most of what arrived meanwhile is applied before the live projector is made to wait for the rest.
            for _ in range(CATCH_UP_ROUNDS):
                await _catch_up(fill.connection, fill.view, read_log, await log_reader.head())
        if verify:
            return [await _compare(fill, connect, guard, read_log) for fill in fills]
        return [await _swap(fill, guard, log_reader) for fill in fills]


async def _prepare(fills: Sequence[_Fill], guard: Connection) -> None:
    for fill in fills:
        await _drop(guard, f"{fill.view.name}_next")
        await guard.execute(CREATE_SCHEMA, f"{fill.view.name}_next")
        await fill.connection.execute(fill.view.tables_sql)


async def _fill(
    fills: Sequence[_Fill], guard: Connection, log_reader: Log, head: int, progress: Progress
) -> None:
    """Copy the log up to ``head`` into new tables, order by order, then make their keys.

    The log is read once, and each view writes at its own pace: while the server takes one page, others are
    decoded and folded.
    """
    await _prepare(fills, guard)
    total = await log_reader.count(head)
    queues: list[asyncio.Queue[Sequence[LoggedEvent]]] = [asyncio.Queue(PAGES_AHEAD_MAX) for _ in fills]

    async def read() -> None:
        done = 0
        async with contextlib.aclosing(log_reader.read_streams(head)) as pages:
            async for page in pages:
                for queue in queues:
                    await queue.put(page)
                done += len(page)
                progress(done, max(total, done))
        for queue in queues:
            await queue.put(())

    async def write(fill: _Fill, queue: asyncio.Queue[Sequence[LoggedEvent]]) -> None:
        while page := await queue.get():
            await fill.take(page)
        await _complete(fill, head)

    try:
        async with asyncio.TaskGroup() as together:
            together.create_task(read())
            for fill, queue in zip(fills, queues, strict=True):
                together.create_task(write(fill, queue))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _complete(fill: _Fill, head: int) -> None:
    await fill.view.copy(fill.connection, [], fill.carried)
    await fill.connection.copy_records_to_table(
        "set_aside",
        records=[
            (order_no, failed.originator_version, position, failed.reason)
            for order_no, (position, failed) in fill.aside.items()
        ],
        columns=SET_ASIDE_ROWS,
    )
    await fill.connection.execute(fill.view.keys_sql)
    await fill.connection.execute(BEGIN_PROJECTION, head, fill.view.definition)


async def _fill_carefully(
    fills: Sequence[_Fill], guard: Connection, log_reader: Log, head: int, progress: Progress
) -> None:
    """Fill the views through the function that the live projections use, which sets orders aside."""
    await _prepare(fills, guard)
    for fill in fills:
        await fill.connection.execute(fill.view.keys_sql)
        await fill.connection.execute(BEGIN_PROJECTION, head, fill.view.definition)
    total = await log_reader.count(head)
    done = 0
    async with contextlib.aclosing(log_reader.read_streams(head)) as pages:
        async for page in pages:
            for fill in fills:
                async with fill.connection.transaction():
                    await _apply(fill.connection, fill.view, page, sets_aside=True)
            done += len(page)
            progress(done, max(total, done))


async def _swap(fill: _Fill, guard: Connection, log_reader: Log) -> RebuiltView:
    """Apply the rest and rename the schemas, in one transaction under the live projector's lock."""
    view, connection = fill.view, fill.connection
    await _drop(guard, f"{view.name}_old")
    async with connection.transaction():
        await connection.execute(TAKE_VIEW_LOCK, view.name)
        # The live view cannot be beyond this head: it does not move while its lock is held.
        await _catch_up(connection, view, log_reader.read_log, await log_reader.head())
        set_aside = await connection.fetchval(COUNT_SET_ASIDE)
        # The rebuild's own lock is this connection's: were it gone, another could be at the same tables.
        await guard.fetchval(IS_ALIVE)
        await connection.execute(SWAP_SCHEMAS, view.name)
    try:
        await _drop(guard, f"{view.name}_old")
    except asyncpg.LockNotAvailableError:
        log.warning("the old tables are still being read; the next replay drops them", view=view.name)
    return RebuiltView(view.name, set_aside, 0)


async def _compare(fill: _Fill, connect: Connect, guard: Connection, read_log: ReadLog) -> RebuiltView:
    """Bring the rebuilt and the live view to one position, take a snapshot of both there, and compare in it."""
    view, rebuilt = fill.view, fill.connection
    live = await connect(view.name)
    try:
        await live.execute(HOLD_VIEW, view.name)
        # First: what another definition made is not this code's to write.
        if (await view_state(live)).definition != view.definition:
            raise OutdatedViewError(f"the view {view.name} is outdated: it needs a replay")
        await _catch_up(live, view, read_log, (await view_state(rebuilt)).position)
        await _catch_up(rebuilt, view, read_log, (await view_state(live)).position)
        await rebuilt.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        set_aside = await rebuilt.fetchval(COUNT_SET_ASIDE)
    finally:
        # The view's lock goes with it.
        await live.close()
    differences = 0
    for table in (*view.tables, "set_aside"):
        differences += await rebuilt.fetchval(COUNT_DIFFERENCES.format(view=view.name, table=table))
    await rebuilt.execute("ROLLBACK")
    await _drop(guard, f"{view.name}_next")
    return RebuiltView(view.name, set_aside, differences)


async def _catch_up(connection: Connection, view: View, read_log: ReadLog, head: int) -> None:
    """Apply what lies between the view's position and a head in log order, as the live projection does."""
    while True:
        async with connection.transaction():
            state = await view_state(connection)
            page = await read_log(state.position, view.page_events_max)
            page = [logged for logged in page if logged[0] <= head]
            if not page:
                return
            await _apply(connection, view, page, sets_aside=state.sets_aside)
            await advance(connection, state.position, page[-1][0])


async def _apply(connection: Connection, view: View, page: Sequence[LoggedEvent], *, sets_aside: bool) -> None:
    try:
        async with connection.transaction():
            await apply_page(connection, view, page, sets_aside=sets_aside)
    except Exception as error:
        if connection.is_closed() or not is_of_content(error):
            raise
        await apply_page(connection, view, page, sets_aside=sets_aside, one_by_one=True)


async def _drop(guard: Connection, schema: str) -> None:
    await guard.execute(DROP_LOCK_TIMEOUT)
    for attempt in range(DROP_ATTEMPTS_MAX):
        try:
            await guard.execute(DROP_SCHEMA.format(schema=schema))
        except asyncpg.LockNotAvailableError:
            if attempt == DROP_ATTEMPTS_MAX - 1:
                raise
            await asyncio.sleep(DROP_PAUSE_SECONDS)
        else:
            return
