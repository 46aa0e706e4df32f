"""The quarantine: unparseable bodies, kept byte for byte until an operator retries or discards them."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast
from uuid import uuid4

import asyncpg
import structlog
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.order import Arrival, Order, Report
from projections.postgres import Connection
from service.database.connections import DedicatedConnection, StorageUnavailableError
from service.database.operations import Actor, check_reason, record_operation
from service.database.sequences import require_rising_numbers
from service.errors import OperatorError
from service.event_log.codec import decode_event
from service.event_log.store import UNREPLICATED, UnreplicatedCommitError
from service.ingest.parser import parse
from service.ingest.recorder import ClaimedEvent, Receipt, Recorder
from service.ingest.refusals import QuarantineFullError

QuarantineState: TypeAlias = Literal["open", "retried", "discarded"]

# The period for which the maximum number of new bodies applies.
CAP_PERIOD: Final = timedelta(hours=1)
# A refused body is logged at most once in this interval.
LOG_SECONDS: Final = 60.0

# A retry records as many events in one transaction.
SHARED_MAX: Final = 1_000

# Equal bodies share an open entry, so that a sender that repeats itself takes little space. The schema's index
# quarantine_shared_idx has the same condition.
KEEP_BODY: Final = f"""
    WITH seen AS (
        UPDATE quarantine
        SET times_seen = times_seen + 1, last_seen_at = greatest(last_seen_at, $4)
        WHERE body_sha256 = sha256($1) AND state = 'open' AND times_seen < {SHARED_MAX}
        RETURNING quarantine_id
    ), added AS (
        INSERT INTO quarantine (body, reason, remote, received_at, last_seen_at, named_order_no)
        SELECT $1, $2, $3, $4, $4, $7
        WHERE NOT EXISTS (SELECT FROM seen)
          AND (SELECT count(*) FROM (SELECT FROM quarantine WHERE received_at > $5 LIMIT $6) AS recent) < $6
        ON CONFLICT (body_sha256) WHERE state = 'open' AND times_seen < {SHARED_MAX}
        DO UPDATE SET times_seen = quarantine.times_seen + 1
        RETURNING quarantine_id
    )
    SELECT quarantine_id FROM seen UNION ALL SELECT quarantine_id FROM added
"""  # noqa: S608 - our own number

# Entries below an id, newest first.
ENTRIES_PAGE: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at, remote, resolved_at,
        discard_reason, order_no, version
    FROM quarantine
    WHERE quarantine_id < $1 AND ($2::text IS NULL OR state = $2)
    ORDER BY quarantine_id DESC LIMIT $3
"""

# One entry, with its body.
ENTRY: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at, remote, resolved_at,
        discard_reason, order_no, version, body
    FROM quarantine WHERE quarantine_id = $1
"""

OPEN_ENTRIES: Final = "SELECT quarantine_id FROM quarantine WHERE state = 'open' ORDER BY quarantine_id"

# The first event that a retry of this entry recorded. FOR UPDATE makes two retries of one entry take turns.
FIND_RETRIED: Final = """
    SELECT entry.state, entry.discard_reason, entry.times_seen, entry.order_no, entry.version,
        recorded.notification_id, recorded.topic, recorded.state
    FROM quarantine AS entry
    LEFT JOIN order_events AS recorded
      ON recorded.originator_id = entry.order_no AND recorded.originator_version = entry.version
    WHERE entry.quarantine_id = $1
    FOR UPDATE OF entry
"""

MARK_RETRIED: Final = """
    UPDATE quarantine SET state = 'retried', resolved_at = $2, order_no = $3, version = $4
    WHERE quarantine_id = $1
"""

COUNT_ENTRIES: Final = "SELECT state, count(*) FROM quarantine GROUP BY state"

DISCARD: Final = """
    UPDATE quarantine SET state = 'discarded', resolved_at = $2, discard_reason = $3
    WHERE quarantine_id = $1 AND state = 'open'
