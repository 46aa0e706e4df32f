"""The audit: an order's verdicts, and the reports that today's transition table would judge differently."""

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from domain.order import NEW_ORDER, Arrival, Order, OrderState, Report, decide, evolve
from domain.statuses import Status
from domain.transitions import Verdict
from projections.engine import FailedEvent
from projections.postgres_errors import Connection
from service.event_log import store
from service.event_log.codec import UndecodableEventError, decode_event
from service.event_log.feed import Feed

BATCH_EVENTS_MAX: Final = 1_000


class Change(NamedTuple):
    """A report whose verdict or resulting status today's table would change."""

    order_no: str
    version: int
    reported_status: str
    recorded: Verdict
    today: Verdict
    status: Status | None


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


async def rejudge(feed: Feed) -> AsyncIterator[Change]:
    """Yield every report whose verdict or resulting status today's table would change.

    Each order is decided again from its first report, so a changed verdict affects the reports after it.

    Raises:
        UndecodableEventError: this release cannot read an event.
    """
    order_no: str | None = None
    state: OrderState = NEW_ORDER
    async for batch in feed.read_streams(await feed.head()):
        for _, event in batch:
            if isinstance(event, FailedEvent):
                place = f"version {event.originator_version} of {event.originator_id}"
                raise UndecodableEventError(f"{place}: {event.reason}")
            if event.originator_id != order_no:
                order_no, state = event.originator_id, NEW_ORDER
            arrival = Arrival(event.report_id, event.timestamp)
            report = Report(arrival, order_no, event.reported_status, event.reported_cnote, event.body)
            today = decide(state, report)
            state = evolve(state, today)
            if (today.verdict, today.status) != (event.verdict, event.status):
                yield Change(
                    order_no,
                    event.originator_version,
                    event.reported_status,
                    event.verdict,
                    today.verdict,
                    today.status,
                )


def explain(event: Order.StatusReported) -> str:
    """Return a verdict's explanation: skipped stages, the repeated version, the reason, or an empty text."""
    if event.skipped:
        return f"skipped {', '.join(event.skipped)}"
    if event.repeats is not None:
        return f"repeats version {event.repeats}"
    return event.reason or ""
