"""The account: what was intended and acknowledged is held against the log, the log against views and API."""

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, NamedTuple

import asyncpg
import orjson

from domain.order import Order
from projections import current_status
from projections.current_status import order_row
from service.api import representations
from service.event_log.store import decode_event
from service.http.problems import OPTIONS
from tests.support.connections import OK, UNAVAILABLE, Connections, get
from tests.support.load import Acknowledged
from tests.support.waiting import PATIENCE_SECONDS

# Of one kind: the first few say what is wrong, and their number how much.
VIOLATIONS_SHOWN_MAX: Final = 3

LOG: Final = """
    SELECT notification_id, originator_id, originator_version, topic, state
    FROM order_events ORDER BY notification_id
"""

Logged = tuple[int, Order.StatusReported]


@dataclass
class Violations:
    """What was promised and not held, a plain line each."""

    lines: list[str] = field(default_factory=list)

    def expect(self, holds: bool, line: str) -> None:  # noqa: FBT001 - read as a sentence
        if not holds:
            self.lines.append(line)

    def add(self, kind: str, found: Iterable[object]) -> int:
        """Note everything that was found of one kind, and return how much it was."""
        items = list(found)
        if items:
            shown = "; ".join(str(item) for item in items[:VIOLATIONS_SHOWN_MAX])
            self.lines.append(f"{len(items)} {kind}: {shown}")
        return len(items)


class Count(NamedTuple):
    """The numbers of an account."""

    acknowledged: int
    lost: int
    doubled: int


async def read_log(dsn: str) -> list[Logged]:
    """The whole log, in the order of positions, by SQL."""
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
    seen: Sequence[tuple[int, str, int, str]],
    violations: Violations,
) -> Count:
    """Hold the log against intents, receipts and the live tail.

    Args:
        log: position and event of everything that is recorded.
        attempts: how often each text was to be sent.
        acknowledged: every 200.
        seen: position, order, version and report_id of every event, as the live tail met them.
        violations: taken down here.
    """
    recorded = Counter(event.body for _, event in log)
    told = Counter(one.body for one in acknowledged)
    violations.add("events without an intent", recorded.keys() - attempts.keys())
    doubled = sum((recorded - attempts).values())
    violations.add("texts recorded more often than sent", recorded - attempts)
    report_ids = Counter(event.report_id for _, event in log)
    twice = [report_id for report_id, times in report_ids.items() if times > 1]
    doubled += violations.add("report_ids in more than one event", twice)
    violations.add("texts recorded less often than acknowledged", told - recorded)
    receipt_ids = Counter(one.receipt["report_id"] for one in acknowledged)
    violations.add("receipts for the same event", [key for key, times in receipt_ids.items() if times > 1])

    by_id = {event.report_id: (position, event) for position, event in log}
    lost = [one for one in acknowledged if not _is_there(one, by_id)]
    violations.add("acknowledged and not there as told", [one.receipt for one in lost])
    violations.add("versions that leave a gap", _gaps(log))
    violations.add("orders of a single report that are not one advanced, then repeated", _misjudged(log))
    ours = [(position, e.originator_id, e.originator_version, e.report_id) for position, e in log]
    if list(seen) != ours:
        differing = [pair for pair in zip(seen, ours, strict=False) if pair[0] != pair[1]]
        violations.lines.append(
            f"the live tail saw {len(seen)} events, the log has {len(ours)}; first difference: {differing[:1]}"
        )
    return Count(len(acknowledged), len(lost), doubled)


def worst_outage(acknowledged: Sequence[Acknowledged], since: float) -> float:
    """The longest time without a 200 from a moment on, in seconds."""
    moments = sorted(one.at for one in acknowledged)
    # The last one before that moment still belongs to it.
    return max(
        (after - max(before, since) for before, after in pairwise(moments) if after > since), default=0.0
    )


def _is_there(one: Acknowledged, by_id: dict[str, Logged]) -> bool:
    position, event = by_id.get(one.receipt["report_id"], (0, None))
    if event is None or event.body != one.body:
        return False
    told = (one.receipt["position"], one.receipt["version"], one.receipt["order_no"], one.receipt["outcome"])
    return told == (position, event.originator_version, event.originator_id, event.verdict)


def _gaps(log: Sequence[Logged]) -> list[str]:
    versions: Counter[str] = Counter()
    gaps = []
    for _, event in log:
        versions[event.originator_id] += 1
        if event.originator_version != versions[event.originator_id]:
            gaps.append(f"{event.originator_id} version {event.originator_version}")
    return gaps


def _misjudged(log: Sequence[Logged]) -> list[str]:
    """Orders of which one text alone was reported, with other verdicts than one advanced and repeats of it."""
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
    """Hold what the API says of every order against the fold of the log."""
    head = log[-1][0] if log else 0
    due = time.monotonic() + PATIENCE_SECONDS
    while (positions := await _view_positions(connections)) != {head}:
        if time.monotonic() > due:
            violations.lines.append(f"the views stand at {positions}, the log at {head}")
            return
        await asyncio.sleep(0.05)
    rows: dict[str, current_status.Row] = {}
    current_status.fold(log, rows)
    orders = [representations.order(order_row(row)) for row in rows.values()]
    folded = {order["order_no"]: order for order in orjson.loads(orjson.dumps(orders, option=OPTIONS))}
    told = {order["order_no"]: order for order in await _every_order(connections)}
    differing = [
        order_no for order_no in folded.keys() | told.keys() if folded.get(order_no) != told.get(order_no)
    ]
    violations.add("orders that the API tells otherwise than the log", sorted(differing))


async def _view_positions(connections: Connections) -> set[int]:
    answer = await connections.request(get("/projections"))
    if answer is None or answer.status != OK:
        return set()
    return {view["position"] for view in json.loads(answer.body)["projections"]}


async def _every_order(connections: Connections) -> list[dict[str, Any]]:
    orders: list[dict[str, Any]] = []
    path: str | None = "/orders?limit=1000"
    while path is not None:
        answer = await connections.request(get(path))
        if answer is None or answer.status != OK:
            return orders
        page = json.loads(answer.body)
        orders += page["orders"]
        path = page["next"]
    return orders


def check_answers(connections: Connections, seconds_max: float, violations: Violations) -> None:
    """Nothing but 200, and 503 with Retry-After, each within the budget."""
    unexpected = {s: n for s, n in connections.answers.items() if s not in (OK, UNAVAILABLE)}
    violations.expect(not unexpected, f"answers other than 200 and 503: {unexpected}")
    violations.expect(
        connections.bare_refusals == 0, f"{connections.bare_refusals} times 503 without Retry-After"
    )
    violations.expect(connections.silences == 0, f"{connections.silences} requests without any answer")
    slowest = connections.slowest_seconds
    violations.expect(slowest <= seconds_max, f"an answer took {slowest:.1f} s")
