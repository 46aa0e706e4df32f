"""The findings of ``check``: whether subscriptions deliver."""

from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any, Final

from projections.postgres import Connection
from service.features.subscriptions.held_orders import HELD_ORDERS_MAX
from service.features.subscriptions.settings import SubscriptionsSettings
from service.maintenance.check import Finding

SUBSCRIPTIONS: Final = """
    SELECT subscription_id::text AS id, state, state_reason AS reason, down_since,
        count(held_id) AS held,
        count(held_id) FILTER (
            WHERE next_attempt_at IS NULL AND NOT retry_requested AND skip_version IS NULL
        ) AS awaiting
    FROM public.subscriptions LEFT JOIN public.held_orders USING (subscription_id)
    GROUP BY subscription_id ORDER BY created_at, subscription_id
"""


async def check(
    connection: Connection, _settings: SubscriptionsSettings, _options: Collection[str]
) -> AsyncIterator[Finding]:
    """Check that subscriptions deliver."""
    rows = await connection.fetch(SUBSCRIPTIONS)
    findings = [finding for row in rows for finding in _check_one(row)]
    for finding in findings:
        yield finding
    if rows and not findings:
        yield Finding("ok", f"all subscriptions deliver: {len(rows)}")


def _check_one(row: Any) -> Iterator[Finding]:
    name = f"the subscription {row['id']}"
    act = f"see 'order-tracking subscriptions show {row['id']}'"
    if row["state"] != "active" and row["reason"] != "operator":
        yield Finding("WRONG", f"{name} has stopped by itself ({row['reason']}): {act}")
    elif row["state"] == "active" and row["down_since"] is not None:
        yield Finding(
            "note", f"the endpoint of {name} accepts nothing since {row['down_since']:%F %T} UTC: {act}"
        )
    if row["held"] >= HELD_ORDERS_MAX:
        held = f"holds {row['held']:,} orders and reads no further event"
        yield Finding("WRONG", f"{name} {held}: retry or skip some; {act}")
    elif row["awaiting"]:
        yield Finding("note", f"{name} has held orders that await you: {row['awaiting']}; {act}")
