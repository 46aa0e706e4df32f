"""Rebuild views from the log beside the live ones, and swap them in while webhooks and reads continue."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import Final, NamedTuple

import asyncpg
import structlog

from domain.logged import LoggedEvent
from projections import parked
from projections.postgres import Connection, is_event_at_fault
from projections.view import View
from service.database.schema import CREATE_VIEW_SCHEMA
from service.event_log.follow import START, Log, Place, place_of, require_place
from service.event_log.snapshot import Snapshot
from service.event_log.snapshot import snapshot as read_snapshot
from service.projecting.locks import (
    HOLD_ERASURE_LOCK,
    HOLD_VIEW_LOCK,
    TAKE_SWAP_LOCK,
    TAKE_VIEW_LOCK,
    TRY_REBUILD_LOCK,
)
from service.projecting.projector import (
    OutdatedViewError,
    advance,
    apply_batch,
    apply_erasures,
    view_state,
    without_parked,
)

# Dropping an old schema waits for its last readers, such as a dump, but must not block new readers for long.
DROP_LOCK_TIMEOUT: Final = "SET lock_timeout = '200ms'"
DROP_ATTEMPTS_MAX: Final = 50
DROP_PAUSE_SECONDS: Final = 0.2

# The number of decoded batches queued for each view: enough to keep every view busy, with little memory.
BATCHES_AHEAD_MAX: Final = 2
# Rounds of applying new events before the swap. Each round leaves fewer events for the next.
CATCH_UP_ROUNDS: Final = 3

IS_ALIVE: Final = "SELECT 1"
INSERT_PROJECTION: Final = "INSERT INTO projection (position, erasure_id, definition) VALUES ($1, $2, $3)"

# Schema and table names cannot be parameters. They are constants of the views, never a caller's text.
DROP_SCHEMA: Final = "DROP SCHEMA IF EXISTS {schema} CASCADE"
# As the owner, since the service's role may not rename schemas.
SWAP_SCHEMAS: Final = "SELECT public.swap_view_schemas($1)"
COUNT_DIFFERENCES: Final = """
    SELECT (SELECT count(*) FROM (TABLE {view}.{table} EXCEPT ALL TABLE {view}_next.{table}) AS only_live)
         + (SELECT count(*) FROM (TABLE {view}_next.{table} EXCEPT ALL TABLE {view}.{table}) AS only_rebuilt)
"""

logger = structlog.get_logger()


class RebuildRunningError(Exception):
    """Another rebuild, or a backup, is running."""


class _EventAtFaultError(Exception):
    """Some event of those in memory cannot be added to a view."""


# Opens a connection with the given search path.
ConnectTo = Callable[[str], Awaitable[Connection]]
# Called with the number of events processed so far, and the total.
OnProgress = Callable[[int, int], None]


class RebuiltView(NamedTuple):
    """The result for one view: the numbers of parked orders and of rows that a verification found different."""

    name: str
    parked: int
    differences: int


class _NextView(NamedTuple):
    """A view that is being rebuilt, and a connection whose search path is the schema of its new tables."""

    view: View
    connection: Connection


async def rebuild(
    views: Sequence[View], connect: ConnectTo, log: Log, progress: OnProgress, *, verify: bool = False
) -> list[RebuiltView]:
    """Rebuild views and swap them in, or compare them with the live views and leave those unchanged.

    Args:
        views: the views. The log is read once for all of them.
        connect: opens a connection with the given search path.
        log: the log.
        progress: called after each batch.
        verify: compare instead of swapping.

    Raises:
        RebuildRunningError: another rebuild or a backup is running, in this process or another.
        OutdatedViewError: a live view to be compared was built with another definition.
        PlaceLostError: the log has lost events, by a failover or a restore, while it was read.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def open_connection(search_path: str) -> Connection:
            connection = await connect(search_path)
            stack.push_async_callback(connection.close)
            return connection

        guard = await open_connection("public")
        if not await guard.fetchval(TRY_REBUILD_LOCK):
            raise RebuildRunningError
        async with guard.transaction():
            await guard.execute(TAKE_SWAP_LOCK)
        rebuilt = [_NextView(view, await open_connection(f"{view.name}_next")) for view in views]
        try:
            end = await _fill(rebuilt, guard, connect, progress, at_once=False)
        except _EventAtFaultError as error:
            # Batch by batch, the order with the event at fault is found and parked.
            logger.warning(
                "an event cannot be added to a view: the rebuild begins again", error=repr(error.__cause__)
            )
            # The views that did not fail were cancelled, which has closed their connections.
            rebuilt = [_NextView(view, await open_connection(f"{view.name}_next")) for view in views]
            end = await _fill(rebuilt, guard, connect, progress, at_once=True)
        ends = [end] * len(rebuilt)
        for number, (view, connection) in enumerate(rebuilt):
            # Apply most of the new events now, so that the live projector waits only for the rest.
            for _ in range(CATCH_UP_ROUNDS):
                ends[number] = await _catch_up(connection, view, log, await log.head(), ends[number])
        done = zip(rebuilt, ends, strict=True)
        if verify:
            return [await _compare(*one, connect, guard, log, end) for one, end in done]
        return [await _swap(*one, guard, log, end) for one, end in done]


