"""Bodies that could not be understood, kept byte for byte until somebody deals with them."""

from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, Literal, NamedTuple, TypeAlias
from uuid import uuid4

import structlog

from domain.order import Order, Report
from service.batcher import OverloadedError
from service.database.connections import Connection, HeldConnection
from service.event_log.store import Claim, Seen, decode_event
from service.ingest.parser import parse

QuarantineState: TypeAlias = Literal["open", "retried", "discarded"]

# Within which the bodies that are kept are counted.
CAP_PERIOD: Final = timedelta(hours=1)
# Bodies that were turned away make one log line in this time.
LOG_SECONDS: Final = 60.0
WHY_CHARACTERS_MAX: Final = 500

# Equal bodies share an entry: a sender that repeats itself costs a count, and no room.
KEEP_BODY: Final = """
    WITH known AS (
        UPDATE quarantine
        SET times_seen = times_seen + 1, last_seen_at = greatest(last_seen_at, $4)
        WHERE body_sha256 = sha256($1)
        RETURNING quarantine_id
    ), added AS (
        INSERT INTO quarantine (body, reason, remote, received_at, last_seen_at)
        SELECT $1, $2, $3, $4, $4
        WHERE NOT EXISTS (SELECT FROM known)
          AND (SELECT count(*) FROM (SELECT FROM quarantine WHERE received_at > $5 LIMIT $6) AS kept) < $6
        ON CONFLICT (body_sha256) DO UPDATE SET times_seen = quarantine.times_seen + 1
        RETURNING quarantine_id
    )
    SELECT quarantine_id FROM known UNION ALL SELECT quarantine_id FROM added
"""

ENTRIES_PAGE: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at, remote, resolved_at, resolution,
           order_no, version
    FROM quarantine
    WHERE quarantine_id < $1 AND ($2::text IS NULL OR state = $2)
    ORDER BY quarantine_id DESC LIMIT $3
"""

ENTRY: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at, remote, resolved_at, resolution,
           order_no, version, body
    FROM quarantine WHERE quarantine_id = $1
"""

OPEN_ENTRIES: Final = "SELECT quarantine_id FROM quarantine WHERE state = 'open' ORDER BY quarantine_id"

# Two who retry one entry take turns.
FIND_RETRIED: Final = """
    SELECT entry.state, entry.resolution, entry.order_no, entry.version,
           made.notification_id, made.topic, made.state
    FROM quarantine AS entry
    LEFT JOIN order_events AS made
      ON made.originator_id = entry.order_no AND made.originator_version = entry.version
    WHERE entry.quarantine_id = $1
    FOR UPDATE OF entry
"""

MARK_RETRIED: Final = """
    UPDATE quarantine SET state = 'retried', resolved_at = $2, order_no = $3, version = $4
    WHERE quarantine_id = $1
"""

COUNT_ENTRIES: Final = "SELECT state, count(*) FROM quarantine GROUP BY state"

DISCARD: Final = """
    UPDATE quarantine SET state = 'discarded', resolved_at = $2, resolution = $3
    WHERE quarantine_id = $1 AND state = 'open'
"""

log = structlog.get_logger()


class QuarantineEntry(NamedTuple):
    """A body that could not be understood: when it came and how often, why it is here, what became of it."""

    quarantine_id: int
    received_at: datetime
    reason: str
    state: QuarantineState
    times_seen: int
    last_seen_at: datetime
    remote: str | None
    resolved_at: datetime | None
    resolution: str | None
    order_no: str | None
    version: int | None
    body: bytes | None = None


class UnknownEntryError(Exception):
    """There is no entry of this id. ``str()`` says so."""


class NotOpenError(Exception):
    """The entry has been dealt with already. ``str()`` says how."""


async def entries_page(
    connection: Connection, before: int, state: QuarantineState | None, limit: int
) -> list[QuarantineEntry]:
    """Return entries with ids below ``before``, newest first, without their bodies."""
    return [QuarantineEntry(*row) for row in await connection.fetch(ENTRIES_PAGE, before, state, limit)]


async def find_entry(connection: Connection, quarantine_id: int) -> QuarantineEntry:
    """Return one entry with its body.

    Raises:
        UnknownEntryError: there is none of this id.
    """
    row = await connection.fetchrow(ENTRY, quarantine_id)
    if row is None:
        raise UnknownEntryError(f"the quarantine has no entry {quarantine_id}")
    return QuarantineEntry(*row)


