"""A shop's endpoint for tests: it records each request, and responds as a test chooses."""

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

from tests.support.waiting import condition, until_async


class Received(NamedTuple):
    """A request: itself, its headers, its raw body, and the parsed one."""

    request: web.Request
    headers: dict[str, str]
    raw: bytes
    message: dict[str, Any]

    @property
    def message_id(self) -> str:
        """The id of the message."""
        return self.headers["webhook-id"]

    @property
    def order_no(self) -> str:
        """The order of the message, empty for a test."""
        return str(self.message["data"].get("order_no", ""))

    @property
    def version(self) -> int:
        """The version of the message's event."""
        return int(self.message["data"]["version"])


# Called with a request. Returns the response, which also decides whether the request counts as delivered.
Respond = Callable[[Received], Awaitable[web.StreamResponse]]


async def accept(_received: Received) -> web.StreamResponse:
    """Accept a request."""
    return web.Response(status=204)


class Receiver:
    """The endpoint.

    Attributes:
        url: its URL.
        requests: every request, also those that were not accepted.
        accepted: the requests that were answered with 2xx.
        respond: how it responds.
        in_flight_max: the most requests that it handled at once.
        in_flight_of_order_max: the same, of one order.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Received] = []
        self.accepted: list[Received] = []
        self.respond: Respond = accept
        self.in_flight_max = 0
        self.in_flight_of_order_max = 0
        self._in_flight: Counter[str] = Counter()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Handle a request."""
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        received = Received(request, headers, raw, json.loads(raw))
        self.requests.append(received)
        self._in_flight[received.order_no] += 1
        self.in_flight_max = max(self.in_flight_max, self._in_flight.total())
        self.in_flight_of_order_max = max(self.in_flight_of_order_max, self._in_flight[received.order_no])
        try:
            response = await self.respond(received)
        finally:
            self._in_flight[received.order_no] -= 1
        if 200 <= response.status < 300:
            self.accepted.append(received)
        return response

    async def wait_for(self, count: int) -> list[Received]:
        """Wait until so many requests were accepted, and return all accepted ones."""
        await until_async(condition(lambda: len(self.accepted) >= count), self.summary)
        return self.accepted

    async def wait_for_requests(self, count: int) -> list[Received]:
        """Wait until so many requests have arrived, and return all of them."""
        await until_async(condition(lambda: len(self.requests) >= count), self.summary)
        return self.requests

    def summary(self) -> str:
        """Describe what has arrived, for a failing test."""
        return f"{len(self.requests)} requests, {len(self.accepted)} accepted"

    def places(self) -> list[tuple[str, int]]:
        """Return the order and the version of each accepted request."""
        return [(one.order_no, one.version) for one in self.accepted]

    def out_of_order(self) -> list[str]:
        """Return the accepted events that came before an earlier one of their order had ever been accepted."""
        latest: defaultdict[str, int] = defaultdict(int)
        faults = []
        for order_no, version in self.places():
            if version > latest[order_no] + 1:
                faults.append(f"{order_no}: version {version} after {latest[order_no]}")
            latest[order_no] = max(latest[order_no], version)
        return faults


def is_signed(received: Received, secret: str) -> bool:
    """Return whether a request has a valid signature with a secret."""
    try:
        Webhook(secret).verify(received.raw, received.headers)
    except WebhookVerificationError:
        return False
    return True


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Run an endpoint on a free port of this machine for the length of the block."""
    receiver = Receiver()
    app = web.Application(client_max_size=4 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
        yield receiver
    finally:
        await runner.cleanup()


def troubled(chance: random.Random, share: float) -> Respond:
    """Return a response function that fails a share of the requests, each in one of four ways."""

    async def respond(received: Received) -> web.StreamResponse:
        if chance.random() >= share:
            return web.Response(status=200)
        trouble = chance.randrange(4)
        if trouble == 0:
            return web.Response(status=500, text="out of order")
        if trouble == 1:
            return web.Response(status=429, headers={"Retry-After": "1"})
        # The sender does not learn whether the event was accepted.
        if received.request.transport is not None:
            received.request.transport.abort()
        return web.Response(status=200 if trouble == 2 else 500)

    return respond


async def hang(_received: Received) -> web.StreamResponse:
    """Never respond."""
    await asyncio.Event().wait()
    raise AssertionError
