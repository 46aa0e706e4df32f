"""A move: a whole log goes to another database, by COPY from server to server, and goes on there.

The source is locked against every write, so that all of its tables are of one state. The target gets them in
one transaction, with their positions, bytes, provable history and log id: readers and subscriptions go on where
they were. Then the source is marked, and no service starts on it again: it would record what the target lacks.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Final, NamedTuple

import asyncpg

from projections.postgres import Connection
from service.database import log_identity
from service.database.schema import (
    SCHEMA_LOCK,
    SET_SEARCH_PATH,
    TAKE_SCHEMA_LOCK,
    act_as_owner,
    apply_schema,
    check_version,
    mark_views_outdated,
)
from service.database.sequences import Numbered, advance, last_number, require_rising_numbers
from service.errors import OperatorError
from service.event_log import store
from service.event_log.snapshot import NO_TIMEOUTS

# Tables that the schema fills, and the log's id, which replaces that of the target.
NOT_COPIED: Final = ("schema_version", "view_names", log_identity.TABLE)
# The tables of the log's owner: their columns without those that PostgreSQL computes, the one that a sequence
# numbers, their size, and the tables that they refer to. Tables of your own stay behind.
TABLES: Final = """
    SELECT relname::text,
        ARRAY(SELECT attname::text FROM pg_attribute
              WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
              ORDER BY attnum),
        (SELECT attname::text FROM pg_attribute WHERE attrelid = pg_class.oid AND attidentity <> ''),
        pg_table_size(oid),
        ARRAY(SELECT referenced.relname::text
              FROM pg_constraint JOIN pg_class AS referenced ON referenced.oid = confrelid
              WHERE conrelid = pg_class.oid AND contype = 'f')
    FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> ALL ($1)
        AND relowner = (SELECT relowner FROM pg_class WHERE oid = 'public.order_events'::regclass)
    ORDER BY relname
"""
HAS_ROWS: Final = "SELECT EXISTS (SELECT FROM public.{table})"
# A session that writes delays this; a service that stopped a moment ago is gone by then.
LOCK_SECONDS_MAX: Final = 5
LIMIT_LOCKS: Final = f"SET LOCAL lock_timeout = '{LOCK_SECONDS_MAX}s'"
LOCK_TABLES: Final = "LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE"
# Every role can see that another session is there. Autovacuum has no user.
OTHER_SESSIONS: Final = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND usesysid IS NOT NULL AND pid <> pg_backend_pid()
"""
# Without this, pg_stat_activity does not change within a transaction.
LOOK_AGAIN: Final = "SELECT pg_stat_clear_snapshot()"
SESSIONS_CHECK_SECONDS: Final = 0.1
TRY_SCHEMA_LOCK: Final = "SELECT pg_try_advisory_xact_lock($1)"
# The role that moves, and whether it may choose positions.
MOVER: Final = """
    SELECT current_user::text, has_column_privilege('public.order_events', 'notification_id', 'INSERT')
"""
ANALYZE: Final = "ANALYZE {tables}"
# Pieces of COPY data, of up to 64 KiB each, that wait for the target.
PIECES_MAX: Final = 16

WRITTEN: Final = "another session writes to the database: stop every service first"

# Receives the bytes that were copied, and about how many there are.
OnProgress = Callable[[int, int], None]


class MoveError(OperatorError):
    """The log cannot be moved, and was not. ``str()`` is one line with the reason."""


class Moved(NamedTuple):
    """The log's last position, and the rows of each table; empty if an earlier move has copied them."""

    head: int
    rows: dict[str, int]


class _Table(NamedTuple):
    name: str
    columns: Sequence[str]
    numbered: str | None
    bytes_about: int
    refers_to: Sequence[str]


