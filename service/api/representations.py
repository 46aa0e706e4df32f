"""How what is known is written in JSON: the members of every answer, by the contract in ``docs/api.md``."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import Annotated, Any, Final, NotRequired, cast

from pydantic import WithJsonSchema
from typing_extensions import TypedDict  # typing's own cannot be read by pydantic before 3.12

from domain.statuses import ALIASES, HAPPY_PATH, LABELS, SETTLED, STATUSES
from domain.transitions import TABLE, VERDICTS, judge
from projections import current_status
from projections.current_status import OrderRow
from projections.statistics import Statistics as Counted
from projections.timeline import Entry as EntryRow
from projections.timeline import Transition as TransitionRow
from service.event_log.store import RecordedEvent, plain_fields
from service.ingest.quarantine import QuarantineEntry as EntryKept

StatusName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*STATUSES]})]
VerdictName = Annotated[str, WithJsonSchema({"type": "string", "enum": [*VERDICTS]})]


class Label(TypedDict):
    """What people read for a status."""

    id: str
    en: str


class SetAside(TypedDict):
    """From which version on an order is missing in a view, and why."""

    view: str
    since_version: int
    reason: str | None


class Counts(TypedDict):
    """How many reports of an order had each verdict."""

    advanced: int
    repeated: int
    late: int
    refused: int
    unrecognised: int


class Order(TypedDict):
    """One order."""

    order_no: str
    cnote: str | None
    status: StatusName | None
    status_label: Label | None
    reported_status: str | None
    settled: bool
    version: int
    position: int
    status_since: datetime | None
    first_reported_at: datetime
    last_reported_at: datetime
    counts: Counts
    set_aside: SetAside | None


class Orders(TypedDict):
    """A page of orders."""

    orders: list[Order]
    next: str | None


class Entry(TypedDict):
    """One entry of a timeline, mere repeats folded in."""

    version: int
    verdict: VerdictName
    status: StatusName | None
    previous_status: StatusName | None
    reported_status: str
    status_label: Label | None
    reported_cnote: str | None
    skipped: list[StatusName]
    reason: str | None
    received_at: datetime
    occurred_at: datetime | None
    repeats: int
    last_repeated_at: datetime | None


class Timeline(TypedDict):
    """A page of an order's timeline."""

    order_no: str
    status: StatusName | None
    set_aside: SetAside | None
    entries: list[Entry]
    next: str | None


class OrderEvent(TypedDict):
    """One recorded event among those of its order."""

    version: int
    position: int
    type: str
    recorded_at: datetime
    data: dict[str, Any] | None


class OrderEvents(TypedDict):
    """A page of an order's events."""

    events: list[OrderEvent]
    next: str | None


class LogEvent(TypedDict):
    """One recorded event in the log of all orders."""

    position: int
    order_no: str
    version: int
    type: str
    recorded_at: datetime
    data: dict[str, Any] | None


class LogEvents(TypedDict):
    """A page of the log."""

    events: list[LogEvent]
    next: str | None


# "from" is no name of Python's.
Transition = TypedDict(
    "Transition",
    {
        "position": int,
        "order_no": str,
        "version": int,
        "verdict": VerdictName,
        "from": StatusName | None,
        "to": StatusName | None,
        "reported_status": str,
        "reason": str | None,
        "skipped": list[StatusName],
        "received_at": datetime,
    },
)


class Transitions(TypedDict):
    """A page of the audit."""

    transitions: list[Transition]
    next: str | None


class RuledStatus(TypedDict):
    """A status and its words."""

    status: StatusName
    label: Label
    aliases: list[str]
    settled: bool
    rank: int | None


class Move(TypedDict):
    """What a report means for an order of some status."""

    verdict: VerdictName
    skipped: list[StatusName]


Rule = TypedDict("Rule", {"from": StatusName | None, "leg": str | None, "to": dict[str, Move]})


class Rules(TypedDict):
    """The vocabulary and the transition table."""

    statuses: list[RuledStatus]
    table: list[Rule]


class QuarantineEntry(TypedDict):
    """A body that could not be understood; ``body_base64`` only where one entry is asked for."""

    quarantine_id: int
    received_at: datetime
    reason: str
    state: Annotated[str, WithJsonSchema({"type": "string", "enum": ["open", "retried", "discarded"]})]
    times_seen: int
    last_seen_at: datetime
    remote: str | None
    resolved_at: datetime | None
    resolution: str | None
    order_no: str | None
    version: int | None
    body_base64: NotRequired[str | None]


class QuarantineEntries(TypedDict):
    """A page of the quarantine."""

    entries: list[QuarantineEntry]
    next: str | None


class Receipt(TypedDict):
    """What became of a report; ``quarantine_id`` where it could not be understood, or was taken from there."""

    outcome: Annotated[str, WithJsonSchema({"type": "string", "enum": [*VERDICTS, "quarantined"]})]
    report_id: str
    order_no: str | None
    version: int | None
    position: int | None
    status: StatusName | None
    reported_status: str | None
    skipped: list[StatusName] | None
    reason: str | None
    quarantine_id: NotRequired[int]


class OrderAside(TypedDict):
    """An order that a view could not go on with."""

    order_no: str
    since_version: int
    position: int
    reason: str


class Projection(TypedDict):
    """How far a view has come."""

    view: str
    position: int
    head: int
    lag_events: int
    lag_seconds: float
    is_outdated: bool
    set_aside: list[OrderAside]


class Projections(TypedDict):
    """How far every view has come."""

    head: int
    projections: list[Projection]


class StatusCount(TypedDict):
    """How many orders have a status; null is of those that have none yet."""

    status: StatusName | None
    status_label: Label | None
    orders: int