async def _create_tables(view: View, connection: Connection, guard: Connection, snapshot: Snapshot) -> None:
    await _drop(guard, f"{view.name}_next")
    await guard.execute(CREATE_VIEW_SCHEMA, f"{view.name}_next")
    await connection.execute(view.tables_sql)
    await connection.execute(INSERT_PROJECTION, snapshot.end.position, snapshot.erasure_id, view.definition)


async def _fill(
    rebuilt: Sequence[_NextView], guard: Connection, connect: ConnectTo, progress: OnProgress, *, at_once: bool
) -> Place:
    """Write the log as it is now into new tables, order by order, then create their indexes.

    The log is read once, and each view writes at its own pace: while the server writes one batch, the next ones
    are decoded and folded. Unless ``at_once``, a view folds batches until its rows are many.

    Returns:
        The place at the end of what was read. The log may lose it before the new tables are used.
    """
    async with read_snapshot(partial(connect, "public")) as snapshot:
        for view, connection in rebuilt:
            await _create_tables(view, connection, guard, snapshot)
        await _write_all(rebuilt, snapshot, progress, at_once=at_once)
    return snapshot.end


async def _write_all(
    rebuilt: Sequence[_NextView], snapshot: Snapshot, progress: OnProgress, *, at_once: bool
) -> None:
    queues: list[asyncio.Queue[Sequence[LoggedEvent]]] = [asyncio.Queue(BATCHES_AHEAD_MAX) for _ in rebuilt]

    async def read() -> None:
        done = 0
        async with contextlib.aclosing(snapshot.batches) as batches:
            async for batch in batches:
                for queue in queues:
                    await queue.put(batch)
                done += len(batch)
                progress(done, max(snapshot.total, done))
        for queue in queues:
            await queue.put(())

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            for (view, connection), queue in zip(rebuilt, queues, strict=True):
                group.create_task(_write(view, connection, queue, at_once=at_once))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _write(
    view: View, connection: Connection, queue: asyncio.Queue[Sequence[LoggedEvent]], *, at_once: bool
) -> None:
    """Write batches up to an empty one, then create the view's indexes."""
    rows = view.new_rows()
    while batch := await queue.get():
        async with connection.transaction():
            has_parked = (await view_state(connection)).has_parked
            if at_once:
                await _apply(connection, view, batch, has_parked=has_parked)
                continue
            decoded = await without_parked(connection, view, batch, has_parked=has_parked)
            with _blaming_events(connection):
                view.fold(decoded, rows)
                if view.is_full(rows):
                    await view.write_new(connection, rows)
                    rows = view.new_rows()
    async with connection.transaction():
        with _blaming_events(connection):
            await view.write_new(connection, rows)
    if view.indexes_sql:
        await connection.execute(view.indexes_sql)


@contextlib.contextmanager
def _blaming_events(connection: Connection) -> Iterator[None]:
    """Raise _EventAtFaultError if an event is the reason for a failure."""
    try:
        yield
    except Exception as error:
        if connection.is_closed() or not is_event_at_fault(error):
            raise
        raise _EventAtFaultError from error


