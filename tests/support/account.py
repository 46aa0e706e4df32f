"""The account of a fault run: it compares intents and receipts with the log, and the log with views and API.

It checks the invariants of the protocol:

1. Acknowledged means in the log once, unless the log lost it.
2. No gap in an order's versions.
3. No event is judged from a state that is not its predecessor.

And the promise about refusals: a report that got 503 is recorded only if its append had been sent before.
"""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import asyncpg
import orjson

from domain.order import NEW_ORDER, Arrival, Order, OrderState, Report, decide, evolve
from projections import current_status
from projections.current_status import to_order
from service.event_log.codec import decode_event
from service.http.responses import JSON_OPTIONS
from tests.support.connections import GONE, OK, UNAVAILABLE, Connections, get
from tests.support.load import Acknowledged, Refused
from tests.support.waiting import PATIENCE_SECONDS

# A frozen server may get one more append after its beginning, into the buffer of its socket.
SENT_SECONDS: Final = 0.5
# A page of events is read on two connections, one after the other, each with the time limit of a request.
READ_SECONDS: Final = 3.0
# An append that was begun before the response may end this much later, on a busy machine.
APPEND_SECONDS: Final = 0.5
# The clocks of the sender and of the service are the same, and are read one after the other.
CLOCK_SECONDS: Final = 0.005

# A few examples of each kind show the problem, and the total shows its extent.
VIOLATIONS_SHOWN_MAX: Final = 3

LOG: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state
    FROM order_events ORDER BY notification_id
"""

TIMES: Final = "SELECT notification_id, recorded_at FROM order_events"

Logged = tuple[int, Order.StatusReported]


@dataclass
class Violations:
    """The violated promises, one line each, and the number of wrong events, views and responses among them."""

    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    def expect(self, holds: bool, line: str) -> None:  # noqa: FBT001 - read as a sentence
        if not holds:
            self.lines.append(line)

    def add(self, kind: str, violations: Iterable[object]) -> int:
        """Add one line for all violations of a kind, and return their number."""
        items = list(violations)
        if items:
            examples = "; ".join(str(item) for item in items[:VIOLATIONS_SHOWN_MAX])
            self.lines.append(f"{len(items)} {kind}: {examples}")
        return len(items)

    def add_wrong(self, kind: str, violations: Iterable[object]) -> None:
        """Add one line for all wrong events, views or responses of a kind."""
        self.wrong += self.add(kind, violations)


class Count(NamedTuple):
    """The numbers of an account.

    Attributes:
        acknowledged: responses of 200.
        lost: acknowledged reports that are not in the log.
        doubled: events that no report needed.
        refused: responses of 503 to webhooks.
        wrong: versions after a gap, verdicts that do not follow from the log, differences between views and
            log, and unexpected responses.
    """

    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    refused: int = 0
    wrong: int = 0


class Exempt(NamedTuple):
    """The changes of the log that the operator made.

    Attributes:
        missing: the report_ids that the server of a failover, or the backup of a restore, never had.
        erased: the erased orders, whose events have no body.
    """

    missing: frozenset[str] = frozenset()
    erased: frozenset[str] = frozenset()


NOTHING: Final = Exempt()


async def read_log(dsn: str) -> list[Logged]:
    """Return the whole log by position, read by SQL."""
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch(LOG)
    finally:
        await connection.close()
    return [(position, decode_event(*event)) for position, *event in rows]


def compare(
    log: Sequence[Logged],
    attempts: Counter[str],
    acknowledged: Sequence[Acknowledged],
    tail: Sequence[tuple[int, str, int, str]],
    violations: Violations,
    *,
    exempt: Exempt = NOTHING,
) -> Count:
    """Compare the log with intents, receipts and the live tail.

    Args:
        log: each event with its position.
        attempts: the number of intended attempts to send each body.
        acknowledged: every 200 response.
        tail: position, order, version and report_id of every event that the live tail received.
        violations: receives a line for every difference.
        exempt: the reports that the operator lost or erased; exactly these must be missing.
    """
    lost, doubled = _check_acknowledged(log, attempts, acknowledged, violations, exempt)
    # No gap in an order's versions.
    violations.add_wrong("versions after a gap", _gaps(log))
    # No event is judged from a state that is not its predecessor.
    violations.add_wrong("events that do not follow from their order's previous event", _misdecided(log))
    violations.add_wrong(
        "orders with a single report whose verdicts are not advanced, then repeated",
        [order_no for order_no in _misjudged(log) if order_no not in exempt.erased],
    )
    expected = [(position, e.originator_id, e.originator_version, e.report_id) for position, e in log]
    if list(tail) != expected:
        differences = [pair for pair in zip(tail, expected, strict=False) if pair[0] != pair[1]]
        violations.add_wrong(
            f"difference between the live tail, which received {len(tail)} events, and the log",
            [differences[:1] or f"{len(expected)} events in the log"],
        )
    return Count(len(acknowledged), lost, doubled)


def _check_acknowledged(
    log: Sequence[Logged],
    attempts: Counter[str],
    acknowledged: Sequence[Acknowledged],
    violations: Violations,
    exempt: Exempt,
) -> tuple[int, int]:
    """Check that acknowledged means in the log once; return the numbers of lost and of doubled reports."""
    recorded = Counter(event.body for _, event in log if event.originator_id not in exempt.erased)
    attempts = Counter({body: times for body, times in attempts.items() if not _is_erased(body, exempt)})
    receipts = Counter(
        one.body
        for one in acknowledged
        if one.receipt["report_id"] not in exempt.missing and not _is_erased(one.body, exempt)
    )
    violations.add("events without an intent", recorded.keys() - attempts.keys())
    doubled = (recorded - attempts).total()
    violations.add("bodies recorded more often than sent", recorded - attempts)
    report_ids = Counter(event.report_id for _, event in log)
    duplicates = [report_id for report_id, times in report_ids.items() if times > 1]
    # The same event may be both.
    doubled = max(doubled, violations.add("report_ids in more than one event", duplicates))
    violations.add("bodies recorded less often than acknowledged", receipts - recorded)
    receipt_ids = Counter(one.receipt["report_id"] for one in acknowledged)
    violations.add("receipts for the same event", [key for key, times in receipt_ids.items() if times > 1])

    by_id = {event.report_id: (position, event) for position, event in log}
    lost = [one for one in acknowledged if not _is_recorded(one, by_id, exempt)]
    unexplained = [one.receipt for one in lost if one.receipt["report_id"] not in exempt.missing]
    violations.add("receipts without an event that equals them", unexplained)
    violations.add("events that the server never had", exempt.missing & by_id.keys())
    violations.add("events of erased orders with a body", _unerased(log, exempt))
    return len(lost), doubled


async def read_times(dsn: str) -> dict[int, float]:
    """Return when the event at each position was appended, by the machine's clock."""
    connection = await asyncpg.connect(dsn)
    try:
        return {position: at.timestamp() for position, at in await connection.fetch(TIMES)}
    finally:
        await connection.close()


