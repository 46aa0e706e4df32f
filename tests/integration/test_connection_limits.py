"""Attacks on each phase of a connection: one test for each cell of the table in docs/SECURITY.md.

The server is real, its limits are short, and loopback addresses are strangers to it unless a test exempts them.
"""

import asyncio
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Any, Final, cast

import pytest
import structlog
from aiohttp import web

from service.http import problems
from service.http.addresses import Network
from service.http.body import read_body
from service.http.budgets import HEAD_BYTES_FREE, RESPONSE_BYTES_FREE, Budget, Budgets
from service.http.connections import (
    HEAD_BYTES_MAX,
    SLICE_BYTES_MAX,
    UNREAD_BYTES_MAX,
    Connection,
    Limits,
    connection,
)
from service.http.problems import LOG_SECONDS, LogLimit
from service.http.server import SEND_BYTES_MAX, HttpServer, RequestHandler
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

# A tenth of what a service has. Phases that a test does not attack have no time limit.
SECONDS_MAX: Final = 0.3
PATIENT: Final = Limits(
    head_seconds_max=PATIENCE_SECONDS,
    body_seconds_max=PATIENCE_SECONDS,
    stall_seconds_max=PATIENCE_SECONDS,
    response_seconds_max=PATIENCE_SECONDS,
    idle_seconds_max=PATIENCE_SECONDS,
    linger_seconds_max=PATIENCE_SECONDS,
    sweep_seconds=0.05,
)
BODY_BYTES_MAX: Final = 65_536
LARGE: Final = b"x" * 1_000_000
GET: Final = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
PUT: Final = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n"
# More than any one piece that the kernel passes on.
PIPELINED_BYTES: Final = 1_000_000
# The kernel doubles what it was asked for.
KERNEL_FACTOR: Final = 2


