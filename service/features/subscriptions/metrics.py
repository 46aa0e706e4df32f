"""The metrics of subscriptions."""

from collections.abc import Mapping
from functools import partial
from typing import Final
from uuid import UUID

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from projections.postgres import Connection
from service.features.subscriptions.sending import AttemptOutcome
from service.features.subscriptions.subscription import list_subscriptions

_by_subscription: Final = partial(GaugeMetricFamily, labels=["subscription"])


def measure(outcomes: Mapping[tuple[UUID, AttemptOutcome], int]) -> list[Metric]:
    """Return the attempts of this process, by subscription and outcome."""
    attempts = CounterMetricFamily(
        "subscription_deliveries", "Attempts to deliver, by outcome.", labels=["subscription", "outcome"]
    )
    for (subscription_id, outcome), count in outcomes.items():
        attempts.add_metric([str(subscription_id), outcome], count)
    return [attempts]


async def read_metrics(connection: Connection) -> list[Metric]:
    """Return the gauges of the subscriptions, which all processes share."""
    events = _by_subscription("subscription_lag_events", "Events above a subscription's position.")
    seconds = _by_subscription("subscription_lag_seconds", "Age of the oldest of these events.")
    held = _by_subscription("subscription_held_orders", "Orders with an undelivered event.")
    stopped = _by_subscription("subscription_stopped", "1 if a subscription ended without an operator.")
    for one in await list_subscriptions(connection):
        labels = [str(one["subscription_id"])]
        events.add_metric(labels, one["lag_events"])
        seconds.add_metric(labels, one["lag_seconds"])
        held.add_metric(labels, one["held_orders"])
        stopped.add_metric(labels, one["state"] != "active" and one["reason"] != "operator")
    return [events, seconds, held, stopped]
