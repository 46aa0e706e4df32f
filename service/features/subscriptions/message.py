"""Messages: what a subscription sends for an event, and under which id."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple, NotRequired
from uuid import UUID, uuid5

import orjson
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.order import Order
from domain.statuses import Label, Status, status_label
from domain.transitions import Verdict
from service.features.subscriptions.subscription import Declaration

_OPTIONS: Final = orjson.OPT_UTC_Z


class OrderData(TypedDict):
    """An event, and its order after it.

    ``verdict``, ``skipped`` and ``reason`` are the judgement on the report, ``reported_status`` is the sender's
    word. ``version`` is the number of the event within its order. ``body`` is the report's whole body; only a
    subscription that includes it gets it.
    """

    order_no: str
    cnote: str | None
    status: Status | None
    status_label: Label | None
    previous_status: Status | None
    version: int
    position: int
    verdict: Verdict
    reported_status: str
    skipped: list[Status]
    reason: str | None
    received_at: datetime
    occurred_at: datetime | None
    body: NotRequired[str]


class OrderMessage(TypedDict):
    """The body of a request for an event. ``type`` is ``order.`` and the verdict.

    ``timestamp`` is when the report was received.
    """

    type: str
    timestamp: datetime
    data: OrderData


class TestData(TypedDict):
    """What a test request is about."""

    subscription_id: UUID


class TestMessage(TypedDict):
    """The body of a test request, which carries no order."""

    type: Literal["subscription.test"]
    timestamp: datetime
    data: TestData


class Selection(NamedTuple):
    """Which events a subscription sends, and with what.

    Attributes:
        verdicts: the verdicts; empty for all.
        statuses: the orders' statuses after the event; empty for all.
        with_body: whether a message has the report's body.
    """

    verdicts: Collection[Verdict]
    statuses: Collection[Status]
    with_body: bool

    @classmethod
    def of(cls, declaration: Declaration) -> "Selection":
        """Return the selection that an operator has declared."""
        return cls(
            frozenset(declaration.verdicts), frozenset(declaration.statuses), "body" in declaration.include
        )

    def matches(self, event: Order.StatusReported) -> bool:
        """Return whether the subscription sends an event."""
        return (not self.verdicts or event.verdict in self.verdicts) and (
            not self.statuses or event.status in self.statuses
        )

    def encode(self, position: int, event: Order.StatusReported) -> bytes:
        """Return the body of the request for an event. It is the same at each attempt."""
        data: OrderData = {
            "order_no": event.originator_id,
            "cnote": event.cnote,
            "status": event.status,
            "status_label": status_label(event.status),
            "previous_status": event.previous_status,
            "version": event.originator_version,
            "position": position,
            "verdict": event.verdict,
            "reported_status": event.reported_status,
            "skipped": event.skipped,
            "reason": event.reason,
            "received_at": event.timestamp,
            "occurred_at": event.occurred_at,
        }
        if self.with_body:
            data["body"] = event.body
        message: OrderMessage = {"type": f"order.{event.verdict}", "timestamp": event.timestamp, "data": data}
        return orjson.dumps(message, option=_OPTIONS)


def make_message_id(subscription_id: UUID, report_id: str) -> str:
    """Return the ``webhook-id`` of a report's event: the same at each attempt and at each replay."""
    return f"msg_{uuid5(subscription_id, report_id)}"


def encode_test(subscription_id: UUID) -> bytes:
    """Return the body of a test request."""
    message: TestMessage = {
        "type": "subscription.test",
        "timestamp": datetime.now(UTC),
        "data": {"subscription_id": subscription_id},
    }
    return orjson.dumps(message, option=_OPTIONS)


def describe(words: Sequence[str]) -> str:
    """Return a filter's words as text; an empty filter lets everything pass."""
    return ", ".join(words) or "all"
