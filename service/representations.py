"""How what is known is written in JSON: the members of every answer, by the contract in ``docs/api.md``."""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

from domain.statuses import ALIASES, HAPPY_PATH, LABELS, SETTLED, STATUSES
from domain.transitions import TABLE, judge
from projections import current_status
from projections.current_status import OrderRow
from projections.timeline import Entry, Transition
from service.event_store import RecordedEvent, plain_fields
from service.quarantine import QuarantineEntry

STATUS_LABELS: Final[dict[str, dict[str, str]]] = {status: label._asdict() for status, label in LABELS.items()}


def order(row: OrderRow) -> dict[str, Any]:
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


def status_label(status: str | None) -> dict[str, str] | None:
    """What people read for a status; None where there is no status, or none that this release knows."""
    return STATUS_LABELS.get(status) if status is not None else None


def set_aside(view: str, since_version: int, reason: str | None) -> dict[str, Any]:
    """From where on an order is missing in a view, and why."""
    return {"view": view, "since_version": since_version, "reason": reason}


def entry(row: Entry) -> dict[str, Any]:
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


def transition(row: Transition) -> dict[str, Any]:
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


def order_event(event: RecordedEvent) -> dict[str, Any]:
    """One recorded event among those of its order."""
    return {
        "version": event.version,
        "position": event.position,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": plain_fields(event.state),
    }


def log_event(event: RecordedEvent) -> dict[str, Any]:
    """One recorded event in the log of all orders."""
    return {
        "position": event.position,
        "order_no": event.order_no,
        "version": event.version,
        "type": event.topic,
        "recorded_at": event.recorded_at,
        "data": plain_fields(event.state),
    }


def quarantine_entry(entry: QuarantineEntry) -> dict[str, Any]:
    """One entry of the quarantine, in a list without its body."""
    shown = {name: value for name, value in entry._asdict().items() if name != "body"}
    if entry.body is not None:
        shown["body_base64"] = b64encode(entry.body).decode()
    return shown


def _table() -> Iterator[dict[str, Any]]:
    for status, leg in TABLE:
        row = {}
        for reported in STATUSES:
            judgement = judge(status, leg, reported)
            row[reported] = {"verdict": judgement.verdict, "skipped": judgement.skipped}
        yield {"from": status, "leg": leg, "to": row}


RULES: Final[dict[str, Any]] = {
    "statuses": [
        {
            "status": status,
            "label": STATUS_LABELS[status],
            "aliases": ALIASES[status],
            "settled": status in SETTLED,
            "rank": HAPPY_PATH.index(status) if status in HAPPY_PATH else None,
        }
        for status in STATUSES
    ],
    "table": list(_table()),
}
