"""Export and import: a whole log moves into an empty database, with its id, positions, versions and bytes.

An export reads one snapshot, and an import is one transaction. Neither holds more than a batch in memory.
"""

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final, NamedTuple

import asyncpg

from projections.postgres_errors import Connection, is_connection_lost
from service.database.log_identity import read_log_id, set_log_id
from service.database.schema import (
    HISTORY_PREFIX,
    SCHEMA_LOCK,
    SET_SEARCH_PATH,
    TAKE_SCHEMA_LOCK,
    act_as_owner,
    mark_views_outdated,
)
from service.database.sequences import NUMBERED, advance, last_number, require_rising_numbers
from service.event_log import store
from service.event_log.feed import NO_TIMEOUTS
from service.event_log.store import RecordedEvent
from service.maintenance.transfer_file import (
    BATCH_ROWS_MAX,
    LOG,
    TABLES,
    Batch,
    Header,
    LogReader,
    LogWriter,
    Part,
    Table,
    TransferError,
)

# The rows of a table other than the log, by their primary key.
SELECT: Final = "SELECT {columns} FROM public.{table} ORDER BY {key}"
COUNT: Final = "SELECT count(*) FROM public.{table}"
# The role that imports, and whether it may choose positions.
IMPORTER: Final = """
    SELECT current_user::text, has_column_privilege('public.order_events', 'notification_id', 'INSERT')
"""
# The planner has no statistics of the new rows.
ANALYZE: Final = "ANALYZE {tables}"
# Where PostgreSQL found an error in a batch, whose rows it counts from 1.
COPIED_LINE: Final = re.compile(r"^COPY \w+, line (\d+)")

_SEQUENCES: Final = {numbered.table: numbered for numbered in NUMBERED}

# Receives the number of rows that are done, and that of all rows.
Progress = Callable[[int, int], None]


class Moved(NamedTuple):
    """What was exported or imported: the log's last position, and the number of rows of each table."""

    head: int
    rows: dict[str, int]


async def export_log(connection: Connection, writer: LogWriter, progress: Progress) -> Moved:
    """Write one snapshot of the log.

    Raises:
        TransferError: the file cannot be written.
    """
    # The file's reader may be slow.
    await connection.execute(NO_TIMEOUTS)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute(SET_SEARCH_PATH, "public")
        head = await store.head_position(connection)
        parts = {table.name: await _describe(connection, table) for table in TABLES}
        writer.write_header(head, await read_log_id(connection), parts)
        done, total = 0, sum(part.rows for part in parts.values())
        rows = {}
        for table in TABLES:
            before = done
            async for batch in _read_events(connection) if table is LOG else _read_rows(connection, table):
                for row in batch:
                    writer.write_row(table, tuple(row))
                done += len(batch)
                progress(done, total)
            rows[table.name] = done - before
        writer.finish(rows)
    return Moved(head, rows)


async def _describe(connection: Connection, table: Table) -> Part:
    rows: int = await connection.fetchval(COUNT.format(table=table.name))
    numbered = _SEQUENCES.get(table.name)
    number = None if numbered is None else await last_number(connection, numbered)
    return Part(table.columns, rows, number)


async def _read_events(connection: Connection) -> AsyncGenerator[Sequence[RecordedEvent]]:
    position = 0
    while batch := await store.read_log(connection, position, BATCH_ROWS_MAX):
        yield batch
        position = batch[-1].position


async def _read_rows(connection: Connection, table: Table) -> AsyncGenerator[Sequence[asyncpg.Record]]:
    columns = ", ".join(column.sql_name for column in table.columns)
    key = ", ".join(str(number) for number in range(1, table.key_columns + 1))
    cursor = await connection.cursor(SELECT.format(columns=columns, table=table.name, key=key))
    while batch := await cursor.fetch(table.batch_rows):
        yield batch


async def import_log(
    connection: Connection, reader: LogReader, header: Header, progress: Progress, *, with_history: bool = True
) -> Moved:
    """Import a file into an empty database in one transaction: all of it, or nothing.

    Args:
        connection: a connection whose role may act as the log's owner, to a database with the current schema.
        reader: the file, of which the header was read.
        header: the header.
        progress: receives the progress.
        with_history: whether to import the provable history too, if the file has it.

    Raises:
        TransferError: the database is not empty, its role may not import, or the file is malformed, damaged or
            truncated. Nothing was imported.
    """
    # The file's writer may be slow.
    await connection.execute(NO_TIMEOUTS)
    async with connection.transaction():
        await connection.execute(SET_SEARCH_PATH, "public")
        # A service that starts now waits for this lock; the events of one that runs already wait for the next.
        await connection.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
        await store.take_append_lock(connection)
        await act_as_owner(connection)
        await _refuse_others(connection)
        rows = dict.fromkeys(header.parts, 0)
        async for batch in reader.batches(header):
            if with_history or not batch.table.name.startswith(HISTORY_PREFIX):
                await _copy(connection, batch)
                rows[batch.table.name] += len(batch.rows)
            progress(sum(rows.values()), header.rows)
        for name, part in header.parts.items():
            if part.last_number is not None:
                await advance(connection, _SEQUENCES[name], part.last_number)
        await require_rising_numbers(connection)
        if header.log_id is not None:
            # Every position means the same event as before, so readers continue with theirs.
            await set_log_id(connection, header.log_id)
        await mark_views_outdated(connection)
    await connection.execute(ANALYZE.format(tables=", ".join(f"public.{table.name}" for table in TABLES)))
    return Moved(header.head, rows)


async def _refuse_others(connection: Connection) -> None:
    """Refuse a role that may not import, and a database with data."""
    ((role, may_import),) = await connection.fetch(IMPORTER)
    if not may_import:
        raise TransferError(
            f"the role {role} may not choose the positions of events: set ORDER_TRACKING_DATABASE_URL to the "
            "URL of the role that created the schema, as for 'migrate'"
        )
    counts = {table.name: await connection.fetchval(COUNT.format(table=table.name)) for table in TABLES}
    if any(counts.values()):
        found = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
        raise TransferError(
            f"the database is not empty (rows of {found}): set ORDER_TRACKING_STATE_DIR to a new folder, or "
            "ORDER_TRACKING_DATABASE_URL to a database that no service has used"
        )


async def _copy(connection: Connection, batch: Batch) -> None:
    """Insert a batch by COPY, which may set columns that are GENERATED ALWAYS AS IDENTITY."""
    try:
        await connection.copy_records_to_table(
            batch.table.name,
            schema_name="public",
            columns=[column.sql_name for column in batch.columns],
            records=batch.rows,
        )
    except asyncpg.PostgresError as error:
        if is_connection_lost(error):
            raise
        line = COPIED_LINE.match(getattr(error, "context", None) or "")
        first, last = batch.first_line, batch.first_line + len(batch.rows) - 1
        where = f"line {first + int(line[1]) - 1}" if line else f"one of the lines {first} to {last}"
        reason = " ".join(str(error).splitlines())
        raise TransferError(
            f"{where}: the database refuses the row ({reason}); nothing was imported"
        ) from error