def head(size: int) -> bytes:
    """Return a complete head of so many bytes."""
    rest = size - len(GET)
    fields = 1 + rest // 8_000
    sizes = [rest // fields + (number < rest % fields) for number in range(fields)]
    return GET[:-2] + b"".join(b"X: %b\r\n" % (b"x" * (size - 5)) for size in sizes) + b"\r\n"


def half(size: int) -> bytes:
    """Return a head of so many bytes that lacks its end."""
    return head(size + 4)[:-4]


class Attacked:
    """A server, and what it sees of its connections.

    Args:
        budgets: its budgets.
    """

    def __init__(self, budgets: Budgets) -> None:
        self.budgets = budgets
        self.port = 0
        self.requests: list[web.BaseRequest] = []
        self._clients: list[Client] = []

    @property
    def connections(self) -> list[Connection]:
        """The connections of the requests so far."""
        return [connection(request) for request in self.requests]

    async def connect(self, address: str = "127.0.0.2") -> "Client":
        """Open a connection from an address, which reads nothing until it is asked to."""
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        one.bind((address, 0))
        one.settimeout(0)
        await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", self.port))
        client = Client(one)
        self._clients.append(client)
        return client

    async def disconnect(self) -> None:
        """Close every connection."""
        for client in self._clients:
            await client.close()


class Client:
    """An attacker's connection."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._loop = asyncio.get_running_loop()
        self._flood: asyncio.Task[Client] | None = None

    async def send(self, data: bytes) -> "Client":
        """Send bytes, as many of them as the other side accepts."""
        with suppress(ConnectionError):
            await self._loop.sock_sendall(self.socket, data)
        return self

    def flood(self, data: bytes) -> "asyncio.Task[Client]":
        """Send bytes alongside the test."""
        self._flood = asyncio.create_task(self.send(data))
        return self._flood

    async def close(self) -> None:
        """Leave."""
        if self._flood is not None:
            self._flood.cancel()
            await asyncio.gather(self._flood, return_exceptions=True)
        self.socket.close()

    async def read(self, size: int = 65_536) -> bytes:
        """Return the next bytes, none if the connection is closed."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            try:
                return await self._loop.sock_recv(self.socket, size)
            except ConnectionError:
                return b""

    async def expect(self) -> bytes:
        """Return the next bytes of a connection that must be open."""
        part = await self.read()
        assert part
        return part

    async def read_all(self) -> bytes:
        """Return all bytes until the connection is closed."""
        received = b""
        while part := await self.read():
            received += part
        return received

    async def status(self, request: bytes = b"") -> int:
        """Send a request, and return the status of the response; 0 if the connection is closed without one."""
        await self.send(request)
        return int((await self.read()).partition(b" ")[2][:3] or 0)


async def greet(_request: web.BaseRequest) -> web.Response:
    return web.Response(text="hello")


async def read(request: web.BaseRequest) -> web.Response:
    return web.Response(body=await read_body(cast("web.Request", request)))


async def send_large(_request: web.BaseRequest) -> web.Response:
    return web.Response(body=bytes(LARGE))


class Hold:
    """A handler that waits until it is released."""

    def __init__(self) -> None:
        self.leave = asyncio.Event()

    async def __call__(self, _request: web.BaseRequest) -> web.Response:
        await self.leave.wait()
        return web.Response(text="hello")


@asynccontextmanager
async def attacked(
    handler: RequestHandler = greet, limits: Limits = PATIENT, *exempt: Network, **maximums: tuple[int, int]
) -> AsyncIterator[Attacked]:
    """Run a server for the length of the block; after it, nothing may be held any more.

    Args:
        handler: handles every request.
        limits: the limits of each connection.
        exempt: the networks that are no strangers.
        maximums: of some budgets, what all and what one address may hold.
    """
    budgets = Budgets()
    for name, (maximum, maximum_each) in maximums.items():
        setattr(budgets, name, Budget(name, name, maximum, maximum_each))
    held = Attacked(budgets)

    async def note(request: web.BaseRequest) -> web.StreamResponse:
        held.requests.append(request)
        return await handler(request)

    server = HttpServer(
        *(note, BODY_BYTES_MAX, "127.0.0.1", 0),
        reuse_port=False,
        on_response=lambda *_: None,
        budgets=budgets,
        limits=limits,
        exempt=exempt,
    )
    held.port = await server.start()
    sweeping = asyncio.create_task(server.close_slow_connections())
    try:
        yield held
    finally:
        await held.disconnect()
        sweeping.cancel()
        await server.stop()
    await until_async(condition(lambda: not any(budget.held for budget in budgets)))


async def wait_for(is_met: Callable[[], Any]) -> None:
    await until_async(condition(is_met))


# Heads


@pytest.mark.attacks("head", "bytes")
@pytest.mark.parametrize("large", [head(HEAD_BYTES_MAX + 1), half(10 * HEAD_BYTES_MAX)], ids=["whole", "half"])
async def test_a_head_that_is_too_large(large: bytes) -> None:
    """A head of more than HEAD_BYTES_MAX gets 431, in however few fields; a smaller one is served."""
    async with attacked() as server:
        assert await (await server.connect()).status(GET) == 200
        whole = head(HEAD_BYTES_MAX)
        assert await (await server.connect()).status(whole) == 200
        client = await server.connect()
        client.flood(large)
        answer = await client.read_all()
        # It may get lost, since the connection is closed while bytes arrive.
        assert not answer or b" 431 " in answer[:13]
        assert server.budgets.excesses.counts["head_bytes"] == 1
        assert len(server.requests) == 2


@pytest.mark.attacks("head", "seconds")
async def test_a_head_that_is_too_slow() -> None:
    """A head that is not complete in time closes its connection, however steadily it arrives."""
    async with attacked(limits=replace(PATIENT, head_seconds_max=SECONDS_MAX)) as server:
        slow = await server.connect()

        async def is_closed() -> bool:
            await slow.send(b"x")
            return server.budgets.excesses.counts["head_seconds"] == 1

        await slow.send(b"GET /")
        await until_async(is_closed)
        assert not await slow.read()


@pytest.mark.attacks("head", "all")
async def test_heads_of_many_addresses() -> None:
    """Half heads of many addresses hold no more than the budget, which no usual request needs."""
    large = 3 * HEAD_BYTES_FREE
    async with attacked(heads=(large, large)) as server:
        clients = [await server.connect(f"127.0.0.{number}") for number in range(2, 12)]
        for client in clients:
            await client.send(half(20_000))
        await wait_for(lambda: server.budgets.heads.refusals >= 8)
        assert server.budgets.heads.held <= large
        assert await (await server.connect()).status(GET) == 200
        statuses = [await client.status(b"\r\n\r\n") for client in clients]
        assert {200, 503} >= {*statuses} - {0}
        assert statuses.count(200) >= 1


@pytest.mark.attacks("head", "address")
async def test_heads_of_one_address() -> None:
    """An address with its share of large heads is refused a further one; another address is not."""
    async with attacked(heads=(10 * HEAD_BYTES_MAX, 2 * HEAD_BYTES_MAX)) as server:
        for _ in range(2):
            await (await server.connect()).send(half(20_000))
        await wait_for(lambda: server.budgets.heads.held > HEAD_BYTES_MAX)
        assert await (await server.connect()).status(head(25_000)) == 503
        assert await (await server.connect("127.0.0.3")).status(head(25_000)) == 200
        assert await (await server.connect()).status(GET) == 200


async def test_many_small_fields_weigh_what_they_take() -> None:
    """A field costs several objects, so a head of tiny ones counts for more than its bytes."""
    tiny = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"a%d:\r\n" % number for number in range(100))
    async with attacked() as server:
        await (await server.connect()).send(tiny)
        await wait_for(lambda: server.budgets.heads.held > 100 * len(b"a00:\r\n"))