"""

logger = structlog.get_logger()


class QuarantinedBody(TypedDict):
    """A quarantined body, without its bytes.

    ``reason`` is why it is unparseable; ``order_no`` and ``version`` identify the event that a retry recorded.
    """

    quarantine_id: int
    received_at: datetime
    reason: str
    state: QuarantineState
    times_seen: int
    last_seen_at: datetime
    remote: str | None
    resolved_at: datetime | None
    discard_reason: str | None
    order_no: str | None
    version: int | None


class UnknownEntryError(OperatorError):
    """The quarantine has no entry with this id. ``str()`` names it."""


class NotOpenError(OperatorError):
    """The entry has already been retried or discarded. ``str()`` names the entry and which of the two."""


async def entries_page(
    connection: Connection, before: int, state: QuarantineState | None, limit: int
) -> list[QuarantinedBody]:
    """Return entries with ids below ``before``, newest first."""
    rows = await connection.fetch(ENTRIES_PAGE, before, state, limit)
    return [cast("QuarantinedBody", dict(row)) for row in rows]


async def find_entry(connection: Connection, quarantine_id: int) -> tuple[QuarantinedBody, bytes | None]:
    """Return one entry and its body, which is None after an erasure.

    Raises:
        UnknownEntryError: there is no entry with this id.
    """
    row = await connection.fetchrow(ENTRY, quarantine_id)
    if row is None:
        raise UnknownEntryError(f"the quarantine has no entry {quarantine_id}")
    entry: dict[str, Any] = dict(row)
    body: bytes | None = entry.pop("body")
    return cast("QuarantinedBody", entry), body


async def open_entries(connection: Connection) -> list[int]:
    """Return the ids of the open entries, oldest first."""
    return [quarantine_id for (quarantine_id,) in await connection.fetch(OPEN_ENTRIES)]


async def count_entries(connection: Connection) -> dict[str, int]:
    """Return the number of entries by state."""
    return dict([tuple(row) for row in await connection.fetch(COUNT_ENTRIES)])


async def discard(connection: Connection, quarantine_id: int, reason: str, actor: Actor) -> None:
    """Discard an open entry. It stays in the quarantine, with the reason.

    Args:
        connection: a connection that is not in a transaction.
        quarantine_id: the entry.
        reason: why it is discarded.
        actor: who discards it.

    Raises:
        UnknownEntryError: there is no entry with this id.
        NotOpenError: the entry has already been retried or discarded.
        ValueError: the reason is empty, not printable, or longer than REASON_CHARACTERS_MAX.
    """
    check_reason(reason)
    async with connection.transaction():
        if await connection.execute(DISCARD, quarantine_id, datetime.now(UTC), reason) == "UPDATE 0":
            entry, _ = await find_entry(connection, quarantine_id)
            raise NotOpenError(f"entry {quarantine_id} has already been {entry['state']}")
        await record_operation(connection, actor, "entry_discarded", str(quarantine_id), reason)


class _Retry(NamedTuple):
    """The retry of an entry: a claim for the recorder."""

    quarantine_id: int
    actor: Actor

    async def find(self, connection: Connection, report: Report) -> ClaimedEvent | Sequence[Report]:
        """Return the first event that an earlier retry recorded, or a report for each acknowledged body."""
        row = await connection.fetchrow(FIND_RETRIED, self.quarantine_id)
        if row is None:
            raise UnknownEntryError(f"the quarantine has no entry {self.quarantine_id}")
        state, discard_reason, times_seen, order_no, version, position, topic, event_state = row
        if state == "discarded":
            raise NotOpenError(f"entry {self.quarantine_id} was discarded: {discard_reason}")
        if state == "open":
            arrivals = (report.arrival._replace(report_id=str(uuid4())) for _ in range(times_seen))
            return [report._replace(arrival=arrival) for arrival in arrivals]
        return ClaimedEvent(decode_event(order_no, version, topic, event_state), position, same_body=True)

    async def keep(self, connection: Connection, _report: Report, event: Order.StatusReported) -> None:
        """Mark the entry as retried, in the transaction that appends its events."""
        place = (event.originator_id, event.originator_version)
        await connection.execute(MARK_RETRIED, self.quarantine_id, datetime.now(UTC), *place)
        await record_operation(connection, self.actor, "entry_retried", str(self.quarantine_id))


async def retry(recorder: Recorder, entry: QuarantinedBody, body: bytes | None, actor: Actor) -> Receipt:
    """Record a quarantined body as a report that arrived now, as often as it was acknowledged.

    Args:
        recorder: records the reports.
        entry: the entry.
        body: its body; None after an erasure.
        actor: who retries it.

    Returns:
        The receipt of the first event. A second retry gets it again and records nothing.

    Raises:
        UnreadableError: the body is still unparseable.
        NotOpenError: the entry was discarded.
        UnknownEntryError: the entry was deleted.
        UnrecordableReportError: the report cannot be recorded.
        OverloadedError, StorageUnavailableError: see ``Recorder.record``.
    """
    quarantine_id = entry["quarantine_id"]
    if entry["state"] == "discarded":
        raise NotOpenError(f"entry {quarantine_id} was discarded: {entry['discard_reason']}")
    arrival = Arrival(str(uuid4()), datetime.now(UTC), entry["remote"])
    if entry["state"] == "retried":
        # The claim finds the recorded event. The body is not needed, and may have been erased.
        report = Report(arrival, entry["order_no"] or "", "", None, "")
    else:
        report = parse(body or b"", arrival)
    return await recorder.record(report._replace(quarantine_id=quarantine_id), _Retry(quarantine_id, actor))


class Quarantine:
    """Keeps unparseable bodies.

    Args:
        dedicated: a dedicated connection with a time limit, so that slow reads do not delay the quarantine.
        hourly_max: the maximum number of new bodies within an hour, so that a flood cannot fill the disk.
    """

    def __init__(self, dedicated: DedicatedConnection, hourly_max: int) -> None:
        self._dedicated = dedicated
        self._hourly_max = hourly_max
        self.kept = 0
        self.last_kept = 0.0
        self.refused = 0
        self._next_log_at = 0.0

    async def keep(self, body: bytes, reason: str, arrival: Arrival, order_no: str | None = None) -> int:
        """Keep a body, and return the id of its committed entry.

        Args:
            body: the body.
            reason: why it is unparseable.
            arrival: when and from where it arrived.
            order_no: the order that it names, if that could be read.

        Raises:
            QuarantineFullError: too many bodies arrived within the hour; this one was not kept.
            StorageUnavailableError: the database did not confirm it in time.
        UnsupportedServerError: the sequence of the entries is behind their table.
        """
        since = arrival.received_at - CAP_PERIOD
        values = (body, reason, arrival.remote, arrival.received_at, since, self._hourly_max, order_no)
        async with self._dedicated.connection() as connection:
            warnings = self._dedicated.warnings
            try:
                quarantine_id: int | None = await connection.fetchval(KEEP_BODY, *values)
            except asyncpg.UniqueViolationError as error:
                await require_rising_numbers(connection)
                # The number that was taken was the last one.
                raise StorageUnavailableError(str(error)) from error
        if self._dedicated.warnings != warnings:
            raise StorageUnavailableError(UNREPLICATED) from UnreplicatedCommitError(UNREPLICATED)
        if quarantine_id is None:
            self._refuse()
            raise QuarantineFullError("the quarantine is full: too many unparseable bodies within an hour")
        self.kept += 1
        self.last_kept = arrival.received_at.timestamp()
        return quarantine_id

    def _refuse(self) -> None:
        self.refused += 1
        if monotonic() >= self._next_log_at:
            self._next_log_at = monotonic() + LOG_SECONDS
            logger.warning("the quarantine is full for this hour", refused=self.refused)