def count_recorded_refusals(
    log: Sequence[Logged],
    times: Mapping[int, float],
    refusals: Sequence[Refused],
    outages: Sequence[tuple[float, float]],
    violations: Violations,
) -> int:
    """Return how many reports were recorded although they got 503: those of an outage are a violation.

    Args:
        log: each event with its position.
        times: when the event at each position was appended.
        refusals: every 503 response.
        outages: the times, by the clock of the machine, in which the database could not be reached. From
            SENT_SECONDS after the beginning on, no append can be sent.
        violations: receives a line for the reports of outages whose append was begun after their response.
    """
    arrivals: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for position, event in log:
        arrivals[event.body].append((event.timestamp.timestamp(), times[position]))
    recorded = [
        (one, appended_at)
        for one in refusals
        for arrived_at, appended_at in arrivals[one.body]
        if one.sent_at - CLOCK_SECONDS <= arrived_at <= one.answered_at + CLOCK_SECONDS
    ]
    late = [
        f"{one.body}, {appended_at - one.answered_at:.1f} s after the response"
        for one, appended_at in recorded
        for began, ended in outages
        if began + SENT_SECONDS < one.sent_at < ended
        and (one.answered_at < ended or appended_at > one.answered_at + APPEND_SECONDS)
    ]
    violations.add_wrong("reports that got 503 are recorded, although their append was not begun by then", late)
    return len(recorded)


def worst_outage(acknowledged: Sequence[Acknowledged], since: float) -> float:
    """Return the longest time without a 200 after a moment, in seconds."""
    moments = sorted(one.at for one in acknowledged)
    # An outage that is in progress at that moment counts from there.
    return max(
        (after - max(before, since) for before, after in pairwise(moments) if after > since), default=0.0
    )


def _is_erased(body: str, exempt: Exempt) -> bool:
    return bool(exempt.erased) and json.loads(body)["order_no"] in exempt.erased


def _unerased(log: Sequence[Logged], exempt: Exempt) -> list[str]:
    return [event.report_id for _, event in log if event.originator_id in exempt.erased and event.body]


def _is_recorded(one: Acknowledged, by_id: dict[str, Logged], exempt: Exempt) -> bool:
    position, event = by_id.get(one.receipt["report_id"], (0, None))
    if event is None or (event.body != one.body and event.originator_id not in exempt.erased):
        return False
    receipt = (one.receipt["position"], one.receipt["version"], one.receipt["order_no"], one.receipt["outcome"])
    return receipt == (position, event.originator_version, event.originator_id, event.verdict)


