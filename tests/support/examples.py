"""The reports and events of the unit tests."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from domain.order import NEW_ORDER, Arrival, Order, Report, decide, evolve
from service.features.pages.i18n import read_locales
from service.features.pages.render import FOLDER

# The texts of the pages.
LOCALES: Final = read_locales([FOLDER])

ORDER_NO: Final = "KOM20260131-0001"
CNOTE: Final = "JX1234567890"
CNOTE_OF_THE_RETURN: Final = "JX9990001112"
RECEIVED_AT: Final = datetime(2026, 1, 31, 8, 30, 0, 123456, tzinfo=UTC)
OCCURRED_AT: Final = datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)
MINUTE: Final = timedelta(minutes=1)

SENT_BODY: Final = '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent"}'
SENT: Final = Report(
    arrival=Arrival("7e2a5c10-9f3b-4d1e-8c55-0b6a4f3f2d01", RECEIVED_AT, "203.0.113.7"),
    order_no=ORDER_NO,
    reported_status="Sent",
    reported_cnote=CNOTE,
    body=SENT_BODY,
    occurred_at=OCCURRED_AT,
)

# The first event of an order whose first report is in transit.
SENT_EVENT: Final = decide(NEW_ORDER, SENT)

# The bytes that the first release wrote for SENT_EVENT. Never change them, because existing logs contain such
# bytes.
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

# One order's history, with an event of every shape that a release has ever written: the first release's, one
# with the name of a token, an unrecognised word, its rejudgement, and an imported report. Only add lines.
GOLDEN_EVENTS: Final = (Path(__file__).parent / "golden_events.ndjson").read_bytes().splitlines()


def says(status: str, cnote: str | None = None, received_at: datetime = RECEIVED_AT) -> Report:
    """Return SENT with another status, airway bill and time of arrival."""
    return arriving(SENT._replace(reported_status=status, reported_cnote=cnote), received_at)


def arriving(report: Report, received_at: datetime) -> Report:
    """Return the same report with another time of arrival."""
    return report._replace(arrival=report.arrival._replace(received_at=received_at))


def history(*reports: Report | str) -> list[Order.StatusReported]:
    """Return the events of an order whose reports arrive a minute apart.

    A string stands for a report with this status and without a cnote.
    """
    return judged(
        arriving(says(report) if isinstance(report, str) else report, RECEIVED_AT + minutes * MINUTE)
        for minutes, report in enumerate(reports)
    )


def judged(reports: Iterable[Report]) -> list[Order.StatusReported]:
    """Return the events of an order's reports, each decided from the event before it alone."""
    events: list[Order.StatusReported] = []
    state = NEW_ORDER
    for report in reports:
        events.append(decide(state, report))
        state = evolve(NEW_ORDER, events[-1])
    return events


def folded(events: Iterable[Order.StatusReported]) -> Order:
    """Return an order, folded from all of its events."""
    order = None
    for event in events:
        order = event.mutate(order)
    assert isinstance(order, Order)
    return order
