"""The account of the fault harness finds each broken invariant, and nothing in a correct log."""

from collections import Counter
from datetime import timedelta

from domain.order import NEW_ORDER, Order, OrderState, decide, evolve
from tests.support import account
from tests.support.account import Logged, Violations
from tests.support.load import Acknowledged, Refused
from tests.support.reports import NOW, report

SENT_AT = NOW.timestamp()


def logged(*statuses: str) -> list[Logged]:
    """Return a log with one order's events."""
    state: OrderState = NEW_ORDER
    log = []
    for position, status in enumerate(statuses, start=1):
        event = decide(state, report("KOM1", status))
        log.append((position, event))
        state = evolve(state, event)
    return log


def acknowledged(log: list[Logged]) -> list[Acknowledged]:
    return [
        Acknowledged(
            event.body,
            {
                "report_id": event.report_id,
                "position": position,
                "version": event.originator_version,
                "order_no": event.originator_id,
                "outcome": event.verdict,
            },
            0.0,
            0.0,
        )
        for position, event in log
    ]


def violations_of(log: list[Logged], receipts: list[Acknowledged]) -> str:
    violations = Violations()
    attempts = Counter(one.body for one in receipts)
    tail = [(position, e.originator_id, e.originator_version, e.report_id) for position, e in log]
    account.compare(log, attempts, receipts, tail, violations)
    return "\n".join(violations.lines)


def test_a_correct_log_has_no_violation() -> None:
    """An order whose events follow from each other, each acknowledged once, breaks nothing."""
    log = logged("Diajukan", "Dijemput", "Dikirim")
    assert violations_of(log, acknowledged(log)) == ""


def test_acknowledged_means_in_the_log_once() -> None:
    """A receipt without its event is found, and an event that is in the log twice."""
    log = logged("Diajukan", "Dijemput")
    assert "receipts without an event" in violations_of(log[:1], acknowledged(log))
    assert "recorded more often than sent" in violations_of([*log, log[-1]], acknowledged(log))


def test_a_gap_in_the_versions_is_found() -> None:
    """An order whose second event is missing has a gap."""
    first, _, third = logged("Diajukan", "Dijemput", "Dikirim")
    assert "1 versions after a gap: KOM1 version 3" in violations_of(
        [first, third], acknowledged([first, third])
    )


def test_an_event_that_was_judged_from_another_state_is_found() -> None:
    """The second event was judged after one that the log does not have, such as a lost one."""
    (first,) = logged("Diajukan")
    _, other = logged("Dikirim", "Diterima")
    violations = violations_of([first, other], acknowledged([first, other]))
    assert "1 events that do not follow from their order's previous event: KOM1 version 2" in violations


def recorded_refusals(arrived: float, appended: float, answered: float) -> tuple[int, list[str]]:
    """Return the account of one refused report: times are seconds after it was sent, in an outage of 5 s."""
    ((position, event),) = logged("Dikirim")
    event = Order.StatusReported(**{**vars(event), "timestamp": NOW + timedelta(seconds=arrived)})
    violations = Violations()
    count = account.count_recorded_refusals(
        [(position, event)],
        {position: SENT_AT + appended},
        [Refused(event.body, SENT_AT, SENT_AT + answered)],
        [(SENT_AT - 1.0, SENT_AT + 4.0)],
        violations,
    )
    return count, violations.lines


def test_a_refused_report_whose_append_was_begun_afterwards_is_found() -> None:
    """A report that got 503 may be recorded only if its append had been sent by then."""
    for answered, appended, is_late in (
        (3.0, 5.0, True),
        (4.1, 4.05, False),
        (4.1, 4.2, False),
        (4.1, 5.0, True),
    ):
        count, lines = recorded_refusals(0.001, appended, answered)
        assert (count, len(lines)) == (1, int(is_late)), (answered, appended)
    # Another attempt with the same body was recorded.
    assert recorded_refusals(6.0, 6.001, 3.0) == (0, [])