def _gaps(log: Sequence[Logged]) -> list[str]:
    versions: Counter[str] = Counter()
    gaps = []
    for _, event in log:
        versions[event.originator_id] += 1
        if event.originator_version != versions[event.originator_id]:
            gaps.append(f"{event.originator_id} version {event.originator_version}")
    return gaps


def _misdecided(log: Sequence[Logged]) -> list[str]:
    """Return the events that a decision on the order's previous event in the log does not give."""
    states: defaultdict[str, OrderState] = defaultdict(lambda: NEW_ORDER)
    differences = []
    for _, event in log:
        report = Report(
            Arrival(
                *(event.report_id, event.timestamp, event.remote),
                *(event.token_name, event.imported_at, event.traceparent),
            ),
            event.originator_id,
            event.reported_status,
            event.reported_cnote,
            event.body,
            event.occurred_at,
            event.quarantine_id,
            event.rejudged_report,
        )
        decided = decide(states[event.originator_id], report)
        if vars(decided) != vars(event):
            differences.append(f"{event.originator_id} version {event.originator_version}")
        states[event.originator_id] = evolve(states[event.originator_id], event)
    return differences


def _misjudged(log: Sequence[Logged]) -> list[str]:
    """Return the orders with a single body whose verdicts are not one advanced, then only repeated."""
    by_order: defaultdict[str, list[Order.StatusReported]] = defaultdict(list)
    for _, event in log:
        by_order[event.originator_id].append(event)
    return [
        order_no
        for order_no, events in by_order.items()
        if len({event.body for event in events}) == 1
        and [event.verdict for event in events] != ["advanced", *["repeated"] * (len(events) - 1)]
    ]


async def check_views(log: Sequence[Logged], connections: Connections, violations: Violations) -> None:
    """Compare every order in the API with the fold of the log."""
    head = log[-1][0] if log else 0
    due = time.monotonic() + PATIENCE_SECONDS
    while (positions := await _view_positions(connections)) != {head}:
        if time.monotonic() > due:
            behind = f"they are at positions {positions}, the log is at {head}"
            violations.add_wrong("view that does not reach the head", [behind])
            return
        await asyncio.sleep(0.05)
    folded = await asyncio.to_thread(_fold, log)
    served = {order["order_no"]: order for order in await _every_order(connections)}
    differences = [
        order_no for order_no in folded.keys() | served.keys() if folded.get(order_no) != served.get(order_no)
    ]
    violations.add_wrong("orders that differ between the API and the log", sorted(differences))


def _fold(log: Sequence[Logged]) -> dict[str, Any]:
    """Return every order as the API must show it, by its number."""
    rows = current_status.VIEW.new_rows()
    current_status.fold(log, rows)
    orders = [to_order(row) for row in rows["orders"].values()]
    return {order["order_no"]: order for order in orjson.loads(orjson.dumps(orders, option=JSON_OPTIONS))}


async def _view_positions(connections: Connections) -> set[int]:
    response = await connections.request(get("/projections"))
    if response is None or response.status != OK:
        return set()
    return {view["position"] for view in json.loads(response.body)["projections"]}


async def _every_order(connections: Connections) -> list[dict[str, Any]]:
    orders: list[dict[str, Any]] = []
    path: str | None = "/orders?limit=1000"
    while path is not None:
        response = await connections.request(get(path))
        if response is None or response.status != OK:
            return orders
        page = json.loads(response.body)
        orders += page["orders"]
        path = page["next"]
    return orders


def check_answers(
    connections: Connections, seconds_max: float, violations: Violations, *, may_be_gone: bool
) -> None:
    """Expect only 200, or 503 with Retry-After; 410 if readers saw lost events.

    Each response to a webhook must come within ``seconds_max``, and to a read within READ_SECONDS more.
    """
    expected = (OK, UNAVAILABLE, GONE) if may_be_gone else (OK, UNAVAILABLE)
    unexpected = [f"{times} of {s}" for s, times in connections.answers.items() if s not in expected]
    violations.add_wrong("kinds of responses other than 200 and 503", unexpected)
    violations.expect(
        connections.bare_refusals == 0, f"{connections.bare_refusals} responses of 503 without Retry-After"
    )
    violations.expect(connections.silences == 0, f"{connections.silences} requests without a response")
    for method, (seconds, line) in connections.slowest.items():
        limit = seconds_max if method == "PUT" else seconds_max + READ_SECONDS
        violations.expect(seconds <= limit, f"a response took {seconds:.1f} s: {line}")
