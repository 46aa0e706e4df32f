"""The order: an aggregate whose every event is one report and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self, TypeAlias

from eventsourcing.domain import BaseAggregate, CanMutateAggregate, MetaDomainEvent
from eventsourcing.utils import register_topic

from domain.statuses import recognise
from domain.transitions import judge

if TYPE_CHECKING:
    from domain.statuses import Status
    from domain.transitions import Leg, Verdict

# Where an order stands, all that judging its next report needs:
# version, received_at, status, leg, status_version, status_since, cnote. A plain tuple of plain values, since
# hundreds of thousands of them are kept, and the garbage collector does not visit such tuples.
Standing: TypeAlias = "tuple[int, datetime, Status | None, Leg | None, int | None, datetime | None, str | None]"

UNHEARD: Final[Standing] = (0, datetime.min.replace(tzinfo=UTC), None, None, None, None, None)


class Report(NamedTuple):
    """What one webhook says of an order, before anything is made of it.

    Attributes:
        report_id: a UUID made on arrival.
        order_no: the order's number, as the sender wrote it.
        reported_status: the status string, as the sender wrote it.
        reported_cnote: the airway bill, None where none came that can be one.
        body: the whole text as received, after decoding.
        occurred_at: the sender's own time, None where it told none that parses.
        remote: the address that the report came from.
        idempotency_key: the sender's key for this report, None where it sent none.
        quarantine_id: the quarantine's entry that it was taken out of, None where it came by itself.
    """

    report_id: str
    order_no: str
    reported_status: str
    reported_cnote: str | None
    body: str
    occurred_at: datetime | None = None
    remote: str | None = None
    idempotency_key: str | None = None
    quarantine_id: int | None = None


class Order(BaseAggregate[str]):
    """An order as its events tell it. Its id is the order number itself."""

    status: Status | None
    leg: Leg | None
    status_version: int | None
    status_since: datetime | None
    cnote: str | None

    @dataclass(frozen=True)
    class Event(CanMutateAggregate[str], metaclass=MetaDomainEvent):
        """An event of an order; the first one finds no order yet and begins with one never heard of."""

        originator_id: str
        originator_version: int
        timestamp: datetime

        def mutate(self, aggregate: Any) -> Any:
            return super().mutate(Order.unheard(self.originator_id) if aggregate is None else aggregate)

    @dataclass(frozen=True)
    class StatusReported(Event):
        """One report, and what was made of it: the immutable record.

        ``timestamp`` is when the report was received. ``status``, ``leg``, ``status_version`` (the version that
        brought that status) and ``cnote`` are the order's after this event, so that the next report can be
        judged from its last event alone. ``recognised`` is what the vocabulary made of the string at that
        time; ``previous_since`` is when the order came into ``previous_status``; ``repeats`` is the version
        whose entry this report merely repeats.
        """

        TOPIC = "order.status_reported"

        report_id: str
        body: str
        reported_status: str
        reported_cnote: str | None
        occurred_at: datetime | None
        remote: str | None
        quarantine_id: int | None
        verdict: Verdict
        recognised: Status | None
        previous_status: Status | None
        previous_since: datetime | None
        status: Status | None
        status_version: int | None
        leg: Leg | None
        cnote: str | None
        skipped: list[Status]
        repeats: int | None
        reason: str | None

        def apply(self, aggregate: Order) -> None:
            """Assign; never judge: a rule here would run again on every replay."""
            aggregate.status = self.status
            aggregate.leg = self.leg
            aggregate.status_version = self.status_version
            aggregate.status_since = self.status_since
            aggregate.cnote = self.cnote

        @property
        def status_since(self) -> datetime | None:
            """When the order came into the status that it has after this event."""
            return self.timestamp if self.verdict == "advanced" else self.previous_since

        @property
        def standing(self) -> Standing:
            """Where the order stands after this event."""
            return (
                self.originator_version,
                self.timestamp,
                self.status,
                self.leg,
                self.status_version,
                self.timestamp if self.verdict == "advanced" else self.previous_since,
                self.cnote,
            )

    @classmethod
    def unheard(cls, order_no: str) -> Self:
        """Return an order that nothing was reported of: version 0."""
        order = cls.__new__(cls)
        version, received_at, *_ = UNHEARD
        order.__base_init__(order_no, version, received_at)
        order.status = order.leg = order.status_version = order.status_since = order.cnote = None
        return order

    @property
    def standing(self) -> Standing:
        """Where the order stands now."""
        return (
            self.version,
            self.modified_on,
            self.status,
            self.leg,
            self.status_version,
            self.status_since,
            self.cnote,
        )

    def report(self, report: Report, received_at: datetime) -> Order.StatusReported:
        """Judge a report and take it into this order's history; it waits in ``pending_events``."""
        event = judge_report(self.standing, report, received_at)
        event.mutate(self)
        self.pending_events.append(event)
        return event


register_topic(Order.StatusReported.TOPIC, Order.StatusReported)


def judge_report(standing: Standing, report: Report, received_at: datetime) -> Order.StatusReported:
    """Decide what one report means for an order that stands as given.

    Args:
        standing: where the order stands, from its last event; UNHEARD where it has none.
        report: what the sender says.
        received_at: when it arrived, in UTC; never recorded as earlier than the order's previous event.
    """
    previous_version, previous_received_at, previous_status, previous_leg, status_version, since, cnote = (
        standing
    )
    version = previous_version + 1
    recognised = recognise(report.reported_status)
    verdict, leg, skipped, reason = judge(previous_status, previous_leg, recognised)
    status = previous_status
    repeats = None
    reported_cnote = report.reported_cnote
    brings_cnote = reported_cnote is not None and reported_cnote != cnote
    if verdict == "advanced":
        status, status_version = recognised, version
    elif verdict == "repeated" and not brings_cnote:
        repeats = status_version
    if brings_cnote and (cnote is None or verdict in ("advanced", "repeated")):
        cnote = reported_cnote
    # As the library makes events that it loads; a frozen dataclass's own __init__ takes four times as long.
    event = object.__new__(Order.StatusReported)
    values = {
        "originator_id": report.order_no,
        "originator_version": version,
        "timestamp": max(received_at, previous_received_at),
        "report_id": report.report_id,
        "body": report.body,
        "reported_status": report.reported_status,
        "reported_cnote": reported_cnote,
        "occurred_at": report.occurred_at,
        "remote": report.remote,
        "quarantine_id": report.quarantine_id,
        "verdict": verdict,
        "recognised": recognised,
        "previous_status": previous_status,
        "previous_since": since,
        "status": status,
        "status_version": status_version,
        "leg": leg,
        "cnote": cnote,
        "skipped": list(skipped),
        "repeats": repeats,
        "reason": reason,
    }
    object.__setattr__(event, "__dict__", values)
    return event