async def open_entries(connection: Connection) -> list[int]:
    """Return the ids of what nobody has dealt with yet, the oldest first."""
    return [quarantine_id for (quarantine_id,) in await connection.fetch(OPEN_ENTRIES)]


async def count_entries(connection: Connection) -> dict[str, int]:
    """Return how many entries have each state."""
    return dict([tuple(row) for row in await connection.fetch(COUNT_ENTRIES)])


async def discard(connection: Connection, quarantine_id: int, why: str) -> None:
    """Say of an entry that nothing will come of it. It stays, with the reason.

    Raises:
        UnknownEntryError: there is none of this id.
        NotOpenError: it has been dealt with already.
        ValueError: the reason is empty or longer than WHY_CHARACTERS_MAX.
    """
    if not why.strip() or len(why) > WHY_CHARACTERS_MAX or not why.isprintable():
        raise ValueError(f"the reason must have 1 to {WHY_CHARACTERS_MAX} printable characters")
    if await connection.execute(DISCARD, quarantine_id, datetime.now(UTC), why) == "UPDATE 0":
        entry = await find_entry(connection, quarantine_id)
        raise NotOpenError(f"entry {quarantine_id} is {entry.state} already")


def report_of(entry: QuarantineEntry) -> Report:
    """Return the report that a body is found to be, now that more is understood.

    The recorder records it once only: a second retry gets the first receipt.

    Raises:
        UnreadableError: it still cannot be understood.
        NotOpenError: it was discarded.
    """
    if entry.state == "discarded":
        raise NotOpenError(f"entry {entry.quarantine_id} was discarded: {entry.resolution}")
    if entry.state == "retried":
        # Its claim knows what it became. Its body is not asked: that may have been erased.
        return Report(str(uuid4()), entry.order_no or "", "", None, "", quarantine_id=entry.quarantine_id)
    report = parse(entry.body or b"", str(uuid4()), entry.remote)
    return report._replace(quarantine_id=entry.quarantine_id)


async def _find(connection: Connection, report: Report) -> Seen | None:
    row = await connection.fetchrow(FIND_RETRIED, report.quarantine_id)
    if row is None:
        raise UnknownEntryError(f"the quarantine has no entry {report.quarantine_id}")
    state, resolution, order_no, version, position, topic, event_state = row
    if state == "discarded":
        raise NotOpenError(f"entry {report.quarantine_id} was discarded: {resolution}")
    if state == "open":
        return None
    return Seen(decode_event(order_no, version, topic, event_state), position, same_body=True)


async def _keep(connection: Connection, report: Report, event: Order.StatusReported) -> None:
    made = (event.originator_id, event.originator_version)
    await connection.execute(MARK_RETRIED, report.quarantine_id, datetime.now(UTC), *made)


CLAIM: Final = Claim(_find, _keep)


class Quarantine:
    """Keeps what cannot be understood.

    Args:
        held: a connection for this alone, so that it waits for no reader.
        seconds_max: how long keeping one body may take.
        hourly_max: how many bodies it takes within an hour, so that a flood cannot fill the disk.
    """

    def __init__(self, held: HeldConnection, seconds_max: float, hourly_max: int) -> None:
        self._held = held
        self._seconds_max = seconds_max
        self._hourly_max = hourly_max
        self.kept = 0
        self.last_kept = 0.0
        self.turned_away = 0
        self._log_from = 0.0

    async def keep(self, body: bytes, reason: str, remote: str | None, received_at: datetime) -> int:
        """Keep a body and return the id of its entry; committed when this returns.

        Raises:
            OverloadedError: too many came within the hour; nothing was kept.
            StorageUnavailableError: the database did not confirm it in time.
        """
        since = received_at - CAP_PERIOD
        async with self._held.lent(self._seconds_max) as connection:
            quarantine_id: int | None = await connection.fetchval(
                KEEP_BODY, body, reason, remote, received_at, since, self._hourly_max
            )
        if quarantine_id is None:
            self._turn_away()
            raise OverloadedError("too much that cannot be understood has come within the hour")
        self.kept += 1
        self.last_kept = received_at.timestamp()
        return quarantine_id

    def _turn_away(self) -> None:
        self.turned_away += 1
        if monotonic() >= self._log_from:
            self._log_from = monotonic() + LOG_SECONDS
            log.warning("the quarantine takes no more within the hour", turned_away=self.turned_away)