async def _swap(view: View, connection: Connection, guard: Connection, log: Log, end: Place) -> RebuiltView:
    """Apply the remaining events and rename the schemas, in one transaction under the live projector's lock."""
    await _drop(guard, f"{view.name}_old")
    async with connection.transaction():
        await connection.execute(TAKE_SWAP_LOCK)
        await connection.execute(TAKE_VIEW_LOCK, view.name)
        # The live view cannot be beyond this head: it does not move while its lock is held.
        await _catch_up(connection, view, log, await log.head(), end)
        parked_orders = await parked.count_parked(connection)
        # The guard holds the rebuild lock. If it was lost, another rebuild may have dropped these tables.
        await guard.fetchval(IS_ALIVE)
        await connection.execute(SWAP_SCHEMAS, view.name)
    try:
        await _drop(guard, f"{view.name}_old")
    except asyncpg.LockNotAvailableError:
        logger.warning("the old tables are still being read; the next replay drops them", view=view.name)
    return RebuiltView(view.name, parked_orders, 0)


async def _compare(  # noqa: PLR0913, PLR0917 - two views, and what their tables were read from
    view: View,
    rebuilt: Connection,
    connect: ConnectTo,
    guard: Connection,
    log: Log,
    end: Place,
) -> RebuiltView:
    """Bring the rebuilt and the live view to the same position and erasure, and compare them in a snapshot."""
    live = await connect(view.name)
    try:
        # No erasure may come between the two.
        await live.execute(HOLD_ERASURE_LOCK)
        await live.execute(HOLD_VIEW_LOCK, view.name)
        # Checked before any write: this code must not write to a view that was built with another definition.
        if (await view_state(live)).definition != view.definition:
            raise OutdatedViewError(f"the view {view.name} is outdated: run 'replay' to rebuild it")
        await _catch_up(live, view, log, (await view_state(rebuilt)).position, START)
        end = await _catch_up(rebuilt, view, log, (await view_state(live)).position, end)
        await rebuilt.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        # The first query takes the snapshot.
        await require_place(rebuilt, end)
        parked_orders = await parked.count_parked(rebuilt)
    finally:
        # This also releases the locks.
        await live.close()
    differences = 0
    for table in (*(table.name for table in view.tables), "parked_orders"):
        differences += await rebuilt.fetchval(COUNT_DIFFERENCES.format(view=view.name, table=table))
    await rebuilt.execute("ROLLBACK")
    await _drop(guard, f"{view.name}_next")
    return RebuiltView(view.name, parked_orders, differences)


async def _catch_up(connection: Connection, view: View, log: Log, head: int, end: Place) -> Place:
    """Apply all erasures, and the events up to a head in log order, as the live projection does.

    Args:
        connection: a connection whose search path is the view's schema.
        view: the view.
        log: the log.
        head: the head.
        end: the place up to which events were applied before, which the log must still have.

    Returns:
        The place up to which they are applied by now.

    Raises:
        PlaceLostError: the log has lost an event that was applied.
    """
    while True:
        async with connection.transaction():
            began = monotonic()
            state = await view_state(connection)
            has_more_erasures = await apply_erasures(connection, view, state)
            await log.memory.hear(state.newest_erasure_id, began)
            batch = await log.read_log(state.position, view.batch_events_max)
            batch = [logged for logged in batch if logged[0] <= head]
            # Only now: a log that still has the last event had it when this batch was read.
            await require_place(connection, end)
            if batch:
                await _apply(connection, view, batch, has_parked=state.has_parked)
                await advance(connection, state.position, batch[-1])
                end = place_of(*batch[-1])
        if not (batch or has_more_erasures):
            return end


async def _apply(connection: Connection, view: View, batch: Sequence[LoggedEvent], *, has_parked: bool) -> None:
    try:
        async with connection.transaction():
            await apply_batch(connection, view, batch, has_parked=has_parked)
    except Exception as error:
        if connection.is_closed() or not is_event_at_fault(error):
            raise
        await apply_batch(connection, view, batch, has_parked=has_parked, one_by_one=True)


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
