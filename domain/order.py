"""The order: its state, the decision on each report, and the aggregate that is built from both.

``decide`` and ``evolve`` follow the decider pattern: the service judges a report from its order's last event
alone. ``Order`` is an aggregate of the eventsourcing library and folds all of an order's events. Tests check
that both give the same results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from eventsourcing.domain import BaseAggregate, CanMutateAggregate, MetaDomainEvent
from eventsourcing.utils import register_topic

from domain.statuses import STANDARD_VOCABULARY
from domain.transitions import judge

if TYPE_CHECKING:
    from domain.statuses import Recognise, Status
    from domain.transitions import Leg, Verdict


# The reason why a rejudgement changed nothing, although the table would let it advance the order.
OVERTAKEN: Final = "{reported} was reported before {status}, which the order has reached since"


class Arrival(NamedTuple):
    """The arrival of one webhook.

    Attributes:
        report_id: a new UUID; it identifies the report in its event, its receipt and the logs.
        received_at: the time of arrival, in UTC.
        remote: the sender's IP address, None if unknown.
        token_name: the name of the token that the sender used, None if it has none.
        imported_at: when an operator imported the report; then ``received_at`` is the time that the operator
            gave. None for a webhook.
        traceparent: the sender's trace (W3C Trace Context), None if it sent none.
    """

    report_id: str
    received_at: datetime
    remote: str | None = None
    token_name: str | None = None
    imported_at: datetime | None = None
    traceparent: str | None = None


class EarlierReport(NamedTuple):
    """An unrecognised report of an order, which another one judges again.

    Attributes:
        version: the version of its event.
        received_at: when it arrived.
    """

    version: int
    received_at: datetime


class Report(NamedTuple):
    """The content of one webhook, not yet judged.

    Attributes:
        arrival: when and from where it arrived.
        order_no: the order number, as the sender wrote it.
        reported_status: the status string, as the sender wrote it.
        reported_cnote: the airway bill, None if absent or invalid.
        body: the whole body as decoded text.
        occurred_at: the sender's own time, None if absent or invalid.
        quarantine_id: the quarantined body that this report was retried from, else None.
        rejudges: the report that is judged again by this one, else None.
    """

    arrival: Arrival
    order_no: str
    reported_status: str
    reported_cnote: str | None
    body: str
    occurred_at: datetime | None = None
    quarantine_id: int | None = None
    rejudges: EarlierReport | None = None

    def is_overtaken(self, state: OrderState) -> bool:
        """Return whether a later report than the one that is judged again has brought the order's status."""
        return (
            self.rejudges is not None
            and state.status_version is not None
            and state.status_version > self.rejudges.version
            and (state.status_since is None or state.status_since >= self.rejudges.received_at)
        )


class OrderState(NamedTuple):
    """An order's state after one of its events: all values that the decision on the next report needs.

    Attributes:
        version: the number of events; 0 before the first.
        received_at: when the last report was received.
        status: the current status, None before the first report that advanced it.
        leg: the leg of the journey on which the order's problem arose, None unless its status is problem.
        status_version: the version of the event that set the status.
        status_since: when the order reached the status.
        cnote: the current airway bill.
    """

    version: int
    received_at: datetime
    status: Status | None
    leg: Leg | None
    status_version: int | None
    status_since: datetime | None
    cnote: str | None


NEW_ORDER: Final = OrderState(0, datetime.min.replace(tzinfo=UTC), None, None, None, None, None)


