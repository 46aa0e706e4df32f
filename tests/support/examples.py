"""The reports and events that the unit tests speak of."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from domain.order import UNHEARD, Order, Report, judge_report

ORDER_NO: Final = "KOM20260131-0001"
CNOTE: Final = "JX1234567890"
CNOTE_OF_THE_RETURN: Final = "JX9990001112"
RECEIVED_AT: Final = datetime(2026, 1, 31, 8, 30, 0, 123456, tzinfo=UTC)
OCCURRED_AT: Final = datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)
MINUTE: Final = timedelta(minutes=1)

SENT_BODY: Final = '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent"}'
SENT: Final = Report(
    report_id="7e2a5c10-9f3b-4d1e-8c55-0b6a4f3f2d01",
    order_no=ORDER_NO,
    reported_status="Sent",
    reported_cnote=CNOTE,
    body=SENT_BODY,
    occurred_at=OCCURRED_AT,
    remote="203.0.113.7",
)

# The first event of an order that is first heard of on its way.
SENT_EVENT: Final = judge_report(UNHEARD, SENT, RECEIVED_AT)

# What this release wrote for SENT_EVENT when it was new. Never to be changed: such bytes lie in logs.
SENT_STATE: Final = (
    b'{"timestamp":{"_type_":"datetime_iso","_data_":"2026-01-31T08:30:00.123456+00:00"},'
    b'"report_id":"7e2a5c10-9f3b-4d1e-8c55-0b6a4f3f2d01",'
    b'"body":"{\\"order_no\\":\\"KOM20260131-0001\\",\\"cnote\\":\\"JX1234567890\\",\\"status\\":\\"Sent\\"}",'
    b'"reported_status":"Sent","reported_cnote":"JX1234567890",'
    b'"occurred_at":{"_type_":"datetime_iso","_data_":"2026-01-31T08:29:58+00:00"},'
    b'"remote":"203.0.113.7","quarantine_id":null,"verdict":"advanced","recognised":"in_transit",'
    b'"previous_status":null,"previous_since":null,"status":"in_transit","status_version":1,"leg":null,"cnote":"JX1234567890",'
    b'"skipped":[],"repeats":null,"reason":null}'
)


def says(status: str, cnote: str | None = None) -> Report:
    """SENT, with another status and airway bill."""
    return SENT._replace(reported_status=status, reported_cnote=cnote)


def history(*reports: Report | str) -> list[Order.StatusReported]:
    """What an order's reports are judged, received a minute apart; a string is a status without a cnote."""
    return judged(
        (says(report) if isinstance(report, str) else report, RECEIVED_AT + minutes * MINUTE)
        for minutes, report in enumerate(reports)
    )


def judged(received: Iterable[tuple[Report, datetime]]) -> list[Order.StatusReported]:
    """What reports are judged, each from the event before it alone."""
    events: list[Order.StatusReported] = []
    standing = UNHEARD
    for report, received_at in received:
        events.append(judge_report(standing, report, received_at))
        standing = events[-1].standing
    return events


def folded(events: Iterable[Order.StatusReported]) -> Order:
    """The order as all of its events tell it."""
    order = None
    for event in events:
        order = event.mutate(order)
    assert isinstance(order, Order)
    return order