async def move_log(source: Connection, target: Connection, destination: str, on_progress: OnProgress) -> Moved:
    """Move the log to an empty database. If this ends without an error, the source is marked as moved.

    Args:
        source: a connection whose role may act as the log's owner. No other session may use this database.
        target: a connection to another database, whose role may create the schema.
        destination: the other database, without secrets: the mark names it.
        on_progress: receives the progress.

    Raises:
        MoveError: another session uses the source, the target is not empty, or a role lacks rights.
        SchemaError: this release cannot work with one of the databases, or the source was moved before.
    """
    for connection in (source, target):
        await connection.execute(NO_TIMEOUTS)
        await apply_schema(connection)
    await check_version(source)
    async with source.transaction():
        await _wait_for_turn(source)
        rows = {}
        # It ends first: an error here leaves the source as it was.
        async with target.transaction():
            # A service that starts there now waits for this lock, and then finds the log.
            if not await target.fetchval(TRY_SCHEMA_LOCK, SCHEMA_LOCK):
                raise MoveError("the target is the source itself, or another session is preparing it")
            await target.execute(SET_SEARCH_PATH, "public")
            tables = await _lock(source)
            head, log_id = await store.head_position(source), await log_identity.read_log_id(source)
            # An earlier move may have ended between the two commits.
            is_copied = await log_identity.read_log_id(target) == log_id
            if not is_copied:
                await store.take_append_lock(target)
                await act_as_owner(target)
                await _refuse_others(target, tables)
                rows = await _copy_all(source, target, tables, on_progress)
                await log_identity.set_log_id(target, log_id)
                await mark_views_outdated(target)
        if is_copied and (found := await store.head_position(target)) != head:
            raise MoveError(f"the target has the same log, up to position {found} instead of {head}: use it")
        await log_identity.mark_moved(source, destination)
    # The planner has no statistics of the new rows.
    await target.execute(ANALYZE.format(tables=", ".join(f"public.{table.name}" for table in tables)))
    return Moved(head, rows)


async def _wait_for_turn(source: Connection) -> None:
    """Let a service that starts now wait. It then finds the mark."""
    await source.execute(LIMIT_LOCKS)
    try:
        await source.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
    except asyncpg.LockNotAvailableError:
        raise MoveError(WRITTEN) from None


async def _lock(source: Connection) -> Sequence[_Table]:
    """Lock every table of the log against writes, and return them, so that none refers to a later one."""
    await source.execute(SET_SEARCH_PATH, "public")
    await act_as_owner(source)
    tables = _sort(map(_Table._make, await source.fetch(TABLES, NOT_COPIED)))
    names = ", ".join(table.name for table in tables)
    try:
        await source.execute(LOCK_TABLES.format(tables=names))
    except asyncpg.LockNotAvailableError:
        raise MoveError(WRITTEN) from None
    now = asyncio.get_running_loop().time
    deadline = now() + LOCK_SECONDS_MAX
    while others := await source.fetchval(OTHER_SESSIONS):
        if now() > deadline:
            raise MoveError(
                f"{others} other sessions are connected to the database: stop every service, and end the others"
            )
        await asyncio.sleep(SESSIONS_CHECK_SECONDS)
        await source.execute(LOOK_AGAIN)
    return tables


def _sort(tables: Iterable[_Table]) -> Sequence[_Table]:
    waiting, done = [*tables], list[_Table]()
    while waiting:
        names = {table.name for table in waiting}
        free = [table for table in waiting if names.isdisjoint({*table.refers_to} - {table.name})]
        done += free
        waiting = [table for table in waiting if table not in free]
    return done


async def _refuse_others(target: Connection, tables: Sequence[_Table]) -> None:
    """Refuse a role that may not choose positions, and a database with data."""
    ((role, may_choose),) = await target.fetch(MOVER)
    if not may_choose:
        raise MoveError(
            f"the role {role} of the target may not choose the positions of events: name the role that created "
            "its schema"
        )
    if full := [one.name for one in tables if await target.fetchval(HAS_ROWS.format(table=one.name))]:
        raise MoveError(f"the target is not empty (rows of {', '.join(full)}): name a database without data")


async def _copy_all(
    source: Connection, target: Connection, tables: Sequence[_Table], on_progress: OnProgress
) -> dict[str, int]:
    total, done = sum(table.bytes_about for table in tables), 0

    def count(piece: bytes) -> None:
        nonlocal done
        done += len(piece)
        on_progress(done, max(done, total))

    rows = {table.name: await _copy(source, target, table, count) for table in tables}
    for table in tables:
        if table.numbered is not None:
            numbered = Numbered(table.name, table.numbered)
            await advance(target, numbered, await last_number(source, numbered))
    await require_rising_numbers(target)
    return rows


async def _copy(source: Connection, target: Connection, table: _Table, count: Callable[[bytes], None]) -> int:
    """Copy a table in PostgreSQL's binary form, which is the same from version 15 on; return the rows."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES_MAX)

    async def read() -> None:
        await source.copy_from_table(
            table.name, schema_name="public", columns=table.columns, output=pieces.put, format="binary"
        )
        await pieces.put(None)

    async def write() -> AsyncIterator[bytes]:
        while (piece := await pieces.get()) is not None:
            count(piece)
            yield piece

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            copied = group.create_task(
                target.copy_to_table(
                    table.name, schema_name="public", columns=table.columns, source=write(), format="binary"
                )
            )
    except ExceptionGroup as errors:
        # The other task was cancelled.
        raise errors.exceptions[0] from None
    return int(copied.result().removeprefix("COPY "))
