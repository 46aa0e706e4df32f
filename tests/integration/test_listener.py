"""The port of a starting service: requests that arrive early are served by it, or refused in time."""

import asyncio
import socket
from contextlib import AsyncExitStack

import aiohttp
import pytest

from service.features.settings import Settings
from service.listening import Listener, listening
from service.version import build_info
from tests.support.client import Client
from tests.support.waiting import condition, until_async

BODY = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
# Longer than any test.
FOREVER = 60.0


def client_of(listener: Listener, session: aiohttp.ClientSession) -> Client:
    assert listener.port is not None
    return Client(session, listener.port)


async def test_requests_wait_for_a_service_that_starts(dsn: str) -> None:
    """A webhook and a stream that arrive before the service is ready are served as soon as it is."""
    settings = Settings(port=0, request_seconds_max=FOREVER)
    async with listening(settings, dsn) as listener, aiohttp.ClientSession() as session:
        client = client_of(listener, session)
        sent = asyncio.create_task(client.raw(BODY, Expect="100-continue"))
        # Each of these has a variable in its path.
        paths = ("/static/mark.svg", "/problems/unknown-order", "/orders/KOM2")
        others = [asyncio.create_task(client.status("GET", path)) for path in (*paths, "/nonsense")]
        await until_async(condition(lambda: listener.budgets.connections.held >= 1 + len(others)))
        assert await client.get("/livez") == {"status": "alive", **build_info()}
        assert (await client.get("/readyz", status=503))["cause"] == "no_answer"
        assert not sent.done()
        async with listener.serving(await listener.start_service(lambda _: None)):
            assert (await sent)["version"] == 1
            assert await asyncio.gather(*others) == [200, 200, 404, 404]
            assert await client.get("/readyz") == {"status": "ready"}
            assert (await client.get("/orders/KOM1?after_position=1"))["status"] == "in_transit"


async def test_a_wait_is_limited_and_refusals_are_counted(dsn: str) -> None:
    """A request that waits too long gets 503. A refused webhook is in the metrics once the service is ready."""
    settings = Settings(port=0, request_seconds_max=0.01)
    async with listening(settings, dsn) as listener, aiohttp.ClientSession() as session:
        client = client_of(listener, session)
        assert await client.status("PUT", "/webhook/token", BODY) == 503
        _, headers = await client.get_with_headers("/orders", status=503)
        assert headers["Retry-After"] == "2"
    settings = Settings(port=0)
    async with listening(settings, dsn) as other, aiohttp.ClientSession() as session:
        other.waiting.refused.update(listener.waiting.refused)
        async with other.serving(await other.start_service(lambda _: None)):
            assert 'webhook_refusals_total{cause="no_answer"} 1.0' in await client_of(other, session).text(
                "/metrics"
            )


async def test_the_end_of_the_process_answers_waiting_requests(dsn: str) -> None:
    """If the process ends before the service is ready, requests that wait get 503 at once."""
    settings = Settings(port=0, request_seconds_max=FOREVER)
    async with aiohttp.ClientSession() as session:
        async with listening(settings, dsn) as listener:
            sent = asyncio.create_task(client_of(listener, session).status("PUT", "/webhook", BODY))
            await until_async(condition(lambda: listener.budgets.connections.held == 1))
            await client_of(listener, session).get("/livez")
        assert await sent == 503


async def test_a_server_that_drains_serves_each_client_once_more(dsn: str) -> None:
    """A connection that waits for its next request gets the response, which announces the end. The server
    accepts no other connection, and is drained when the last one is closed.
    """
    settings = Settings(port=0, reuse_port=True)
    async with (
        listening(settings, dsn) as listener,
        aiohttp.ClientSession() as session,
        AsyncExitStack() as stack,
    ):
        service = await listener.start_service(lambda _: None)
        url = f"http://127.0.0.1:{await stack.enter_async_context(listener.serving(service))}/livez"
        async with session.get(url) as response:
            assert "Connection" not in response.headers
        draining = asyncio.create_task(stack.aclose())
        await until_async(condition(lambda: service.core.events.tail.is_ended))
        async with session.get(url) as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        await draining
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(url)


async def test_a_service_that_inherits_its_port_responds_in_time(dsn: str) -> None:
    """It listens when it is ready. If that takes long, its clients learn why, and it is served later."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        settings = Settings(port=0, request_seconds_max=FOREVER)
        async with (
            listening(settings, dsn, [bound], silent_seconds_max=0.1) as listener,
            aiohttp.ClientSession() as session,
        ):
            assert listener.port is None
            async with session.get(f"{url}/readyz") as response:
                assert response.status == 503
            async with (
                listener.serving(await listener.start_service(lambda _: None)),
                session.get(f"{url}/readyz") as response,
            ):
                assert response.status == 200
        # The socket stays open, and the next service accepts what waits.
        async with listening(settings, dsn, [bound]) as listener, aiohttp.ClientSession() as session:
            waiting = asyncio.create_task(session.get(f"{url}/readyz"))
            async with (
                listener.serving(await listener.start_service(lambda _: None)),
                await waiting as response,
            ):
                assert response.status == 200
