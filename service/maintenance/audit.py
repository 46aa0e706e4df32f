"""The audit of verdicts: what was judged, and what today's table would judge otherwise."""

from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from domain.order import UNHEARD, Order, Report, Standing, judge_report
from domain.statuses import Status
from domain.transitions import Verdict
from projections.engine import Undecodable
from service.database.connections import Connection
from service.event_log import store as event_store
from service.event_log.feed import LogReader

PAGE_EVENTS: Final = 1_000


class Change(NamedTuple):
    """A report that today's table judges otherwise than it was judged."""

    order_no: str
    version: int
    reported_status: str
    recorded: Verdict
    today: Verdict
    status: Status | None


async def order_events(connection: Connection, order_no: str) -> AsyncIterator[Order.StatusReported]:
    """Yield an order's events, oldest first."""
    version = 0
    while page := await event_store.read_stream(connection, order_no, version, PAGE_EVENTS):
        for recorded in page:
            yield event_store.decode_event(order_no, recorded.version, recorded.topic, recorded.state)
        version = page[-1].version


async def rejudge(log_reader: LogReader) -> AsyncIterator[Change]:
    """Yield every report whose verdict or resulting status today's table would change.

    Each order is folded again from its first report, so a changed verdict carries on to what follows it.
    """
    order_no: str | None = None
    standing: Standing = UNHEARD
    async for page in log_reader.read_streams(await log_reader.head()):
        for _, event in page:
            if isinstance(event, Undecodable):
                place = f"version {event.originator_version} of {event.originator_id}"
                raise event_store.UndecodableEventError(f"{place}: {event.reason}")
            if event.originator_id != order_no:
                order_no, standing = event.originator_id, UNHEARD
            report = Report(event.report_id, order_no, event.reported_status, event.reported_cnote, event.body)
            today = judge_report(standing, report, event.timestamp)
            standing = today.standing
            if (today.verdict, today.status) != (event.verdict, event.status):
                yield Change(
                    order_no,
                    event.originator_version,
                    event.reported_status,
                    event.verdict,
                    today.verdict,
                    today.status,
                )


def explanation(event: Order.StatusReported) -> str:
    """Return what there is to say of a verdict beyond its name."""
    if event.skipped:
        return f"skipped {', '.join(event.skipped)}"
    if event.repeats is not None:
        return f"repeats version {event.repeats}"
    return event.reason or ""