# Bodies


@pytest.mark.attacks("body", "bytes")
@pytest.mark.attacks("handler", "bytes")
async def test_a_body_that_is_not_read() -> None:
    """Of a body that its handler does not read, little is held; a larger one than allowed gets 413."""
    hold = Hold()
    async with attacked(hold) as server:
        client = await server.connect()
        sending = client.flood(PUT.replace(b"60000", b"1000000") + LARGE)
        await wait_for(lambda: server.requests)
        (request,) = server.requests
        await wait_for(lambda: request.content.total_bytes > UNREAD_BYTES_MAX)
        # The kernel keeps the rest from arriving.
        assert not sending.done()
        assert request.content.total_bytes < BODY_BYTES_MAX
        hold.leave.set()
        assert await client.status() == 200
    async with attacked(read) as server:
        assert await (await server.connect()).status(PUT.replace(b"60000", b"70000")) == 413


@pytest.mark.attacks("body", "seconds")
async def test_a_body_that_is_too_slow() -> None:
    """A body that is not complete in time gets 408, and the connection is closed."""
    async with attacked(read, replace(PATIENT, body_seconds_max=SECONDS_MAX, linger_seconds_max=0.1)) as server:
        client = await server.connect()
        assert await client.status(PUT + b"x") == 408
        assert not await client.read_all()


@pytest.mark.attacks("body", "all")
@pytest.mark.attacks("body", "address")
async def test_bodies_that_are_arriving() -> None:
    """Half bodies of one address hold no more than its share, those of all no more than the budget."""
    limits = replace(PATIENT, linger_seconds_max=0.1)
    async with attacked(read, limits, bodies=(100_000, 40_000)) as server:
        for number in (2, 3):
            await (await server.connect(f"127.0.0.{number}")).send(PUT + LARGE[:40_000])
        await wait_for(lambda: server.budgets.bodies.held > 70_000)
        # Its own share is exhausted.
        assert await (await server.connect()).status(PUT + LARGE[:20_000]) == 429
        # The budget of all is, although this address holds nothing.
        await (await server.connect("127.0.0.4")).send(PUT + LARGE[:30_000])
        await wait_for(lambda: server.budgets.bodies.held > 90_000)
        assert await (await server.connect("127.0.0.5")).status(PUT + LARGE[:30_000]) == 429
        # A usual body is smaller than what is free.
        small = b"PUT / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        client = await (await server.connect()).send(small)
        assert await client.status(b"0\r\n\r\n") == 200


# Pipelined requests


