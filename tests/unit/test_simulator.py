"""How the simulated Komerce pushes, seen from a server that notes whatever it is sent."""

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

from service.simulator.lifecycles import Journey, Plan, Push
from service.simulator.simulator import IN_FLIGHT_MAX, Registration, Simulator
from tests.support.waiting import PATIENCE_SECONDS

STARTED = datetime(2026, 11, 24, 14, 2, 6, tzinfo=UTC)
OK, NOT_OK = 200, (500, 404, 204, 302, 201)

Answering = Callable[[web.Request, int], Awaitable[web.StreamResponse]]


class Receiver:
    """A server at the end of the pushes. ``answer`` is told how often this body has come."""

    def __init__(self, answer: Answering) -> None:
        self.requests: list[tuple[str, bytes, str]] = []
        self.in_flight: Counter[str] = Counter()
        self.most_of_an_order = 0
        self.most = 0
        self._answer = answer

    async def receive(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        order_no = orjson.loads(body).get("order_no")
        self.requests.append((request.method, body, request.headers.get("X-Signature", "")))
        self.in_flight[order_no] += 1
        self.most_of_an_order = max(self.most_of_an_order, self.in_flight[order_no])
        self.most = max(self.most, self.in_flight.total())
        try:
            return await self._answer(request, sum(body == sent for _, sent, _ in self.requests))
        finally:
            self.in_flight[order_no] -= 1


@asynccontextmanager
async def pushing(
    answer: Answering, **options: float | bytes | str
) -> AsyncIterator[tuple[Simulator, Receiver]]:
    receiver = Receiver(answer)
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


def one(*pushes: Push) -> Journey:
    return Journey("KOM1", tuple((push,) for push in pushes), 0)


async def test_of_one_order_one_report_is_on_its_way_and_many_orders_are() -> None:
    """Each order in its own order; together as many as the limit allows, and never more."""
    is_full = asyncio.Event()

    async def answer(_request: web.Request, _times: int) -> web.StreamResponse:
        # Nothing is answered before as many are on their way as may be.
        if receiver.most >= IN_FLIGHT_MAX:
            is_full.set()
        await is_full.wait()
        return web.Response()

    async with pushing(answer) as (simulator, receiver):
        journeys = list(Plan(1, STARTED).journeys(100))
        await simulator.run(iter(journeys))
    assert (receiver.most_of_an_order, receiver.most) == (1, IN_FLIGHT_MAX)
    for journey in journeys:
        came = [body for _, body, _ in receiver.requests if journey.order_no.encode() in body]
        assert came == [push.body.encode() for (push,) in journey.turns]
    assert simulator.orders_told == 100
    assert {method for method, _, _ in receiver.requests} == {"PUT", "POST"}


@pytest.mark.parametrize("status", NOT_OK)
async def test_only_200_ends_the_retries_and_each_has_the_same_bytes(status: int) -> None:
    """Whatever else is answered, the very same report comes again, before the order's next one."""

    async def answer(_request: web.Request, times: int) -> web.StreamResponse:
        headers = {"Location": "/elsewhere"} if status == 302 else None
        return web.Response(status=status if times < 3 else OK, headers=headers)

    first, second = Push('{"order_no":"KOM1","n":1}', "PUT"), Push('{"order_no":"KOM1","n":2}', "POST")
    async with pushing(answer) as (simulator, receiver):
        await simulator.run(iter([one(first, second)]))
    assert [(method, body.decode()) for method, body, _ in receiver.requests] == [
        *[("PUT", first.body)] * 3,
        *[("POST", second.body)] * 3,
    ]
    assert [(sent.attempts, len(sent.receipts)) for sent in simulator.sent.values()] == [(3, 1), (3, 1)]
    assert simulator.refusals == 4


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_an_attempt_is_counted_whenever_a_request_goes_out(method: str) -> None:
    """Also where the HTTP client sends a PUT a second time by itself, since the connection was closed."""

    async def answer(request: web.Request, times: int) -> web.StreamResponse:
        if times <= 3:
            assert request.transport is not None
            request.transport.abort()
        return web.Response()

    push = Push('{"order_no":"KOM1"}', method)  # type: ignore[arg-type]
    async with pushing(answer) as (simulator, receiver):
        await simulator.run(iter([one(push)]))
    assert simulator.sent[push.body].attempts == len(receiver.requests) == 4


async def test_a_hasty_attempt_is_hung_up_and_the_next_is_waited_for() -> None:
    """The first is gone before its answer, the second is acknowledged; both are counted."""
    came_again = asyncio.Event()

    async def answer(_request: web.Request, times: int) -> web.StreamResponse:
        if times == 1:
            await came_again.wait()
        came_again.set()
        return web.Response(text="receipt")

    push = Push('{"order_no":"KOM1"}', "PUT", patience_seconds=1.0)
    async with pushing(answer) as (simulator, receiver):
        await simulator.run(iter([one(push)]))
    assert len(receiver.requests) == 2
    sent = simulator.sent[push.body]
    assert (sent.attempts, sent.receipts, sent.is_given_up) == (2, [b"receipt"], False)


async def test_the_rate_is_not_exceeded() -> None:
    """However fast the responses come, reports take as long as their rate has them take."""
    async with pushing(acknowledge, rate=200.0) as (simulator, receiver):
        began = time.monotonic()
        await simulator.run(Plan(1, STARTED).journeys(10))
        assert time.monotonic() - began >= len(receiver.requests) / 200.0


async def test_what_is_sent_is_signed_where_a_secret_is_set() -> None:
    """By the hex HMAC-SHA256 of the very bytes, here as another program makes it."""
    push = Push('{"order_no":"KOM1"}', "PUT")
    options: dict[str, bytes | str] = {"secret": b"key", "signature_header": "X-Signature"}
    async with pushing(acknowledge, **options) as (simulator, receiver):
        await simulator.run(iter([one(push)]))
    assert [signature for _, _, signature in receiver.requests] == [
        "53266accbe263586c1cc9c644e29591b476aafdc6d984e8ca747473952cb910a"
    ]