MoveStatistics = TypedDict(
    "MoveStatistics",
    {
        "from": StatusName,
        "to": StatusName,
        "times": int,
        "seconds_p50": float,
        "seconds_p90": float,
        "seconds_p99": float,
    },
)


class Day(TypedDict):
    """How many reports of a day, in UTC, had each verdict."""

    day: date
    reports: Counts


class UnrecognisedString(TypedDict):
    """A string that the vocabulary does not have."""

    reported_status: str
    reports: int
    last_received_at: datetime


class Statistics(TypedDict):
    """How orders move in general."""

    position: int
    statuses: list[StatusCount]
    moves: list[MoveStatistics]
    days: list[Day]
    unrecognised: list[UnrecognisedString]


class Health(TypedDict):
    """That it answers."""

    status: str


STATUS_LABELS: Final[dict[str, Label]] = {
    status: {"id": label.id, "en": label.en} for status, label in LABELS.items()
}


def order(row: OrderRow) -> Order:
    """One order."""
    aside = None
    if row.aside_since is not None:
        aside = set_aside(current_status.NAME, row.aside_since, row.aside_reason)
    return {
        "order_no": row.order_no,
        "cnote": row.cnote,
        "status": row.status,
        "status_label": status_label(row.status),
        "reported_status": row.reported_status,
        "settled": row.status in SETTLED,
        "version": row.version,
        "position": row.position,
        "status_since": row.status_since,
        "first_reported_at": row.first_reported_at,
        "last_reported_at": row.last_reported_at,
        "counts": {
            "advanced": row.advanced,
            "repeated": row.repeated,
            "late": row.late,
            "refused": row.refused,
            "unrecognised": row.unrecognised,
        },
        "set_aside": aside,
    }


def status_label(status: str | None) -> Label | None:
    """What people read for a status; None where there is no status, or none that this release knows."""
    return STATUS_LABELS.get(status) if status is not None else None


def set_aside(view: str, since_version: int, reason: str | None) -> SetAside:
    """From where on an order is missing in a view, and why."""
    return {"view": view, "since_version": since_version, "reason": reason}


def entry(row: EntryRow) -> Entry:
    """One entry of a timeline."""
    return {
        "version": row.version,
        "verdict": row.verdict,
        "status": row.status,
        "previous_status": row.previous_status,
        "reported_status": row.reported_status,
        "status_label": status_label(row.status),
        "reported_cnote": row.reported_cnote,
        "skipped": row.skipped,
        "reason": row.reason,
        "received_at": row.received_at,
        "occurred_at": row.occurred_at,
        "repeats": row.repeats,
        "last_repeated_at": row.last_repeated_at,
    }


def transition(row: TransitionRow) -> Transition:
    """One verdict of the audit."""
    return {
        "position": row.position,
        "order_no": row.order_no,
        "version": row.version,
        "verdict": row.verdict,
        "from": row.previous_status,
        "to": row.recognised,
        "reported_status": row.reported_status,
        "reason": row.reason,
        "skipped": row.skipped,
        "received_at": row.received_at,
    }


def order_event(event: RecordedEvent) -> OrderEvent:
    """One recorded event among those of its order."""
    return {
        "version": event.version,
        "position": event.position,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": plain_fields(event.state),
    }


def log_event(event: RecordedEvent) -> LogEvent:
    """One recorded event in the log of all orders."""
    return {
        "position": event.position,
        "order_no": event.order_no,
        "version": event.version,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": plain_fields(event.state),
    }


def quarantine_entry(entry: EntryKept, *, with_body: bool = False) -> QuarantineEntry:
    """One entry of the quarantine, in a list without its body."""
    shown = {name: value for name, value in entry._asdict().items() if name != "body"}
    if with_body:
        # Null once it is erased.
        shown["body_base64"] = b64encode(entry.body).decode() if entry.body is not None else None
    return cast("QuarantineEntry", shown)


def statistics(counted: Counted) -> Statistics:
    """All counters."""
    return {
        "position": counted.position,
        "statuses": [
            {"status": status, "status_label": status_label(status), "orders": orders}
            for status, orders in _in_order(counted.statuses)
        ],
        "moves": [
            {
                "from": move.previous_status,
                "to": move.status,
                "times": move.times,
                "seconds_p50": move.seconds[0],
                "seconds_p90": move.seconds[1],
                "seconds_p99": move.seconds[2],
            }
            for move in counted.moves
        ],
        "days": [
            {"day": day, "reports": cast("Counts", {verdict: reports.get(verdict, 0) for verdict in VERDICTS})}
            for day, reports in counted.days
        ],
        "unrecognised": [
            {"reported_status": reported, "reports": reports, "last_received_at": last}
            for reported, reports, last in counted.unrecognised
        ],
    }


def _in_order(statuses: Sequence[tuple[str | None, int]]) -> list[tuple[str | None, int]]:
    """In the order of the vocabulary; what it does not have comes last."""
    ranks: dict[str | None, int] = {None: -1, **{status: rank for rank, status in enumerate(STATUSES)}}
    return sorted(statuses, key=lambda counted: ranks.get(counted[0], len(ranks)))


def _table() -> Iterator[Rule]:
    for status, leg in TABLE:
        row: dict[str, Move] = {}
        for reported in STATUSES:
            judgement = judge(status, leg, reported)
            row[reported] = {"verdict": judgement.verdict, "skipped": [*judgement.skipped]}
        yield {"from": status, "leg": leg, "to": row}


RULES: Final[Rules] = {
    "statuses": [
        {
            "status": status,
            "label": STATUS_LABELS[status],
            "aliases": [*ALIASES[status]],
            "settled": status in SETTLED,
            "rank": HAPPY_PATH.index(status) if status in HAPPY_PATH else None,
        }
        for status in STATUSES
    ],
    "table": list(_table()),
}