@pytest.mark.attacks("queue", "bytes")
@pytest.mark.parametrize("request_", [GET, head(30_000)], ids=["small", "large"])
async def test_requests_behind_one_that_is_handled(request_: bytes) -> None:
    """While a request is handled, no other one of its connection is parsed, and little of them is held."""
    hold = Hold()
    async with attacked(hold) as server:
        client = await server.connect()
        sending = client.flood(request_ * (PIPELINED_BYTES // len(request_)))
        await wait_for(lambda: server.requests and server.connections[0].ahead)
        (served,) = server.connections
        assert not served._messages  # noqa: SLF001 - the queue of aiohttp
        assert len(served.ahead) + len(served.carried) <= HEAD_BYTES_MAX
        assert not sending.done()
        hold.leave.set()
        await wait_for(lambda: len(server.requests) > 1)


@pytest.mark.attacks("queue", "seconds")
async def test_a_slow_head_behind_another_request() -> None:
    """Half a head that arrives with a request before it has the time limit of a head, from the response on."""
    async with attacked(limits=replace(PATIENT, head_seconds_max=SECONDS_MAX)) as server:
        client = await server.connect()
        await client.send(GET + GET[:-2])
        assert (await client.read_all()).count(b"HTTP/1.1 200 ") == 1
        assert server.budgets.excesses.counts["head_seconds"] == 1


@pytest.mark.attacks("queue", "all")
@pytest.mark.attacks("queue", "address")
async def test_what_is_pipelined_counts_as_heads_do() -> None:
    """A connection whose pipelined bytes exceed the budget of heads is closed after its response."""
    hold = Hold()
    async with attacked(hold, PATIENT, heads=(4_000, 2_000)) as server:
        fine, greedy = await server.connect("127.0.0.3"), await server.connect()
        large = head(HEAD_BYTES_FREE // 2 - 1_000)
        await fine.send(GET)
        await greedy.send(large)
        await wait_for(lambda: len(server.requests) == 2)
        greedy.flood(head(30_000) * 10)
        await wait_for(lambda: server.budgets.heads.refusals)
        hold.leave.set()
        assert (await greedy.read_all()).count(b"HTTP/1.1 200 ") == 1
        assert await fine.status() == 200


async def test_pipelined_requests_are_all_answered() -> None:
    """Requests with and without bodies are answered in their sequence, in whatever pieces they arrive."""
    body = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n12345"
    large = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n" + b"y" * 20_000
    requests = (GET + body + large + b"\r\n" + GET) * 3
    async with attacked(read, replace(PATIENT, head_seconds_max=1.0)) as server:
        for size in (1, 7, 4_096, 10_000, len(requests)):
            client = await server.connect()

            async def send(client: Client = client, size: int = size) -> None:
                # A byte at a time only where it matters.
                step = max(size, 1)
                at = 0
                while at < len(requests):
                    piece = requests[at : at + (step if requests[at : at + 1] != b"y" else 5_000)]
                    await client.send(piece)
                    await asyncio.sleep(0)
                    at += len(piece)

            sending = asyncio.create_task(send())
            received = b""
            while received.count(b"HTTP/1.1 200 OK") < 12 or not received.endswith(b"\r\n\r\n"):
                received += await client.expect()
            assert received.count(b"12345") == 3
            await sending
            # An idle connection is not a slow head.
            await asyncio.sleep(0)
            assert client.socket.fileno() > 0
        assert not server.budgets.excesses.counts["head_seconds"]


async def test_nothing_follows_what_cannot_be_delimited() -> None:
    """Behind a chunked body with more bytes, or a request for another protocol, the connection is closed."""
    chunked = b"PUT / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    upgrade = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with attacked(read) as server:
        for request in (chunked + GET, upgrade + GET):
            answer = await (await (await server.connect()).send(request)).read_all()
            assert answer.count(b"HTTP/1.1 200 ") == 1
        client = await server.connect()
        another = GET[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        for request in (chunked, chunked, GET, another, another, GET):
            assert await client.status(request) == 200


# Handlers


@pytest.mark.attacks("handler", "address")
async def test_a_handler_holds_nothing_else() -> None:
    """A request that is handled holds its head and its body, which are counted, and a few objects."""
    hold = Hold()
    async with attacked(hold) as server:
        clients = [await server.connect() for _ in range(100)]
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for client in clients:
            await client.send(GET)
        await wait_for(lambda: len(server.requests) == len(clients))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (after - before) / len(clients) < HEAD_BYTES_FREE
        assert not any(budget.held for budget in server.budgets if budget is not server.budgets.connections)
        hold.leave.set()
        assert {await client.status() for client in clients} == {200}


# Responses


@pytest.mark.attacks("response", "bytes")
async def test_a_response_that_is_not_read() -> None:
    """Of a response that its client does not read, a slice waits in memory, and a little in the kernel."""
    async with attacked(send_large) as server:
        await (await server.connect()).send(GET)
        await wait_for(lambda: server.requests and server.connections[0].wire.get_write_buffer_size())
        (served,) = server.connections
        assert served.wire.get_write_buffer_size() <= 3 * SLICE_BYTES_MAX
        kernel = served.wire.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert kernel <= KERNEL_FACTOR * SEND_BYTES_MAX


@pytest.mark.attacks("response", "seconds")
async def test_a_client_that_accepts_nothing() -> None:
    """A client that accepts nothing is cut off, and its kernel told so; one that reads slowly is served."""
    async with attacked(send_large, replace(PATIENT, stall_seconds_max=SECONDS_MAX)) as server:
        stalled, slow = await server.connect(), await server.connect()
        await stalled.send(GET)
        await slow.send(GET)
        received = 0
        loop = asyncio.get_running_loop()
        ends = loop.time() + 4 * SECONDS_MAX
        while loop.time() < ends:
            received += len(await slow.read(1_000))
            await asyncio.sleep(0.01)
        assert server.budgets.excesses.counts["response_stall"] == 1
        while received < len(LARGE):
            received += len(await slow.expect())
        # Reset, rather than closed when the client has read everything: it never would.
        assert len(await stalled.read_all()) < len(LARGE)


@pytest.mark.attacks("response", "seconds")
async def test_a_client_that_accepts_a_little_now_and_then() -> None:
    """A response that ends has a time limit in all, so that a trickle holds no share of the budget for long."""
    async with attacked(send_large, replace(PATIENT, response_seconds_max=SECONDS_MAX)) as server:
        client = await server.connect()
        await client.send(GET)

        async def is_cut_off() -> bool:
            await client.read(100)
            return server.budgets.excesses.counts["response_seconds"] == 1

        await until_async(is_cut_off)
        await wait_for(lambda: not server.budgets.responses.held)


@pytest.mark.attacks("response", "all")
@pytest.mark.attacks("response", "address")
async def test_responses_that_are_being_sent() -> None:
    """A large response beyond the share of an address, or the budget of all, is replaced by 429."""
    share = len(LARGE)
    async with attacked(send_large, PATIENT, responses=(2 * share, share)) as server:
        await (await server.connect()).send(GET)
        await wait_for(lambda: server.budgets.responses.held == share)
        refused = await (await (await server.connect()).send(GET)).read_all()
        assert refused.startswith(b"HTTP/1.1 429 ")
        await (await server.connect("127.0.0.3")).send(GET)
        await wait_for(lambda: server.budgets.responses.held == 2 * share)
        assert await (await server.connect("127.0.0.4")).status(GET) == 429
        assert server.budgets.responses.refusals == 2
    async with attacked(greet, PATIENT, responses=(1, 1)) as server:
        assert await (await server.connect()).status(GET) == 200


# Idle connections


@pytest.mark.attacks("idle", "bytes")
async def test_an_idle_connection_has_no_response() -> None:
    """Between requests, a connection holds neither a large response nor a head that does not count."""
    sent: list[web.Response] = []

    async def note(request: web.BaseRequest) -> web.Response:
        sent.append(await send_large(request))
        return sent[-1]

    async with attacked(note) as server:
        client = await server.connect()
        await client.send(head(30_000))
        received = 0
        while received < len(LARGE):
            received += len(await client.read())
        await wait_for(lambda: not server.connections[0].is_handling)
        (response,) = sent
        assert response.body is None
        assert len(LARGE) > RESPONSE_BYTES_FREE
        assert server.budgets.heads.held > 30_000
        await client.send(GET)
        await wait_for(lambda: not server.budgets.heads.held)


@pytest.mark.attacks("idle", "seconds")
async def test_an_idle_connection_is_closed() -> None:
    """A connection without a request is closed after a while."""
    async with attacked(limits=replace(PATIENT, idle_seconds_max=SECONDS_MAX)) as server:
        client = await server.connect()
        assert await client.status(GET) == 200
        assert not await client.read()


# Expectations, and the log


@pytest.mark.parametrize("value", [b"\x80", b"x", b"100-continue, x", b"200-ok"])
async def test_an_unknown_expectation(value: bytes) -> None:
    """An expectation other than 100-continue gets 417, one log line a minute, and a count."""
    async with attacked() as server:
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                client = await server.connect()
                answer = await (await client.send(GET[:-2] + b"Expect: " + value + b"\r\n\r\n")).read_all()
                assert answer.startswith(b"HTTP/1.1 417 ")
                assert b'"status":417' in answer
        assert server.budgets.excesses.counts["expectation"] == 3
        assert [line["limit"] for line in lines] == ["expectation"]
        assert await (await server.connect()).status(GET[:-2] + b"Expect: 100-Continue\r\n\r\n") == 200


async def test_a_failure_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail alike leave one line in a minute, which counts those before it."""
    error: list[Exception] = [KeyError("a"), *[LookupError("b")] * 4]

    async def fail(_request: web.BaseRequest) -> web.Response:
        raise error.pop()

    monkeypatch.setattr(problems, "_failures", LogLimit())
    async with attacked(fail) as server:
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                assert await (await server.connect()).status(GET) == 500
            # As if a minute had passed.
            monkeypatch.setattr("service.http.problems.monotonic", lambda: monotonic() + LOG_SECONDS)
            for _ in range(2):
                assert await (await server.connect()).status(GET) == 500
    assert [(type(line["exc_info"]), line["suppressed"]) for line in lines] == [
        (LookupError, 0),
        (LookupError, 2),
        (KeyError, 0),
    ]


def test_kinds_of_lines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond LOG_KINDS_MAX, further kinds of lines share one interval."""
    monkeypatch.setattr(problems, "LOG_KINDS_MAX", 2)
    lines = LogLimit()
    assert [lines.admit(kind) for kind in ("a", "b", "c", "d", "a")] == [0, 0, 0, None, None]
