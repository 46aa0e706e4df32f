"""Budgets: what an address, a key and a report may hold at once."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_network

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.database import api_keys
from service.database.connections import POOL_CONNECTIONS_PER_KEY_MAX
from service.http import budgets
from service.http.addresses import Network
from service.http.budgets import Budget, Budgets, OverBudgetError
from service.http.server import HttpServer
from tests.support.client import Client, serving_client
from tests.support.databases import wait_for_locked
from tests.support.waiting import until_async

# More than the kernel's buffers and aiohttp's queue of one connection hold.
PIPELINED_BYTES_MAX = 8 * 1024 * 1024
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def greet(_request: web.BaseRequest) -> web.Response:
    return web.Response(text="hello")


@asynccontextmanager
async def server_of_strangers(maximum: int, *exempt: Network) -> AsyncIterator[tuple[int, Budget]]:
    """Run a server to which even loopback addresses are strangers, and yield its port and its budget."""
    every = Budgets()
    budget = every.connections = Budget("connections", "connections", maximum, 3)
    server = HttpServer(
        greet, 1, "0.0.0.0", 0, reuse_port=False, on_response=lambda *_: None, budgets=every, exempt=exempt  # noqa: S104
    )  # fmt: skip
    try:
        yield await server.start(), budget
    finally:
        await server.stop()
    assert budget.held == 0


async def connected_from(address: str, port: int) -> Stream:
    """Open a connection from a loopback address."""
    return await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))


async def is_served(stream: Stream) -> bool:
    """Return whether a request on a connection gets its response."""
    reader, writer = stream
    try:
        writer.write(REQUEST)
        return (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    except (ConnectionError, asyncio.IncompleteReadError):
        return False
    finally:
        if reader.at_eof():
            writer.close()


@pytest.mark.attacks("idle", "address")
async def test_an_address_has_a_share_of_the_connections() -> None:
    """One address can neither hold more than its share, nor keep another address out."""
    async with server_of_strangers(100) as (port, budget):
        greedy = [await connected_from("127.0.0.2", port) for _ in range(3)]
        assert all([await is_served(stream) for stream in greedy])
        # Its longest idle connections give way to its own new ones.
        greedy += [await connected_from("127.0.0.2", port) for _ in range(2)]
        served = [await is_served(stream) for stream in (*greedy[3:], *greedy[:3])]
        assert served == [True, True, False, False, True]
        assert budget.refusals == 2
        other = await connected_from("127.0.0.3", port)
        assert await is_served(other)
        # A place that was left is free again.
        greedy[4][1].close()
        await until_async(partial(_holds, budget, 3))
        again = await connected_from("127.0.0.2", port)
        assert await is_served(again)
        for _, writer in (*greedy, other, again):
            writer.close()


async def _holds(budget: Budget, count: int) -> bool:
    return budget.held == count


async def test_this_machine_and_the_proxies_have_no_share() -> None:
    """A proxy brings the connections of all its callers, so only the total limits its own."""
    async with server_of_strangers(100, ip_network("127.0.0.0/30")) as (port, _):
        streams = [await connected_from("127.0.0.2", port) for _ in range(10)]
        assert all([await is_served(stream) for stream in streams])
        for _, writer in streams:
            writer.close()


@pytest.mark.attacks("idle", "all")
async def test_the_longest_idle_stranger_gives_way() -> None:
    """If there are too many connections, the longest idle one of a stranger is closed first."""
    async with server_of_strangers(3, ip_network("127.0.0.9")) as (port, budget):
        proxy = await connected_from("127.0.0.9", port)
        first = await connected_from("127.0.0.2", port)
        second = await connected_from("127.0.0.3", port)
        for stream in (proxy, first, second, first):
            assert await is_served(stream)
        third = await connected_from("127.0.0.4", port)
        assert await is_served(third)
        assert [await is_served(stream) for stream in (second, proxy, first)] == [False, True, True]
        assert budget.held == 3
        for _, writer in (proxy, first, second, third):
            writer.close()


async def test_a_busy_connection_does_not_give_way() -> None:
    """If every connection is busy, the new one is closed."""
    entered, leave = asyncio.Event(), asyncio.Event()

    async def wait(_request: web.BaseRequest) -> web.Response:
        entered.set()
        await leave.wait()
        return web.Response(text="hello")

    every = Budgets()
    every.connections = Budget("connections", "connections", 1)
    server = HttpServer(wait, 1, "127.0.0.1", 0, reuse_port=False, on_response=lambda *_: None, budgets=every)
    port = await server.start()
    busy = await connected_from("127.0.0.1", port)
    served = asyncio.create_task(is_served(busy))
    await entered.wait()
    refused = await connected_from("127.0.0.1", port)
    assert not await is_served(refused)
    leave.set()
    assert await served
    for _, writer in (busy, refused):
        writer.close()
    await server.stop()


async def test_pipelined_requests_without_a_reader_fill_no_memory(client: Client) -> None:
    """A client that sends requests and reads no response is soon stopped by full buffers."""
    sender = socket.socket()
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    sender.settimeout(0)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sender, ("127.0.0.1", client.port))
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 4_000 + b"\r\n\r\n"
    sent = 0
    try:
        # Until nothing more is accepted for a while.
        while sent < PIPELINED_BYTES_MAX:
            async with asyncio.timeout(3.0):
                await loop.sock_sendall(sender, request)
            sent += len(request)
    except TimeoutError:
        pass
    finally:
        sender.close()
    assert sent < PIPELINED_BYTES_MAX


async def test_pipelined_reports_are_all_recorded(client: Client) -> None:
    """Large pieces of many requests on one connection are all handled, in their order."""
    body = json.dumps({"order_no": "KOM1", "status": "Dikirim", "note": "x" * 3_000}).encode()
    request = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    sending = asyncio.create_task(_send(writer, request * 100))
    for version in range(1, 101):
        await reader.readuntil(b'"version":%d,' % version)
    await sending
    writer.close()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def test_a_large_body_that_does_not_fit_gets_503(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A webhook beyond the budget of bodies gets 503 with its cause; a usual one is recorded all the same."""
    monkeypatch.setattr(budgets, "BODIES_BYTES_MAX", 10_000)
    async with serving_client(dsn) as client:
        half = json.dumps({"order_no": "BIG", "status": "Dikirim", "note": "x" * 12_000}).encode()
        head = f"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(half)}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(head + half[:12_000])
        await until_async(partial(_has_metric, client, 'budget_held{budget="body_bytes"} 7904.0'))
        answer = await client.talk(head + half[:-1])
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: " in answer
        small = b'{"order_no":"SMALL","status":"Dikirim"}'
        in_two = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(small)
        small_reader, small_writer = await asyncio.open_connection("127.0.0.1", client.port)
        small_writer.write(in_two)
        await small_writer.drain()
        small_writer.write(small)
        assert (await small_reader.readline()).startswith(b"HTTP/1.1 200 ")
        # The first one is recorded when its rest arrives.
        writer.write(half[12_000:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        metrics = await client.text("/metrics")
        assert 'webhook_refusals_total{cause="bodies_full"} 1.0' in metrics
        assert 'budget_held{budget="body_bytes"} 0.0' in metrics
        for one in (writer, small_writer):
            one.close()
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 2


async def _has_metric(client: Client, line: str) -> bool:
    return line in await client.text("/metrics")


async def test_a_form_may_be_small_only(client: Client) -> None:
    """A form with a key has a limit of its own, by its declared length and by what arrives."""
    for body in (b"key=" + b"x" * 2_045, b"key=x&next=/" + b"x" * 10_000):
        assert await client.status("POST", "/session", body) == 413
    chunked = b"POST /session HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await client.talk(chunked + b"fff\r\n" + b"x" * 0xFFF)
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_a_key_has_a_share_of_the_streams(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key with as many streams as it may have gets 429 for a further one; another key gets its own."""
    monkeypatch.setattr(budgets, "STREAMS_PER_KEY_MAX", 1)
    keys = [await api_keys.create_key(connection, name, "read", None) for name in ("one", "two")]
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    with capture_logs() as lines:
        await _open_streams(dsn, first, second)
    (line,) = [line for line in lines if line["event"] == "a budget is exhausted"]
    assert line["budget"] == "streams"


async def _open_streams(dsn: str, first: dict[str, str], second: dict[str, str]) -> None:
    async with serving_client(dsn) as client, client.reading("/events/stream", **first):
        for headers, status in ((first, 429), (second, 200)):
            async with client.session.get(client.url("/orders/KOM1/stream"), headers=headers) as answer:
                assert answer.status == status
                if status == 429:
                    assert answer.headers["Retry-After"]
                    problem = await answer.json(content_type=None)
                    assert (problem["type"], problem["budget"]) == ("/problems/over-budget", "streams")
        assert await client.status("GET", "/events.ndjson", headers=first) == 429
        assert await client.status("GET", "/orders.csv", headers=first) == 429
        assert await client.status("GET", "/orders.csv?limit=1", headers=first) == 200


async def test_a_key_has_a_share_of_the_connections_to_the_database(dsn: str, connection: Connection) -> None:
    """Reads of one key that wait for a lock do not keep another key's reads from a connection."""
    keys = [await api_keys.create_key(connection, name, "read", None) for name in ("one", "two")]
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    async with serving_client(dsn, request_seconds_max=20.0) as client:
        await client.get("/orders", 200, second)
        async with connection.transaction():
            await connection.execute("LOCK TABLE quarantine IN ACCESS EXCLUSIVE MODE")
            waiting = [asyncio.create_task(client.get("/quarantine", 200, first)) for _ in range(20)]
            await wait_for_locked(connection, POOL_CONNECTIONS_PER_KEY_MAX)
            await client.get("/orders", 200, second)
            assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)


def test_a_budget_counts_what_each_holder_has() -> None:
    """What is given back can be taken again, and a refused attempt takes nothing."""
    budget = Budget("things", "things", 3, 2)
    budget.take("a", 2)
    for arguments in (("a",), ("b", 2), (None, 2)):
        with pytest.raises(OverBudgetError):
            budget.take(*arguments)
    budget.take(None)
    assert (budget.held, budget.refusals) == (3, 3)
    budget.give_back("a", 2)
    with budget.hold("a"), budget.hold("a"):
        assert budget.held == 3
    budget.give_back(None)
    assert budget.held == 0


def test_every_budget_has_a_name_of_its_own() -> None:
    """The metrics tell the budgets apart by their names."""
    names = [budget.name for budget in Budgets()]
    assert len({*names}) == len(names)
