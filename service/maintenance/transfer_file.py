"""The file of an exported log: NDJSON with a header, one row on each line, and a last line to check them.

The header names the format, the schema's version, and each table's columns, so that a later release can read
an older file. The last line has the SHA-256 of all lines before it. It reveals a truncated or damaged file, but
proves nothing about who wrote the file.
"""

import asyncio
import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any, Final, Literal, NamedTuple, TypeAlias
from uuid import UUID

import orjson

from service import VERSION
from service.database.schema import SCHEMA_VERSION

FORMAT: Final = "order-tracking-log"
FORMAT_VERSION: Final = 1
# The first schema version with a log id.
LOG_ID_SCHEMA_VERSION: Final = 13

# A batch of rows is limited by both: a body may be a thousand times larger than usual.
BATCH_ROWS_MAX: Final = 2_000
BATCH_BYTES_MAX: Final = 2 * 1024 * 1024
CHUNK_BYTES: Final = 256 * 1024
# The largest body, 1 MiB, needs 7 bytes in a line for each of its own if it consists of control characters.
LINE_BYTES_MAX: Final = 64 * 1024 * 1024
BIGINT_MAX: Final = 2**63 - 1
# Errors quote at most this much of a line.
QUOTED_CHARACTERS: Final = 60

# "state": bytes that nearly always are UTF-8, and then are written as text.
Kind: TypeAlias = Literal["integer", "text", "bytes", "state", "time"]


class TransferError(Exception):
    """The export or the import failed. ``str()`` is one line with the reason."""


class Column(NamedTuple):
    """A column: its name in the file, its kind, whether it may be null, and another name in the table."""

    name: str
    kind: Kind
    is_nullable: bool = False
    table_name: str = ""

    @property
    def sql_name(self) -> str:
        """The column's name in the table."""
        return self.table_name or self.name


class Table(NamedTuple):
    """A table of the log: its columns, of which the first ones are its key, and the rows of a batch."""

    name: str
    columns: tuple[Column, ...]
    batch_rows: int = BATCH_ROWS_MAX
    key_columns: int = 2


# The first table of the provable history.
HISTORY: Final = "history_trees"

# A row refers only to rows above it. Left out are the browsers' sessions, which end at a move, subscriptions,
# which the old service may still deliver, the views, which are computed from the log, the log's id, which is
# in the header, and the two tables that the schema fills.
TABLES: Final = (
    Table(
        "order_events",
        (
            Column("position", "integer", table_name="notification_id"),
            Column("order_no", "text", table_name="originator_id"),
            Column("version", "integer", table_name="originator_version"),
            Column("topic", "text"),
            Column("state", "state"),
            Column("recorded_at", "time"),
        ),
    ),
    Table(
        "idempotency_keys",
        (
            Column("order_no", "text"),
            Column("key", "text"),
            Column("version", "integer"),
            Column("body_sha256", "bytes"),
        ),
    ),
    Table(
        "quarantine",
        (
            Column("quarantine_id", "integer"),
            Column("body", "bytes", is_nullable=True),
            Column("reason", "text"),
            Column("remote", "text", is_nullable=True),
            Column("state", "text"),
            Column("received_at", "time"),
            Column("times_seen", "integer"),
            Column("last_seen_at", "time"),
            Column("resolved_at", "time", is_nullable=True),
            Column("discard_reason", "text", is_nullable=True),
            Column("order_no", "text", is_nullable=True),
            Column("version", "integer", is_nullable=True),
            Column("named_order_no", "text", is_nullable=True),
        ),
        # Each may have a body of 1 MiB.
        batch_rows=32,
    ),
    Table(
        "api_keys",
        (
            Column("name", "text"),
            Column("scope", "text"),
            Column("secret_sha256", "bytes"),
            Column("created_at", "time"),
            Column("expires_at", "time", is_nullable=True),
            Column("last_used_at", "time", is_nullable=True),
            Column("revoked_at", "time", is_nullable=True),
        ),
    ),
    Table(
        "operations",
        (
            Column("operation_id", "integer"),
            Column("performed_at", "time"),
            Column("via", "text"),
            Column("actor", "text", is_nullable=True),
            Column("action", "text"),
            Column("subject", "text"),
            Column("reason", "text", is_nullable=True),
        ),
    ),
    Table(
        "handled_contradictions",
        (
            Column("order_no", "text"),
            Column("version", "integer"),
            Column("operation_id", "integer"),
        ),
    ),
    Table("revoked_shares", (Column("share_id", "text"), Column("revoked_at", "time"))),
    Table(
        "erasures",
        (
            Column("erasure_id", "integer"),
            Column("order_no", "text"),
            Column("erased_at", "time"),
            Column("erased_by", "text"),
            Column("reason", "text"),
            Column("events", "integer"),
            Column("entries", "integer"),
            Column("version", "integer", is_nullable=True),
        ),
    ),
    Table(
        HISTORY,
        (
            Column("tree", "integer"),
            Column("header", "text"),
            Column("created_at", "time"),
        ),
    ),
    Table(
        "history_tiles",
        (
            Column("tree", "integer"),
            Column("level", "integer"),
            Column("tile", "integer"),
            Column("hashes", "bytes"),
        ),
        # Each has up to 8 KiB.
        batch_rows=128,
        key_columns=3,
    ),
    Table(
        "history_salts",
        (
            Column("tile", "integer"),
            Column("salts", "bytes"),
        ),
        batch_rows=256,
    ),
    Table(
        "history_commitments",
        (
            Column("position", "integer"),
            Column("commitment", "bytes", is_nullable=True),
            Column("raw", "bytes", is_nullable=True),
        ),
    ),
    Table(
        "history_checkpoints",
        (
            Column("tree", "integer"),
            Column("size", "integer"),
            Column("note", "text"),
        ),
    ),
)
TABLES_BY_NAME: Final = {table.name: table for table in TABLES}
LOG: Final = TABLES[0]


