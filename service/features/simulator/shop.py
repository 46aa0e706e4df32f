"""The simulated shop: an endpoint that subscribes to a service, has troubles, and accounts for every event.

It is slow, fails, hangs up, or responds with 500 at given shares. Afterwards it compares what it accepted
with the service's log:

- *lost*: an event of the log that it never accepted.
- *repeated*: an event that it accepted again, which is allowed.
- *out of order*: an event that it accepted before an earlier one of the same order.
- *forged*: a request without a valid signature.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import aiohttp
import orjson
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from service.features.simulator.account import DETAILS_MAX, RecordedEvent, UnreadableLogError

HOST: Final = "127.0.0.1"
PATH: Final = "/orders"
# A slow response, within the time that the service waits.
SLOW_SECONDS: Final = 1.0
REQUEST_SECONDS_MAX: Final = 20.0
# Between two looks at whether everything is delivered. Held orders are retried then, as an operator would.
SETTLE_SECONDS: Final = 0.5


class ShopTroubles(NamedTuple):
    """The shares of requests that the shop answers late, fails, or hangs up on."""

    slow: float = 0.0
    fail: float = 0.0
    hang_up: float = 0.0


class ShopAccount(NamedTuple):
    """What was delivered, and one line for each lost event and each one out of order."""

    delivered: int
    repeated: int
    requests: int
    lost: list[str]
    out_of_order: list[str]
    forged: int

    @property
    def agrees(self) -> bool:
        """Whether every event was delivered, in order, and every request was signed."""
        return not (self.lost or self.out_of_order or self.forged)

    def lines(self) -> Iterable[str]:
        """Yield the account as it is printed."""
        yield f"delivered     {self.delivered:>9,}  events to the shop, in {self.requests:,} requests"
        yield f"repeated      {self.repeated:>9,}"
        for name, details in (("lost", self.lost), ("out of order", self.out_of_order)):
            yield f"{name:<12}  {len(details):>9,}"
            yield from (f"  {detail}" for detail in details[:DETAILS_MAX])
        yield f"forged        {self.forged:>9,}"
        yield "the shop's account agrees" if self.agrees else "THE SHOP'S ACCOUNT DISAGREES"


@dataclass
class Shop:
    """A shop with an endpoint on this machine.

    Attributes:
        session: the HTTP client.
        base: the service's URL, without a slash at its end.
        key: an API key of the scope admin; empty for none.
        troubles: the shares of its troubles.
        seed: the random seed of these.
        accepted: the order and the version of each event that it accepted, in this order.
    """

    session: aiohttp.ClientSession
    base: str
    key: str
    troubles: ShopTroubles
    seed: int = 0
    accepted: list[tuple[str, int]] = field(default_factory=list, init=False)
    _requests: int = field(default=0, init=False)
    _forged: int = field(default=0, init=False)
    _subscription: str = field(default="", init=False)
    _webhook: Webhook | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._random = Random(self.seed)  # noqa: S311 - not a secret  # nosec B311

    @asynccontextmanager
    async def subscribing(self, start: int) -> AsyncIterator[None]:
        """Receive the events of the service above a position until the block ends.

        Raises:
            UnreadableLogError: the service refuses the subscription.
        """
        app = web.Application()
        app.add_routes([web.post(PATH, self._receive)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SLOW_SECONDS)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, 0).start()
            body = {
                "url": f"http://{HOST}:{runner.addresses[0][1]}{PATH}",
                "verdicts": [],
                "from_position": start,
            }
            added = await self._request("POST", "/subscriptions", body)
            self._subscription, self._webhook = added["subscription_id"], Webhook(added["secret"])
            try:
                yield
            finally:
                await self._request("DELETE", f"/subscriptions/{self._subscription}")
        finally:
            await runner.cleanup()

    async def settle(self) -> None:
        """Wait until everything is delivered. Held orders are retried at once instead of by their schedule."""
        path = f"/subscriptions/{self._subscription}"
        while True:
            found = await self._request("GET", path)
            if found["lag_events"] == 0 and found["held_orders"] == 0:
                return
            for held in (await self._request("GET", f"{path}/held?limit=100"))["held"]:
                if held["attempts"]:
                    await self._request("POST", f"{path}/held/{quote(held['order_no'], safe='')}/retry")
            await asyncio.sleep(SETTLE_SECONDS)

    def account(self, events: Iterable[RecordedEvent]) -> ShopAccount:
        """Compare the accepted events with the log since the subscription began."""
        latest: defaultdict[str, int] = defaultdict(int)
        expected = {}
        for event in events:
            latest.setdefault(event.order_no, event.version - 1)
            expected[event.order_no, event.version] = event
        out_of_order = []
        for order_no, version in self.accepted:
            if version > latest[order_no] + 1:
                out_of_order.append(f"{order_no}: version {version} after version {latest[order_no]}")
            latest[order_no] = max(latest[order_no], version)
        accepted = {*self.accepted}
        return ShopAccount(
            delivered=len(accepted),
            repeated=len(self.accepted) - len(accepted),
            requests=self._requests,
            lost=[f"{order_no}: version {version}" for order_no, version in expected.keys() - accepted],
            out_of_order=out_of_order,
            forged=self._forged,
        )

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        self._requests += 1
        try:
            if self._webhook is not None:
                self._webhook.verify(body, dict(request.headers))
        except WebhookVerificationError:
            self._forged += 1
            return web.Response(status=401)
        if self._random.random() < self.troubles.slow:
            await asyncio.sleep(SLOW_SECONDS)
        if self._random.random() < self.troubles.fail:
            return web.Response(status=500, text="the simulated shop failed")
        message = orjson.loads(body)
        if message["type"].startswith("order."):
            self.accepted.append((message["data"]["order_no"], message["data"]["version"]))
        if self._random.random() < self.troubles.hang_up and request.transport is not None:
            # The service does not learn that the event was accepted.
            request.transport.abort()
        return web.Response(status=204)

    async def _request(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS_MAX)
        try:
            async with self.session.request(
                method, self.base + path, json=body, headers=headers, timeout=timeout
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnreadableLogError(f"cannot use the subscriptions of {self.base}: {error}") from None
        # An order that has caught up in the meantime is not held any more.
        if (
            response.status >= web.HTTPBadRequest.status_code
            and response.status != web.HTTPNotFound.status_code
        ):
            detail = orjson.loads(answer).get("detail") if answer else ""
            hint = "pass a key of the scope admin with --key" if response.status in (401, 403) else detail
            raise UnreadableLogError(f"{self.base} refuses the simulated shop ({response.status}): {hint}")
        return orjson.loads(answer) if answer else None
