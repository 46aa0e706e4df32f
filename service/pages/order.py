"""One order as its page shows it: now, or as it was known at an earlier version."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from domain.statuses import HAPPY_PATH, SETTLED
from projections import current_status, timeline
from projections.current_status import OrderRow
from projections.timeline import PlacedEntry
from service.database.connections import Connection
from service.event_log import store as event_store

# Entries of a timeline on one page; the newest come first, and the way to the earlier ones is a link.
ENTRIES_SHOWN_MAX: Final = 50


class Known(NamedTuple):
    """An order's state at one of its versions."""

    version: int
    status: str | None
    status_since: datetime | None
    cnote: str | None
    first_reported_at: datetime
    last_reported_at: datetime

    @property
    def settled(self) -> bool:
        return self.status in SETTLED


class Stage(NamedTuple):
    """A stage of the journey: ``state`` is reached, now, skipped or ahead."""

    status: str
    state: str
    reached_at: datetime | None


class History(NamedTuple):
    """All that the page of an order shows. ``before`` is the version to go on from to earlier entries."""

    row: OrderRow
    known: Known
    entries: Sequence[PlacedEntry]
    before: int | None
    counts: dict[str, int]
    stages: Sequence[Stage]


class NotKnownThenError(Exception):
    """The order has no such version."""


async def history(
    connection: Connection, order_no: str, version: int | None, before: int | None
) -> History | None:
    """Return an order as it was known at a version, or now; None where nothing was reported of it.

    Args:
        connection: in no transaction.
        order_no: its number.
        version: as it was known then; None: as it is known now.
        before: entries below this version are shown; None: the newest.

    Raises:
        NotKnownThenError: the order has no such version.
    """
    # In one snapshot, so that what is said above the timeline is what stands in it.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        row = (await current_status.orders_by_number(connection, [order_no])).get(order_no)
        if row is None:
            return None
        known = await _known(connection, row, version)
        upto = known.version + 1 if before is None else min(before, known.version + 1)
        found = await timeline.newest_entries(connection, order_no, upto, known.version, ENTRIES_SHOWN_MAX + 1)
        counted = await timeline.reached(connection, order_no, known.version)
    entries = found[-ENTRIES_SHOWN_MAX:]
    counts: dict[str, int] = {}
    reached: dict[str, datetime] = {}
    for verdict, status, times, first_at in counted:
        counts[verdict] = counts.get(verdict, 0) + times
        if status is not None:
            reached[status] = first_at
    onward = entries[0].version if len(found) > len(entries) else None
    return History(row, known, entries, onward, counts, stages(known.status, reached))


async def _known(connection: Connection, row: OrderRow, version: int | None) -> Known:
    now = Known(
        row.version, row.status, row.status_since, row.cnote, row.first_reported_at, row.last_reported_at
    )
    if version is None or version == row.version:
        return now
    # An event tells by itself how its order stood after it.
    for event in await event_store.read_stream(connection, row.order_no, version - 1, 1):
        if version < row.version:
            then = event_store.decode_event(row.order_no, version, event.topic, event.state)
            return now._replace(
                version=version,
                status=then.status,
                status_since=then.status_since,
                cnote=then.cnote,
                last_reported_at=then.timestamp,
            )
    raise NotKnownThenError(f"{row.order_no} has no version {version}")


def stages(status: str | None, reached: dict[str, datetime]) -> list[Stage]:
    """Return the journey's stages: the happy path, and what the order came to beside it, where it did so.

    A stage that no report has shown counts as skipped once the order is past it, and as ahead before that.
    """
    furthest = max((HAPPY_PATH.index(stage) for stage in HAPPY_PATH if stage in reached), default=-1)
    shown: list[Stage] = []
    for index, stage in enumerate(HAPPY_PATH):
        state = "now" if stage == status else "reached" if stage in reached else "ahead"
        if state == "ahead" and index < furthest:
            state = "skipped"
        shown.append(Stage(stage, state, reached.get(stage)))
    for at, beside in sorted((at, one) for one, at in reached.items() if one not in HAPPY_PATH):
        earlier = [index for index, one in enumerate(shown) if one.reached_at and one.reached_at <= at]
        state = "now" if beside == status else "reached"
        shown.insert(max(earlier, default=-1) + 1, Stage(beside, state, at))
    if status in SETTLED and status not in HAPPY_PATH:
        # It ended otherwise: what was ahead of it is so no more.
        shown = [one for one in shown if one.state != "ahead"]
    return shown