class Part(NamedTuple):
    """A table's part of a file: its columns, how many rows it has, and the last number of its sequence."""

    columns: tuple[Column, ...]
    rows: int
    last_number: int | None


class Header(NamedTuple):
    """A file's first line. ``log_id`` is None if an older release has written the file."""

    schema_version: int
    release: str
    head: int
    log_id: UUID | None
    parts: dict[str, Part]

    @property
    def rows(self) -> int:
        """The number of rows of all tables."""
        return sum(part.rows for part in self.parts.values())

    @property
    def has_history(self) -> bool:
        """Whether the file has the provable history of the log."""
        return HISTORY in self.parts and self.parts[HISTORY].rows > 0


class Batch(NamedTuple):
    """Consecutive rows of one table, and the number of the line with the first of them."""

    table: Table
    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]
    first_line: int


class LogWriter:
    """Writes a file.

    Args:
        descriptor: the open file to write to.
        name: its name, for errors.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._pending = bytearray()
        self._sha256 = hashlib.sha256()
        self._lines = 0

    def write_header(self, head: int, log_id: UUID, parts: Mapping[str, Part]) -> None:
        """Write the first line."""
        tables = {
            name: {
                "rows": part.rows,
                "last_number": part.last_number,
                "columns": [column.name for column in part.columns],
            }
            for name, part in parts.items()
        }
        self._write(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "schema_version": SCHEMA_VERSION,
                "release": VERSION,
                "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "log": str(log_id),
                "head": head,
                "tables": tables,
            }
        )

    def write_row(self, table: Table, values: Sequence[Any]) -> None:
        """Write a row: the values of all of a table's columns."""
        row: dict[str, Any] = {"table": table.name}
        for column, value in zip(table.columns, values, strict=True):
            row[column.name] = value if value is None else _encode(column.kind, value)
        self._write(row)

    def finish(self, rows: Mapping[str, int]) -> None:
        """Write the last line, with the number of rows of each table."""
        self._write({"end": {"lines": self._lines, "rows": rows, "sha256": self._sha256.hexdigest()}})
        self._flush()

    def _write(self, line: object) -> None:
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        self._sha256.update(data)
        self._lines += 1
        self._pending += data
        if len(self._pending) >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        pending = memoryview(bytes(self._pending))
        self._pending.clear()
        try:
            while pending:
                pending = pending[os.write(self._descriptor, pending) :]
        except OSError as error:
            raise TransferError(f"cannot write {self._name}: {error.strerror}") from error


