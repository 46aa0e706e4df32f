"""Rejudgement: unrecognised reports whose word has become known are judged again, as of now, by new events.

History is never rewritten: the old event stays, and the new one names its version. The new event has no body
and is not a report, so counts of reports exclude it.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import uuid4

from domain.logged import FailedEvent
from domain.order import NEW_ORDER, Arrival, EarlierReport, Order, OrderState, Report, decide, evolve
from domain.statuses import Recognise, Status
from domain.transitions import Verdict
from projections.postgres import Connection
from service.event_log import store
from service.event_log.codec import UndecodableEventError, decode_event
from service.event_log.follow import Log
from service.event_log.snapshot import Snapshot
from service.event_log.store import RecordedEvent
from service.ingest.recorder import ClaimedEvent, Receipt, Recorder
from service.maintenance.audit import BATCH_EVENTS_MAX


class PendingReport(NamedTuple):
    """An unrecognised report whose word is known by now, and that was not judged again yet.

    Attributes:
        order_no: the order.
        version: the report's version.
        reported_status: its word.
        received_at: when it arrived.
        occurred_at: the sender's time, None if it sent none.
        verdict: the verdict that a rejudgement would give now.
        status: the order's status after it.
    """

    order_no: str
    version: int
    reported_status: str
    received_at: datetime
    occurred_at: datetime | None
    verdict: Verdict
    status: Status | None

    def to_report(self, now: datetime) -> Report:
        """Return the report of the rejudgement: it has no body, and no airway bill, which may be outdated."""
        return Report(
            Arrival(str(uuid4()), now),
            self.order_no,
            self.reported_status,
            None,
            "",
            occurred_at=self.occurred_at,
            rejudges=EarlierReport(self.version, self.received_at),
        )


class PendingReports:
    """Finds the pending reports of one order after the other.

    Args:
        recognise: the present vocabulary.

    Attributes:
        undecodable: the number of orders with events that this release cannot read. They are left out.
    """

    def __init__(self, recognise: Recognise) -> None:
        self._recognise = recognise
        self.undecodable = 0
        self._pending: dict[int, Order.StatusReported] = {}
        self._state: OrderState = NEW_ORDER
        self._order_no: str | None = None
        self._is_decodable = True

    def add(self, event: Order.StatusReported | FailedEvent) -> list[PendingReport]:
        """Add the next event by order and version; return the pending reports of the order before."""
        found = []
        if event.originator_id != self._order_no:
            found = self.end_order()
            self._order_no = event.originator_id
        if isinstance(event, FailedEvent):
            self.undecodable += self._is_decodable
            self._is_decodable = False
            return found
        self._state = evolve(self._state, event)
        if event.rejudges is not None:
            self._pending.pop(event.rejudges, None)
        elif event.verdict == "unrecognised" and self._recognise(event.reported_status) is not None:
            self._pending[event.originator_version] = event
        return found

    def end_order(self) -> list[PendingReport]:
        """Return the pending reports of the last order."""
        found = []
        state = self._state
        now = datetime.now(UTC)
        for version, event in self._pending.items() if self._is_decodable else ():
            place, word = (event.originator_id, version), event.reported_status
            pending = PendingReport(*place, word, event.timestamp, event.occurred_at, event.verdict, None)
            judged = decide(state, pending.to_report(now), self._recognise)
            state = evolve(state, judged)
            found.append(pending._replace(verdict=judged.verdict, status=judged.status))
        self._pending, self._state, self._is_decodable = {}, NEW_ORDER, True
        return found


async def find_pending(
    batches: AsyncIterator[Sequence[Order.StatusReported | FailedEvent]], pending: PendingReports
) -> AsyncIterator[PendingReport]:
    """Yield the pending reports in batches of events by order and version."""
    async for batch in batches:
        for event in batch:
            for found in pending.add(event):
                yield found
    for found in pending.end_order():
        yield found


async def log_batches(
    snapshot: Snapshot, on_batch: Callable[[int], object]
) -> AsyncIterator[Sequence[Order.StatusReported | FailedEvent]]:
    """Yield the events of the whole log by order and version.

    Args:
        snapshot: the log.
        on_batch: called with the number of events in each batch, after the batch.
    """
    async for batch in snapshot.batches:
        yield [event for _, event in batch]
        on_batch(len(batch))


async def order_batches(
    log: Log, order_no: str, on_batch: Callable[[int], object]
) -> AsyncIterator[Sequence[Order.StatusReported | FailedEvent]]:
    """Yield one order's events; see ``log_batches``."""
    version = 0
    while batch := await log.read_order(order_no, version):
        yield [event for _, event in batch]
        version = batch[-1][1].originator_version
        on_batch(len(batch))


class _Rejudgement(NamedTuple):
    """The rejudgement of a report: a claim for the recorder."""

    version: int

    async def find(self, connection: Connection, report: Report) -> ClaimedEvent | Sequence[Report]:
        """Return the event that has judged the report again, or else the report of the rejudgement."""
        version = self.version
        while batch := await store.read_stream(connection, report.order_no, version, BATCH_EVENTS_MAX):
            for recorded in batch:
                event = _decode(recorded)
                if event is not None and event.rejudges == self.version:
                    return ClaimedEvent(event, recorded.position, same_body=True)
            version = batch[-1].version
        return [report]

    async def keep(self, connection: Connection, report: Report, event: Order.StatusReported) -> None:
        """Do nothing: the event itself names the version."""


def _decode(recorded: RecordedEvent) -> Order.StatusReported | None:
    try:
        return decode_event(recorded.order_no, recorded.version, recorded.topic, recorded.state)
    except UndecodableEventError:
        return None


async def rejudge(recorder: Recorder, pending: PendingReport) -> Receipt:
    """Judge a pending report again, and return the receipt; a second time, the same receipt again.

    Raises:
        UnrecordableReportError: the order's last event cannot be read.
        OverloadedError, StorageUnavailableError: see ``Recorder.record``.
    """
    return await recorder.record(pending.to_report(datetime.now(UTC)), _Rejudgement(pending.version))
