"""Import of reports that no webhook brought, from a file of rows: order_no, cnote, status, at.

Every row is checked before anything is recorded. A report is then recorded at the time in its row, after the
reports that its order has already: those keep their places, times and verdicts.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from uuid import uuid4

import orjson

from domain.order import Arrival, Order, Report
from projections.postgres import Connection
from service.event_log import store
from service.event_log.codec import decode_event
from service.http.csv_export import unescape_formula
from service.ingest.parser import YEAR_MIN, UnreadableError, parse, refuse_duplicates
from service.ingest.recorder import ClaimedEvent, Recorder, UnrecordableReportError

# The whole file is checked, and sorted by order, in memory: about 1 kB for each row.
ROWS_MAX: Final = 1_000_000
# The maximum size of a file.
FILE_BYTES_MAX: Final = 512 * 1024 * 1024
# Bad rows beyond these are not listed.
ERRORS_LISTED_MAX: Final = 20
# Rows that are recorded in one transaction; an order is never divided. Webhooks wait for it.
BATCH_ROWS: Final = 200
# How far the time of a row may lie ahead of this machine's clock.
AHEAD_MAX: Final = timedelta(minutes=5)
EVENTS_BATCH_MAX: Final = 1_000

COLUMNS: Final = ("order_no", "cnote", "status", "at")

EXISTING: Final = """
    SELECT order_no FROM unnest($1::text[]) AS requested (order_no)
    WHERE EXISTS (SELECT FROM order_events WHERE originator_id = requested.order_no)
