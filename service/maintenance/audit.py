"""The audit: an order's verdicts and their explanations, and the verdicts that today's table would change."""

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from domain.order import NEW_ORDER, Arrival, Order, OrderState, Report, decide, evolve
from domain.statuses import Status
from domain.transitions import Verdict
from projections.postgres import Connection
from service.event_log import store
from service.event_log.codec import decode_event

BATCH_EVENTS_MAX: Final = 1_000


async def order_events(connection: Connection, order_no: str) -> AsyncIterator[Order.StatusReported]:
    """Yield an order's events, oldest first.

    Raises:
        UndecodableEventError: this release cannot read an event.
    """
    version = 0
    while batch := await store.read_stream(connection, order_no, version, BATCH_EVENTS_MAX):
        for event in batch:
            yield decode_event(order_no, event.version, event.topic, event.state)
        version = batch[-1].version


class Change(NamedTuple):
    """A report whose verdict or resulting status today's transition table would change."""

    order_no: str
    version: int
    reported_status: str
    recorded: Verdict
    today: Verdict
    status: Status | None


class TableAudit:
    """Compares recorded verdicts with those of today's table, order by order.

    Each order is decided again from its first report, so a changed verdict affects the reports after it. A word
    keeps the meaning that it had when it was judged.
    """

    def __init__(self) -> None:
        self._order_no: str | None = None
        self._state: OrderState = NEW_ORDER

    def add(self, event: Order.StatusReported) -> Change | None:
        """Add the next event by order and version; return its change, None if today's verdict is the same."""
        if event.originator_id != self._order_no:
            self._order_no, self._state = event.originator_id, NEW_ORDER
        report = Report(
            Arrival(event.report_id, event.timestamp),
            event.originator_id,
            event.reported_status,
            event.reported_cnote,
            event.body,
            rejudges=event.rejudged_report,
        )
        today = decide(self._state, report, lambda _word: event.recognised)
        self._state = evolve(self._state, today)
        if (today.verdict, today.status) == (event.verdict, event.status):
            return None
        place = (event.originator_id, event.originator_version, event.reported_status)
        return Change(*place, event.verdict, today.verdict, today.status)


def explain(event: Order.StatusReported) -> str:
    """Return a verdict's explanation: skipped stages, the repeated version, the reason, or an empty text."""
    if event.rejudges is not None:
        explanation = f"version {event.rejudges} judged again"
        return f"{explanation}: {event.reason}" if event.reason else explanation
    if event.skipped:
        return f"skipped {', '.join(event.skipped)}"
    if event.repeats is not None:
        return f"repeats version {event.repeats}"
    return event.reason or ""
