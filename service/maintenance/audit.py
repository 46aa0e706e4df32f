"""The audit of one order: its events with their verdicts, and an explanation of each verdict."""

from collections.abc import AsyncIterator
from typing import Final

from domain.order import Order
from projections.postgres_errors import Connection
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