class Order(BaseAggregate[str]):
    """An order as an aggregate of the eventsourcing library. Its id is the order number."""

    state: OrderState

    @dataclass(frozen=True)
    class Event(CanMutateAggregate[str], metaclass=MetaDomainEvent):
        """An event of an order. The first event is applied to a new order of version 0."""

        originator_id: str
        originator_version: int
        timestamp: datetime

        def mutate(self, aggregate: Any) -> Any:
            return super().mutate(Order.new(self.originator_id) if aggregate is None else aggregate)

    @dataclass(frozen=True)
    class StatusReported(Event):
        """One report and its verdict: the immutable record.

        ``timestamp`` is the time of arrival. ``status``, ``leg``, ``status_version`` and ``cnote`` are the
        order's values after this event. ``recognised`` is the status that the reported string meant when it
        was judged. ``previous_since`` is when the order reached ``previous_status``. ``repeats`` is the
        version of the timeline entry that this report repeats. ``rejudges`` is the version of the report that
        an operator had judged again, after its word had become known; such an event is not a report of its
        own. ``reported_at`` is when that report arrived, and so when the order reached the status.
        ``traceparent`` is the sender's trace.

        A member with a default was added after the first release. An event has it only if its value differs, so
        that events of every release have the same bytes.
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
        token_name: str | None = field(default=None, kw_only=True)
        rejudges: int | None = field(default=None, kw_only=True)
        imported_at: datetime | None = field(default=None, kw_only=True)
        reported_at: datetime | None = field(default=None, kw_only=True)
        traceparent: str | None = field(default=None, kw_only=True)

        @property
        def reached_at(self) -> datetime:
            """When the order reached the status, if the verdict is advanced."""
            return self.reported_at or self.timestamp

        @property
        def rejudged_report(self) -> EarlierReport | None:
            """The report that this event judges again, None if it judges its own."""
            return None if self.rejudges is None else EarlierReport(self.rejudges, self.reached_at)

        @classmethod
        def from_fields(cls, fields: dict[str, Any]) -> Self:
            """Return an event with these fields. Every field without a default must be present.

            The library builds the events that it loads in the same way. A frozen dataclass's own ``__init__``
            takes four times as long.
            """
            event = object.__new__(cls)
            object.__setattr__(event, "__dict__", fields)
            return event

        def apply(self, aggregate: Order) -> None:
            """Set the state after this event. A rule here would run again on every replay: see ``decide``."""
            aggregate.state = evolve(aggregate.state, self)

    @classmethod
    def new(cls, order_no: str) -> Self:
        """Return an order without any report: version 0."""
        order = cls.__new__(cls)
        order.__base_init__(order_no, NEW_ORDER.version, NEW_ORDER.received_at)
        order.state = NEW_ORDER
        return order

    def report(
        self, report: Report, recognise: Recognise = STANDARD_VOCABULARY.recognise
    ) -> Order.StatusReported:
        """Decide on a report, apply the event, and add it to ``pending_events``."""
        event = decide(self.state, report, recognise)
        event.mutate(self)
        self.pending_events.append(event)
        return event


register_topic(Order.StatusReported.TOPIC, Order.StatusReported)


def decide(
    state: OrderState, report: Report, recognise: Recognise = STANDARD_VOCABULARY.recognise
) -> Order.StatusReported:
    """Judge one report by the transition table and return the event that records it.

    Args:
        state: the order's state after its last event; NEW_ORDER if it has none.
        report: the report. If it arrived before the order's last report, that report's time is recorded.
        recognise: the vocabulary; by default the words of this release alone.
    """
    recognised = recognise(report.reported_status)
    verdict, leg, skipped, reason = judge(state.status, state.leg, recognised)
    if verdict == "advanced" and report.is_overtaken(state):
        verdict, leg, skipped = "late", state.leg, ()
        reason = OVERTAKEN.format(reported=recognised, status=state.status)
    version = state.version + 1
    is_new_cnote = report.reported_cnote is not None and report.reported_cnote != state.cnote
    status, status_version, repeats, cnote = state.status, state.status_version, None, state.cnote
    if verdict == "advanced":
        status, status_version = recognised, version
    elif verdict == "repeated" and not is_new_cnote and report.rejudges is None:
        repeats = state.status_version
    if is_new_cnote and (state.cnote is None or verdict in ("advanced", "repeated")):
        cnote = report.reported_cnote
    fields: dict[str, Any] = {
        "originator_id": report.order_no,
        "originator_version": version,
        "timestamp": max(report.arrival.received_at, state.received_at),
        "report_id": report.arrival.report_id,
        "body": report.body,
        "reported_status": report.reported_status,
        "reported_cnote": report.reported_cnote,
        "occurred_at": report.occurred_at,
        "remote": report.arrival.remote,
        "quarantine_id": report.quarantine_id,
        "verdict": verdict,
        "recognised": recognised,
        "previous_status": state.status,
        "previous_since": state.status_since,
        "status": status,
        "status_version": status_version,
        "leg": leg,
        "cnote": cnote,
        "skipped": list(skipped),
        "repeats": repeats,
        "reason": reason,
    }
    if report.arrival.token_name is not None:
        fields["token_name"] = report.arrival.token_name
    if report.rejudges is not None:
        fields["rejudges"], fields["reported_at"] = report.rejudges
    if report.arrival.imported_at is not None:
        fields["imported_at"] = report.arrival.imported_at
    if report.arrival.traceparent is not None:
        fields["traceparent"] = report.arrival.traceparent
    return Order.StatusReported.from_fields(fields)


def evolve(_state: OrderState, event: Order.StatusReported) -> OrderState:
    """Return an order's state after an event.

    Each event holds the whole state after it, so the state before is ignored. A report is therefore judged from
    its order's last event alone, and a long history costs nothing.
    """
    return OrderState(
        event.originator_version,
        event.timestamp,
        event.status,
        event.leg,
        event.status_version,
        event.reached_at if event.verdict == "advanced" else event.previous_since,
        event.cnote,
    )
