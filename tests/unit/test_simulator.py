"""The simulated Komerce pushes reports to a server that records every request."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import aiohttp
import orjson
import pytest
from aiohttp import web

from service.features.simulator.lifecycles import Journey, Plan, Push
from service.features.simulator.simulator import IN_FLIGHT_MAX, Registration, Simulator
from service.ingest.signatures import HexScheme, Scheme
from tests.support.waiting import PATIENCE_SECONDS

STARTED = datetime(2026, 11, 24, 14, 2, 6, tzinfo=UTC)
OK, NOT_OK = 200, (500, 404, 204, 302, 201)

Respond = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


class Receiver:
    """A server that receives the pushes.

    ``respond`` receives each request, and how often its body has arrived.
    """

    def __init__(self, respond: Respond) -> None:
        self.requests: list[tuple[str, bytes, str]] = []
        self.in_flight: Counter[str] = Counter()
        self.most_of_an_order = 0
        self.most = 0
        self._respond = respond

    async def receive(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        order_no = orjson.loads(body).get("order_no")
        self.requests.append((request.method, body, request.headers.get("X-Signature", "")))
        self.in_flight[order_no] += 1
        self.most_of_an_order = max(self.most_of_an_order, self.in_flight[order_no])
        self.most = max(self.most, self.in_flight.total())
        try:
            return await self._respond(request, sum(body == other for _, other, _ in self.requests))
        finally:
            self.in_flight[order_no] -= 1


@asynccontextmanager
async def pushing(respond: Respond, **options: float | Scheme) -> AsyncIterator[tuple[Simulator, Receiver]]:
    receiver = Receiver(respond)
    app = web.Application()
    app.router.add_route("*", "/webhook", receiver.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        registration = Registration("", f"http://127.0.0.1:{runner.addresses[0][1]}/webhook")
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_SECONDS):
            yield Simulator(registration, session, **options), receiver  # type: ignore[arg-type]
    finally:
        await runner.cleanup()


async def acknowledge(_request: web.Request, _times: int) -> web.StreamResponse:
    return web.Response()


def journey_of(*pushes: Push) -> Journey:
    return Journey("KOM1", tuple((push,) for push in pushes), 0)


async def test_an_order_has_one_report_in_flight_and_many_orders_have_one() -> None:
    """The reports of an order arrive in sequence; IN_FLIGHT_MAX orders are pushed at the same time."""
    is_full = asyncio.Event()

    async def respond(_request: web.Request, _times: int) -> web.StreamResponse:
        # Respond only when the maximum is in flight.
        if receiver.most >= IN_FLIGHT_MAX:
            is_full.set()
        await is_full.wait()
        return web.Response()

    async with pushing(respond) as (simulator, receiver):
        journeys = list(Plan(1, STARTED).journeys(100))
        await simulator.run(iter(journeys))
    assert (receiver.most_of_an_order, receiver.most) == (1, IN_FLIGHT_MAX)
    for journey in journeys:
        bodies = [body for _, body, _ in receiver.requests if journey.order_no.encode() in body]
        assert bodies == [push.body.encode() for (push,) in journey.turns]
    assert simulator.orders_done == 100
    assert {method for method, _, _ in receiver.requests} == {"PUT", "POST"}


@pytest.mark.parametrize("status", NOT_OK)
async def test_only_200_ends_the_retries_and_each_has_the_same_bytes(status: int) -> None:
    """After any other status the same bytes arrive again, before the next report of the order."""

    async def respond(_request: web.Request, times: int) -> web.StreamResponse:
        headers = {"Location": "/elsewhere"} if status == 302 else None
        return web.Response(status=status if times < 3 else OK, headers=headers)

    first, second = Push('{"order_no":"KOM1","n":1}', "PUT"), Push('{"order_no":"KOM1","n":2}', "POST")
    async with pushing(respond) as (simulator, receiver):
        await simulator.run(iter([journey_of(first, second)]))
    assert [(method, body.decode()) for method, body, _ in receiver.requests] == [
        *[("PUT", first.body)] * 3,
        *[("POST", second.body)] * 3,
    ]
    assert [(one.attempts, len(one.receipts)) for one in simulator.deliveries.values()] == [(3, 1), (3, 1)]
    assert simulator.failures == 4


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_an_attempt_is_counted_whenever_a_request_goes_out(method: str) -> None:
    """The count includes the second PUT that the HTTP client sends by itself after a closed connection."""

    async def respond(request: web.Request, times: int) -> web.StreamResponse:
        if times <= 3:
            assert request.transport is not None
            request.transport.abort()
        return web.Response()

    push = Push('{"order_no":"KOM1"}', method)  # type: ignore[arg-type]
    async with pushing(respond) as (simulator, receiver):
        await simulator.run(iter([journey_of(push)]))
    assert simulator.deliveries[push.body].attempts == len(receiver.requests) == 4


async def test_an_attempt_is_cut_off_and_the_next_one_is_not() -> None:
    """The first attempt ends before its response, the second is acknowledged, and both are counted."""
    arrived_again = asyncio.Event()

    async def respond(_request: web.Request, times: int) -> web.StreamResponse:
        if times == 1:
            await arrived_again.wait()
        arrived_again.set()
        return web.Response(text="receipt")

    push = Push('{"order_no":"KOM1"}', "PUT", patience_seconds=1.0)
    async with pushing(respond) as (simulator, receiver):
        await simulator.run(iter([journey_of(push)]))
    assert len(receiver.requests) == 2
    delivery = simulator.deliveries[push.body]
    assert (delivery.attempts, delivery.receipts, delivery.is_given_up) == (2, [b"receipt"], False)


async def test_the_rate_is_not_exceeded() -> None:
    """The reports take at least their number divided by the rate, even if the responses are fast."""
    async with pushing(acknowledge, rate=200.0) as (simulator, receiver):
        began = time.monotonic()
        await simulator.run(Plan(1, STARTED).journeys(10))
        assert time.monotonic() - began >= len(receiver.requests) / 200.0


async def test_a_push_is_signed_if_a_secret_is_set() -> None:
    """The signature is the hex HMAC-SHA256 of the body, here computed by another program."""
    push = Push('{"order_no":"KOM1"}', "PUT")
    async with pushing(acknowledge, scheme=HexScheme(b"key", "X-Signature")) as (simulator, receiver):
        await simulator.run(iter([journey_of(push)]))
    assert [signature for _, _, signature in receiver.requests] == [
        "53266accbe263586c1cc9c644e29591b476aafdc6d984e8ca747473952cb910a"
    ]
