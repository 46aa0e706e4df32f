"""A shop that subscribes to every event while something breaks, and the account of what it accepted."""

import json
from collections import defaultdict
from typing import Any, Final
from uuid import UUID

import aiohttp

from service.database.connections import connected
from service.features.subscriptions.message import make_message_id
from tests.support.account import Logged, Violations
from tests.support.receiver import Receiver
from tests.support.waiting import until_async

# The service may deliver to this machine.
SETTINGS: Final = {"SUBSCRIPTION_NETWORKS": "127.0.0.0/8"}
CAUGHT_UP: Final = """
    SELECT position >= (SELECT max(notification_id) FROM order_events)
        AND NOT EXISTS (SELECT FROM held_orders), state, state_reason, delivered, failed
    FROM subscriptions
"""
PAUSED: Final = ("paused", "log_went_back")


async def ask(session: aiohttp.ClientSession, method: str, path: str, body: object) -> dict[str, Any]:
    """Send a request until a service accepts it: one may have just been killed."""

    async def send() -> dict[str, Any] | None:
        try:
            async with session.request(method, path, json=body) as response:
                return json.loads(await response.read()) if response.status < 300 else None
        except (aiohttp.ClientError, OSError):
            return None

    result = await until_async(send)
    assert result is not None
    return result


class Shop:
    """The shop.

    Args:
        receiver: its endpoint.
        port: the service's port.
    """

    def __init__(self, receiver: Receiver, port: int) -> None:
        self._receiver = receiver
        self._url = f"http://127.0.0.1:{port}"
        self._path = ""

    async def subscribe(self) -> None:
        """Subscribe to every event from the first one on."""
        body = {"url": self._receiver.url, "verdicts": [], "from_position": 0}
        async with aiohttp.ClientSession(self._url) as session:
            added = await ask(session, "POST", "/subscriptions", body)
        self._path = f"/subscriptions/{added['subscription_id']}"

    async def account(self, dsn: str, log: list[Logged], violations: Violations, *, may_pause: bool) -> str:
        """Compare what the shop accepted with the log, after the last report; return a remark.

        If it accepted an event that the log has lost, the subscription must have paused before another event
        came under the same version. Then it is resumed from the beginning, as an operator does.

        Args:
            dsn: the database.
            log: each event with its position.
            violations: the broken promises.
            may_pause: whether the log may have lost events.
        """
        subscription_id = UUID(self._path.rpartition("/")[2])
        expected = {
            make_message_id(subscription_id, event.report_id): (event.originator_id, event.originator_version)
            for _, event in log
        }
        lost = {one.message_id for one in self._receiver.accepted} - expected.keys()
        remark = f"{len(self._receiver.accepted):,} deliveries, {len(lost)} of them of lost events"
        if lost:
            violations.expect(
                await self._settles(dsn, is_paused=True),
                f"{len(lost)} delivered events are lost, and the subscription is not paused",
            )
            by_place: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
            for one in self._receiver.accepted:
                by_place[one.order_no, one.version].add(one.message_id)
            doubles = [f"{place}" for place, ids in by_place.items() if len(ids) > 1]
            violations.add_wrong("delivered versions that were accepted for another event", doubles)
            self._receiver.accepted.clear()
        else:
            violations.add("deliveries out of order", self._receiver.out_of_order())
        async with aiohttp.ClientSession(self._url) as session:
            if await self._is_paused(dsn):
                violations.expect(may_pause, "the subscription paused, but no event is lost")
                await ask(session, "POST", f"{self._path}/replay", {"from_position": 0})
                await ask(session, "PATCH", self._path, {"state": "active"})
        violations.expect(await self._settles(dsn, is_paused=False), "the subscription did not catch up")
        accepted = {one.message_id: (one.order_no, one.version) for one in self._receiver.accepted}
        violations.add(
            "lost deliveries", sorted(f"{expected[key]}" for key in expected.keys() - accepted.keys())
        )
        violations.add("unknown deliveries", sorted(f"{accepted[key]}" for key in accepted.keys() - expected))
        return remark

    async def _settles(self, dsn: str, *, is_paused: bool) -> bool:
        async def is_settled() -> bool:
            async with connected(dsn) as connection:
                ((is_caught_up, *state, _, _),) = await connection.fetch(CAUGHT_UP)
            return tuple(state) == PAUSED if is_paused else bool(is_caught_up)

        try:
            await until_async(is_settled)
        except AssertionError:
            return False
        return True

    async def _is_paused(self, dsn: str) -> bool:
        async with connected(dsn) as connection:
            ((_, state, _, _, _),) = await connection.fetch(CAUGHT_UP)
        return bool(state == "paused")