def _encode(kind: Kind, value: Any) -> Any:
    if kind == "time":
        return value.isoformat()
    if kind == "state":
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": b64encode(value).decode()}
    return {"base64": b64encode(value).decode()} if kind == "bytes" else value


async def read_lines(file: IO[bytes], name: str) -> AsyncGenerator[bytes]:
    """Yield the lines of a file or a pipe, each with its line break. Waiting for a pipe can be cancelled.

    Raises:
        TransferError: the file cannot be read, or a line is longer than LINE_BYTES_MAX.
    """
    descriptor, is_pipe = file.fileno(), not file.seekable()
    rest, number = b"", 0
    while True:
        if is_pipe:
            await _until_readable(descriptor)
        try:
            chunk = os.read(descriptor, CHUNK_BYTES)
        except OSError as error:
            raise TransferError(f"cannot read {name}: {error.strerror}") from error
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
        number += len(lines)
        if len(rest) > LINE_BYTES_MAX:
            raise TransferError(
                f"line {number + 1} is longer than {LINE_BYTES_MAX:,} bytes: {name} is not an exported log"
            )
    if rest:
        yield rest


async def _until_readable(descriptor: int) -> None:
    loop, is_readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(descriptor)


class LogReader:
    """Reads a file, and checks every line of it.

    Args:
        lines: the file's lines, each with its line break.
    """

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self._lines = lines
        self._number = 0
        # Of all lines before the present one.
        self._sha256 = hashlib.sha256()
        self._line = b""

    async def read_header(self) -> Header:
        """Read the first line.

        Raises:
            TransferError: it is not the header of an exported log that this release can import.
        """
        line = await self._next()
        try:
            fields = orjson.loads(line or b"")
            is_log = fields["format"] == FORMAT
        except (orjson.JSONDecodeError, TypeError, KeyError):
            is_log = False
        if not is_log:
            raise TransferError(
                f'line 1 is {_quote(line)}, not the header of an exported log ({{"format":"{FORMAT}",...}}): '
                "pass a file that 'export' has written"
            )
        try:
            return _parse_header(fields)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise TransferError(f"line 1: the header is malformed ({error!r}): export the log again") from error

    async def batches(self, header: Header) -> AsyncGenerator[Batch]:
        """Yield all rows. When this ends without an error, the file was complete and undamaged.

        Raises:
            TransferError: a line is malformed, or the last line is missing or contradicts the lines before.
        """
        batch: Batch | None = None
        batch_bytes = 0
        async for name, row, line_bytes in self._rows(header):
            is_full = batch is not None and (
                len(batch.rows) >= BATCH_ROWS_MAX or batch_bytes >= BATCH_BYTES_MAX
            )
            if batch is None or is_full or name != batch.table.name:
                if batch is not None:
                    yield batch
                batch, batch_bytes = (
                    Batch(TABLES_BY_NAME[name], header.parts[name].columns, [], self._number),
                    0,
                )
            batch.rows.append(row)
            batch_bytes += line_bytes
        if batch is not None:
            yield batch

    async def _rows(self, header: Header) -> AsyncGenerator[tuple[str, tuple[Any, ...], int]]:
        """Yield each row with the name of its table and the bytes of its line, and check the last line."""
        counts, order = dict.fromkeys(header.parts, 0), list(header.parts)
        previous, head = LOG.name, 0
        while True:
            line = await self._next()
            fields = self._parse(line)
            if "end" in fields:
                break
            name = fields.pop("table", None)
            if name not in header.parts:
                raise self._error(f"its table is {_quote(name)}. Expected one of: {', '.join(order)}")
            if order.index(name) < order.index(previous):
                raise self._error(f"a row of {name} follows rows of {previous}")
            row = self._parse_row(header.parts[name].columns, fields)
            if name == LOG.name:
                if row[0] <= head:
                    raise self._error(f"position {row[0]} follows position {head}")
                head = row[0]
            counts[name] += 1
            previous = name
            yield name, row, len(line)
        self._check_end(fields["end"], header, counts)
        if head != header.head:
            raise self._error(f"the last position is {head}, but the header's head is {header.head}")
        if await anext(self._lines, b""):
            self._number += 1
            raise self._error("it follows the last line of the export: the file was changed")

    def _check_end(self, end: Any, header: Header, counts: Mapping[str, int]) -> None:
        if not isinstance(end, dict) or end.keys() != {"lines", "rows", "sha256"}:
            raise self._error("the last line is malformed")
        expected = {name: part.rows for name, part in header.parts.items()}
        for found, where in ((end["rows"], "last line"), (expected, "header")):
            if found != counts:
                raise self._error(f"the file has the rows {counts}, but its {where} says {found}")
        digest = self._sha256.hexdigest()
        if end["lines"] != self._number - 1 or end["sha256"] != digest:
            raise self._error(
                f"the SHA-256 of the lines before is {digest}, but the last line says {end['sha256']}: "
                "the file was damaged or changed"
            )

    async def _next(self) -> bytes:
        self._sha256.update(self._line)
        self._line = line = await anext(self._lines, b"")
        self._number += 1
        if line and not line.endswith(b"\n"):
            raise self._error("it is cut off: the file is truncated")
        if not line and self._number > 1:
            raise self._error("it is missing, with the last line of the export: the file is truncated")
        return line

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise self._error(f"{_quote(line)} is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise self._error(f"{_quote(line)} is not a JSON object")
        return fields

    def _parse_row(self, columns: Sequence[Column], fields: Mapping[str, Any]) -> tuple[Any, ...]:
        if len(fields) != len(columns) or any(column.name not in fields for column in columns):
            names = ", ".join(column.name for column in columns)
            raise self._error(f"its members are {', '.join(fields)}. Expected: {names}")
        row: list[Any] = []
        for column in columns:
            value = fields[column.name]
            if value is None and column.is_nullable:
                row.append(None)
                continue
            try:
                row.append(_decode(column.kind, value))
            except (ValueError, TypeError, KeyError):
                raise self._error(f"{column.name} is {_quote(value)}. Expected: {column.kind}") from None
        return tuple(row)

    def _error(self, problem: str) -> TransferError:
        return TransferError(f"line {self._number}: {problem}; nothing was imported")


def _parse_header(fields: Mapping[str, Any]) -> Header:
    version, schema_version, release = fields["format_version"], fields["schema_version"], fields["release"]
    remedy = f"import the file with release {release} or a newer one"
    if _integer(version) > FORMAT_VERSION:
        raise TransferError(
            f"the file has format version {version}, but this release supports at most {FORMAT_VERSION}: "
            f"{remedy}"
        )
    if _integer(schema_version) > SCHEMA_VERSION:
        raise TransferError(
            f"the file has schema version {schema_version}, but this release supports at most "
            f"{SCHEMA_VERSION}: {remedy}"
        )
    parts = {}
    for name, part in fields["tables"].items():
        known = {column.name: column for column in TABLES_BY_NAME[name].columns}
        columns = tuple(known[column] for column in part["columns"])
        last_number = part["last_number"]
        parts[name] = Part(
            columns, _integer(part["rows"]), None if last_number is None else _integer(last_number)
        )
    if list(parts) != [name for name in TABLES_BY_NAME if name in parts] or LOG.name not in parts:
        raise ValueError(f"the tables are {', '.join(parts)}")
    if parts[LOG.name].columns != LOG.columns:
        raise ValueError(f"the columns of {LOG.name} are {fields['tables'][LOG.name]['columns']}")
    log_id = UUID(fields["log"]) if schema_version >= LOG_ID_SCHEMA_VERSION else None
    return Header(schema_version, str(release), _integer(fields["head"]), log_id, parts)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= BIGINT_MAX:
        raise ValueError(f"{value!r} is not an integer from 0 to {BIGINT_MAX}")
    return value


def _decode(kind: Kind, value: Any) -> Any:
    if kind == "integer":
        return _integer(value)
    if kind == "time":
        time = datetime.fromisoformat(value)
        if time.tzinfo is None:
            raise ValueError("the time has no time zone")
        return time
    if isinstance(value, str):
        if kind == "bytes":
            raise TypeError("the bytes are not in base64")
        return value.encode() if kind == "state" else value
    if kind == "text":
        raise TypeError("the value is not a text")
    return b64decode(value["base64"], validate=True)


def _quote(value: object) -> str:
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return repr(text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}...")