"""


class BadFileError(Exception):
    """The file cannot be imported, and nothing was. ``str()`` names each bad row on its own line."""


class ReportsFile(NamedTuple):
    """The reports of a file, by order and then by time.

    Attributes:
        orders: each order's reports, oldest first.
        rows: the number of reports.
        blank: the number of rows whose status and time are both blank.
    """

    orders: Mapping[str, Sequence[Report]]
    rows: int
    blank: int


class Imported(NamedTuple):
    """The numbers of an import.

    Attributes:
        recorded: the reports that were recorded.
        present: the reports that an earlier import has recorded.
        overtaken: the reports that were left out, because their order has a report at the same time or later.
        failed: the reports of orders whose last event this release cannot read.
        overtaken_orders: the first orders of those that were overtaken, at most ERRORS_LISTED_MAX.
    """

    recorded: int = 0
    present: int = 0
    overtaken: int = 0
    failed: int = 0
    overtaken_orders: tuple[str, ...] = ()

    def plus(self, other: "Imported") -> "Imported":
        """Return the sums."""
        return Imported(
            self.recorded + other.recorded,
            self.present + other.present,
            self.overtaken + other.overtaken,
            self.failed + other.failed,
            (self.overtaken_orders + other.overtaken_orders)[:ERRORS_LISTED_MAX],
        )


def read_reports(content: bytes, now: datetime) -> ReportsFile:
    """Read a file of reports.

    Args:
        content: CSV with a heading, or NDJSON, in UTF-8.
        now: the time of the import.

    Raises:
        BadFileError: a row is invalid, or there are none or too many.
    """
    if len(content) > FILE_BYTES_MAX:
        raise BadFileError(
            f"the file is larger than {FILE_BYTES_MAX // 1024**2} MiB: divide it by order number"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFileError(f"the file is not UTF-8 (at byte {error.start}): save it as CSV in UTF-8") from None
    is_json = text.lstrip().startswith("{")
    errors: list[str] = []
    by_order: dict[str, list[Report]] = {}
    rows = blank = 0
    for number, line in _read_json(text) if is_json else _read_csv(text):
        if rows >= ROWS_MAX:
            raise BadFileError(f"the file has more than {ROWS_MAX:,} rows: divide it by order number")
        try:
            report = _to_report(line, now)
        except ValueError as error:
            errors.append(f"line {number}: {error}")
            continue
        if report is None:
            blank += 1
        else:
            rows += 1
            by_order.setdefault(report.order_no, []).append(report)
    if errors:
        more = len(errors) - ERRORS_LISTED_MAX
        raise BadFileError(
            "\n".join([*errors[:ERRORS_LISTED_MAX], *([f"and {more} more"] if more > 0 else [])])
        )
    if not rows and not blank:
        raise BadFileError("the file has no rows")
    for reports in by_order.values():
        # Stable: rows of the same time keep their order.
        reports.sort(key=lambda report: report.arrival.received_at)
    return ReportsFile(by_order, rows, blank)


def _read_csv(text: str) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yield the number and the JSON of each row, or why it has none."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        heading = [name.strip() for name in next(rows, [])]
        if missing := [name for name in COLUMNS if name not in heading]:
            raise BadFileError(
                f"line 1: the heading lacks {', '.join(missing)}: expected the columns {', '.join(COLUMNS)}"
            )
        if len({*heading}) < len(heading):
            raise BadFileError("line 1: a column occurs twice in the heading")
        for row in rows:
            if not row:
                continue
            if len(row) == len(heading):
                values = dict(zip(heading, map(unescape_formula, row), strict=True))
                yield rows.line_num, orjson.dumps(values)
            else:
                detail = f"it has {len(row)} cells, but the heading has {len(heading)}"
                yield rows.line_num, ValueError(detail)
    except csv.Error as error:
        raise BadFileError(f"line {rows.line_num}: it is not CSV: {error}") from None


def _read_json(text: str) -> Iterator[tuple[int, bytes]]:
    # Not splitlines, which also divides at characters that JSON texts may have.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip().encode()


def _to_report(line: bytes | ValueError, now: datetime) -> Report | None:
    """Return the report of a line of JSON, None if its status and time are blank.

    Raises:
        ValueError: the line is invalid. ``str()`` is the reason.
    """
    if isinstance(line, ValueError):
        raise line
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}") from None
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - of the file, not of an argument
    try:
        refuse_duplicates(line, line.decode(), {"at": b'"at"'})
    except UnreadableError as error:
        raise ValueError(str(error)) from None
    status, at = row.get("status"), row.get("at")
    if not str(status or "").strip() and not str(at or "").strip():
        return None
    arrival = Arrival(str(uuid4()), _parse_at(at, now), imported_at=now)
    try:
        return parse(line, arrival)
    except UnreadableError as error:
        raise ValueError(str(error)) from None


def _parse_at(value: object, now: datetime) -> datetime:
    expected = "expected an RFC 3339 time with an offset, such as 2026-01-31T15:30:00+07:00"
    try:
        at = datetime.fromisoformat(value if isinstance(value, str) and value.isprintable() else "")
    except ValueError:
        raise ValueError(f"at is {value!r}: {expected}") from None
    if at.tzinfo is None:
        raise ValueError(f"at is {value!r}, without an offset: {expected}")
    if at > now + AHEAD_MAX:
        raise ValueError(f"at is {value!r}, which is in the future")
    if at.year < YEAR_MIN:
        raise ValueError(f"at is {value!r}, which is before the year {YEAR_MIN}")
    return at.astimezone(UTC)


class _NothingToRecordError(Exception):
    """No report of a batch has to be recorded."""


class _Batch:
    """The reports of some orders: a claim for the recorder.

    Args:
        orders: each order's reports, oldest first.
    """

    def __init__(self, orders: Mapping[str, Sequence[Report]]) -> None:
        self._orders = orders
        self.result = Imported()

    async def find(self, connection: Connection, _report: Report) -> ClaimedEvent | Sequence[Report]:
        """Return the reports that are to be recorded after those that their orders have already."""
        self.result = Imported()
        existing = {order_no for (order_no,) in await connection.fetch(EXISTING, [*self._orders])}
        reports: list[Report] = []
        for order_no, mine in self._orders.items():
            reports += await self._choose(connection, order_no, mine) if order_no in existing else mine
        self.result = self.result.plus(Imported(recorded=len(reports)))
        if not reports:
            raise _NothingToRecordError
        return reports

    async def keep(self, connection: Connection, report: Report, event: Order.StatusReported) -> None:
        """Do nothing: the events themselves show that they were imported."""

    async def _choose(
        self, connection: Connection, order_no: str, reports: Sequence[Report]
    ) -> Sequence[Report]:
        last = datetime.min.replace(tzinfo=UTC)
        imported: set[tuple[str, datetime]] = set()
        version = 0
        while batch := await store.read_stream(connection, order_no, version, EVENTS_BATCH_MAX):
            for recorded in batch:
                event = decode_event(order_no, recorded.version, recorded.topic, recorded.state)
                last = max(last, event.timestamp)
                if event.imported_at is not None:
                    imported.add((event.reported_status, event.timestamp))
            version = batch[-1].version
        chosen = []
        for report in reports:
            if (report.reported_status, report.arrival.received_at) in imported:
                self.result = self.result.plus(Imported(present=1))
            elif report.arrival.received_at <= last:
                self.result = self.result.plus(Imported(overtaken=1, overtaken_orders=(order_no,)))
            else:
                chosen.append(report)
        return chosen


async def import_reports(recorder: Recorder, file: ReportsFile, on_batch: Callable[[int], object]) -> Imported:
    """Record the reports of a file, order by order, each order all or none.

    Args:
        recorder: records the reports.
        file: the reports.
        on_batch: called with the number of rows of each batch, after the batch.

    Raises:
        OverloadedError, StorageUnavailableError: see ``Recorder.record``. Import the same file again.
    """
    total = Imported()
    for batch in _batches(file.orders.items()):
        total = total.plus(await _import_batch(recorder, dict(batch)))
        on_batch(sum(len(reports) for _, reports in batch))
    return total


async def _import_batch(recorder: Recorder, orders: Mapping[str, Sequence[Report]]) -> Imported:
    batch = _Batch(orders)
    first = next(iter(orders.values()))[0]
    try:
        await recorder.record(first, batch)
    except _NothingToRecordError:
        pass
    except UnrecordableReportError:
        if len(orders) == 1:
            return Imported(failed=sum(map(len, orders.values())))
        total = Imported()
        for order_no, reports in orders.items():
            total = total.plus(await _import_batch(recorder, {order_no: reports}))
        return total
    return batch.result


def _batches(
    orders: Iterable[tuple[str, Sequence[Report]]],
) -> Iterator[list[tuple[str, Sequence[Report]]]]:
    batch: list[tuple[str, Sequence[Report]]] = []
    rows = 0
    for order in orders:
        batch.append(order)
        rows += len(order[1])
        if rows >= BATCH_ROWS:
            yield batch
            batch, rows = [], 0
    if batch:
        yield batch
