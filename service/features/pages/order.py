"""The page of one order: its current state, or its state at an earlier version."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from domain.order import NEW_ORDER, evolve
from domain.statuses import HAPPY_PATH, SETTLED
from projections import current_status, timeline
from projections.current_status import CurrentOrder
from projections.postgres import Connection
from projections.timeline import PlacedEntry
from service.event_log import store
from service.event_log.codec import decode_event
from service.event_log.contradictions import handled_versions
from service.http.problems import ProblemError, ProblemType, order_parked

# The page shows the newest entries, and links to the earlier ones.
ENTRIES_SHOWN_MAX: Final = 50


class Snapshot(NamedTuple):
    """An order's state at one of its versions."""

    version: int
    status: str | None
    status_since: datetime | None
    cnote: str | None
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
    """The data of an order's page.

    ``before`` is the version below which earlier entries remain, else None; ``counts`` is reports by verdict;
    ``handled`` is when, by whom and with which note conflicting reports were handled, by version.
    """

    order: CurrentOrder
    snapshot: Snapshot
    entries: Sequence[PlacedEntry]
    before: int | None
    counts: Mapping[str, int]
    handled: Mapping[int, tuple[datetime, str | None, str]]
    stages: Sequence[Stage]


async def read_history(
    connection: Connection, order_no: str, version: int | None, before: int | None
) -> History:
    """Read an order's state and timeline.

    Args:
        connection: A connection outside any transaction.
        order_no: The order number.
        version: The version to show the order at; None for the current one.
        before: Only entries below this version are read; None for the newest ones.

    Raises:
        ProblemError: 404, the order or version is unknown; 503, the order is parked from its first event on.
    """
    # One snapshot of the database, so that the head of the page and the timeline agree.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        ((order, parked_position),) = await current_status.find_orders(connection, [order_no])
        if order is None and parked_position is not None:
            raise order_parked(f"{order_no} is parked from its first event on; see GET /projections")
        if order is None:
            raise ProblemError(ProblemType.UNKNOWN_ORDER, f"{order_no} has no report")
        snapshot = await _read_snapshot(connection, order, version)
        below = snapshot.version + 1 if before is None else min(before, snapshot.version + 1)
        # One entry more than the page shows, to find out if there are earlier ones.
        entries = await timeline.newest_entries(
            connection, order_no, below, snapshot.version, ENTRIES_SHOWN_MAX + 1
        )
        totals = await timeline.reached_statuses(connection, order_no, snapshot.version)
        handled = await handled_versions(connection, order_no)
    counts: Counter[str] = Counter()
    for total in totals:
        counts[total.verdict] += total.times
    reached_at: dict[str, datetime] = {total.status: total.first_at for total in totals if total.status}
    page = entries[-ENTRIES_SHOWN_MAX:]
    earlier = page[0]["version"] if len(entries) > len(page) else None
    return History(order, snapshot, page, earlier, counts, handled, build_stages(snapshot.status, reached_at))


async def _read_snapshot(connection: Connection, order: CurrentOrder, version: int | None) -> Snapshot:
    order_no, head = order["order_no"], order["version"]
    if version is None or version == head:
        return Snapshot(head, order["status"], order["status_since"], order["cnote"], order["last_reported_at"])
    # Each event carries the order's state after it. A version above the order's is not in the view yet.
    events = await store.read_stream(connection, order_no, version - 1, 1)
    if not events or version > head:
        raise ProblemError(ProblemType.NO_SUCH_VERSION, f"{order_no} has no version {version}")
    state = evolve(NEW_ORDER, decode_event(order_no, version, events[0].topic, events[0].state))
    return Snapshot(version, state.status, state.status_since, state.cnote, state.received_at)


def build_stages(status: str | None, reached_at: Mapping[str, datetime]) -> list[Stage]:
    """Return the stages of a journey: the happy path, and other statuses where they happened.

    A stage that was never reported is skipped if a later stage was reached, and ahead otherwise.

    Args:
        status: The order's status.
        reached_at: When the order first reached each status.
    """
    furthest = max((HAPPY_PATH.index(stage) for stage in HAPPY_PATH if stage in reached_at), default=-1)
    stages: list[Stage] = []
    for index, stage in enumerate(HAPPY_PATH):
        if stage == status:
            state = "now"
        elif stage in reached_at:
            state = "reached"
        else:
            state = "skipped" if index < furthest else "ahead"
        stages.append(Stage(stage, state, reached_at.get(stage)))
    for at, detour in sorted((at, name) for name, at in reached_at.items() if name not in HAPPY_PATH):
        earlier = [index for index, stage in enumerate(stages) if stage.reached_at and stage.reached_at <= at]
        stages.insert(max(earlier, default=-1) + 1, Stage(detour, "now" if detour == status else "reached", at))
    if status in SETTLED and status not in HAPPY_PATH:
        # A cancelled or lost order does not reach the rest of the happy path.
        stages = [stage for stage in stages if stage.state != "ahead"]
    return stages
