"""Attacks on a real process: what strangers may hold is bounded, and webhooks are recorded during them.

Each attack lasts several seconds, since it must outlive the time limit of a body or of a slow reader.
"""

import asyncio
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

import aiohttp
import psutil  # type: ignore[import-untyped]  # it brings no types
import psycopg
import pytest

from tests.faults.resources import Resources
from tests.support.connections import OK, Connections, get, put
from tests.support.filler import long_order
from tests.support.processes import RunningService
from tests.support.waiting import until_async

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc"),
]

MEMORY_MB_MAX: Final = 200.0
# Between two webhooks that are sent during an attack.
PAUSE_SECONDS: Final = 0.05
HALF_SENT: Final = 3_000
IDLE: Final = 2_000
STREAMS: Final = 2_000
FOLDS: Final = 32
LONG_ORDER_EVENTS: Final = 58_000
WRONG_TOKENS: Final = 5_000
TOO_MANY: Final = 429
# So many bytes that each body is complete but for its last part.
HALF_BYTES: Final = 60_000
ATTACK_SECONDS: Final = 6.0
RECEIVE_BUFFER_BYTES: Final = 4_096
# What an attack may add, where the issue is the memory of one phase.
GROWTH_MB_MAX: Final = 30.0
# A request that never ends: each of its fields is within the limit of a field.
LARGE_HEAD: Final = get("/openapi.json")[:-2] + b"".join(b"X%d: %b\r\n" % (n, b"x" * 8_000) for n in range(120))
EARLY_HINTS: Final = 1_000 * b"HTTP/1.1 103 Early Hints\r\n\r\n"
FLOODED: Final = 50
TOKEN: Final = "a-token-of-16-characters"  # noqa: S105 - of a service that lives for one test


class Watch:
    """What the operator of an attacked service sees: its memory, and whether webhooks are recorded."""

    def __init__(self, service: RunningService) -> None:
        self._service = service
        self.statuses: Counter[int | None] = Counter()
        self.memory_mb = 0.0

    async def run(self, connections: Connections, path: str = "/webhook") -> None:
        """Send a webhook again and again, and note its status and the service's memory."""
        request = put('{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}')
        request = request.replace(b"/webhook", path.encode(), 1)
        while True:
            answer = await connections.request(request)
            self.statuses[answer.status if answer is not None else None] += 1
            memory = Resources.of(self._service.process.pid, self._service.port).memory_mb
            self.memory_mb = max(self.memory_mb, memory)
            await asyncio.sleep(PAUSE_SECONDS)

    def expect(self) -> None:
        """Every webhook was recorded, and the memory stayed within its bound."""
        assert set(self.statuses) == {OK}, self.statuses
        assert self.memory_mb < MEMORY_MB_MAX, self.memory_mb


@asynccontextmanager
async def watching(service: RunningService, path: str = "/webhook") -> AsyncIterator[Watch]:
    """Send webhooks for the length of the block, on a connection that was open before the attack."""
    watch = Watch(service)
    connections = Connections(service.port)
    await connections.open(1)
    task = asyncio.create_task(watch.run(connections, path))
    try:
        await until_async(partial(_is_sent, watch))
        yield watch
        sent = watch.statuses.total()
        await until_async(partial(_is_sent, watch, sent + 1))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        connections.close()
    watch.expect()


async def _is_sent(watch: Watch, count: int = 0) -> bool:
    return watch.statuses.total() > count


@contextmanager
def sockets(service: RunningService, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that read as little as they can."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            one = socket.socket()
            opened.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            one.connect(("127.0.0.1", service.port))
            one.settimeout(0)
        yield opened
    finally:
        for one in opened:
            one.close()


async def send_all(opened: list[socket.socket], message: bytes) -> None:
    """Send a message on each connection. Some may be closed by the other side."""
    loop = asyncio.get_running_loop()
    for begin in range(0, len(opened), 200):
        sending = [loop.sock_sendall(one, message) for one in opened[begin : begin + 200]]
        await asyncio.gather(*sending, return_exceptions=True)


async def metric(service: RunningService, name: str) -> float:
    """Return a metric's value."""
    connections = Connections(service.port)
    answer = await connections.request(get("/metrics"))
    connections.close()
    assert answer is not None
    lines = [line for line in answer.body.decode().splitlines() if line.startswith(name)]
    assert lines, name
    return float(lines[0].rpartition(" ")[2])


@pytest.mark.parametrize("path", ["/session", "/webhook"])
async def test_half_sent_bodies_fill_no_memory(service: RunningService, path: str) -> None:
    """3,000 connections send most of a body and never its end."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    async with watching(service) as watch:
        with sockets(service, HALF_SENT) as opened:
            await send_all(opened, head + b"ea60\r\n" + b"x" * HALF_BYTES)
            # Elapsed time is the subject: the bodies are held until their time limit.
            await asyncio.sleep(ATTACK_SECONDS)
    assert watch.statuses.total()


@pytest.mark.parametrize(
    ("count", "message"),
    [(40, 3 * (LARGE_HEAD + b"\r\n")), (255, LARGE_HEAD), (255, get("/openapi.json"))],
    ids=["pipelined large heads", "half heads", "unread responses"],
)
async def test_connections_of_one_address(service: RunningService, count: int, message: bytes) -> None:
    """What one address sends without an end, or never reads, takes little memory until it is cut off."""
    # A first response builds what the service keeps.
    await metric(service, "budget_held")
    async with watching(service) as watch:
        before = watch.memory_mb
        with sockets(service, count) as opened:
            sending = asyncio.create_task(send_all(opened, message))
            own = {one.getsockname()[1] for one in opened}

            async def are_closed() -> bool:
                connections = psutil.Process(service.process.pid).net_connections("tcp4")
                return not own & {one.raddr.port for one in connections if one.raddr}

            # Long before an idle connection would be.
            await until_async(are_closed)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert watch.memory_mb - before < GROWTH_MB_MAX


async def test_an_endpoint_that_floods_with_interim_responses(state_dir: Path) -> None:
    """An endpoint whose responses never begin delays no webhook, and takes no memory."""

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(EARLY_HINTS)
                await writer.drain()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    service = RunningService(state_dir, SUBSCRIPTION_NETWORKS="127.0.0.0/8")
    try:
        service.start()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with aiohttp.ClientSession() as session:
            await session.post(f"{service.url}/subscriptions", json={"url": url}, raise_for_status=True)
        async with watching(service) as watch:
            before = watch.memory_mb
            filler = Connections(service.port)
            for number in range(FLOODED):
                await filler.request(put(f'{{"order_no":"NEW{number}","status":"Dikirim"}}'))
            filler.close()
            limit = 'connection_excesses_total{limit="interim_responses"}'

            async def has_attacked() -> bool:
                return await metric(service, limit) >= FLOODED

            await until_async(has_attacked)
        assert watch.memory_mb - before < GROWTH_MB_MAX
    finally:
        service.end()
        server.close()


async def test_idle_connections_keep_nobody_out(state_dir: Path) -> None:
    """With a limit of 1,024 open files, 2,000 idle connections make the service close the longest idle ones."""

    class Limited(RunningService):
        command = ("prlimit", "--nofile=1024:1024", *RunningService.command)

    service = Limited(state_dir)
    try:
        service.start()
        async with watching(service):
            with sockets(service, IDLE) as opened:
                await send_all(opened, get("/livez"))
                for number in range(20):
                    connections = Connections(service.port)
                    answer = await connections.request(put(f'{{"order_no":"NEW{number}","status":"Dikirim"}}'))
                    connections.close()
                    assert answer is not None
                    assert answer.status == OK
                assert await metric(service, 'budget_held{budget="connections"}') <= 0.9 * 1_024
        assert service.output.count("connections are closed") == 1
    finally:
        service.end()


async def test_stalled_streams_fill_no_memory(service: RunningService) -> None:
    """2,000 readers of the log from its beginning accept nothing; a further one gets 429."""
    filler = Connections(service.port)
    for number in range(200):
        body = f'{{"order_no":"OLD{number}","status":"Dikirim","note":"{"x" * 5_000}"}}'
        assert (await filler.request(put(body))) is not None
    filler.close()
    async with watching(service):
        with sockets(service, STREAMS) as opened:
            await send_all(opened, get("/events/stream?after=0"))
            held = partial(metric, service, 'budget_held{budget="streams"}')
            refused = Connections(service.port)

            async def is_full() -> bool:
                return await held() == STREAMS

            await until_async(is_full)
            answer = await refused.request(get("/events/stream"))
            refused.close()
            assert answer is not None
            assert answer.status == TOO_MANY
            assert answer.retry_after_seconds


async def test_folds_of_a_long_order_delay_nobody(service: RunningService) -> None:
    """32 readers fold an order of 58,000 events at once; another reader and the webhooks get their answers."""
    with closing(psycopg.connect(service.dsn)) as connection:
        long_order(connection, "LONG", LONG_ORDER_EVENTS)
        connection.commit()
    async with watching(service):
        folding = Connections(service.port)
        fold = get(f"/orders/LONG?version={LONG_ORDER_EVENTS - 1}")
        folds = [asyncio.ensure_future(folding.request(fold)) for _ in range(FOLDS)]
        reading = Connections(service.port)
        while not all(fold.done() for fold in folds):
            answer = await reading.request(get("/orders?limit=1"))
            assert answer is not None
            assert answer.status == OK
        answers = [await fold for fold in folds]
        statuses = Counter(answer.status for answer in answers if answer is not None)
        assert statuses.total() == FOLDS
        assert set(statuses) <= {OK, TOO_MANY}, statuses
        assert statuses[OK]
        assert all(answer.retry_after_seconds for answer in answers if answer and answer.status == TOO_MANY)
        folding.close()
        reading.close()


async def test_a_flood_of_refused_tokens_delays_nobody(state_dir: Path) -> None:
    """5,000 webhooks with a wrong token are counted, and logged as one line with the address."""
    service = RunningService(state_dir, WEBHOOK_TOKENS=TOKEN)
    try:
        service.start()
        async with watching(service, f"/webhook/{TOKEN}"):
            flood = Connections(service.port)
            wrong = put('{"order_no":"KOM1","status":"Dikirim"}').replace(b"/webhook", b"/webhook/wrong", 1)
            answers = await asyncio.gather(*(flood.request(wrong) for _ in range(WRONG_TOKENS)))
            flood.close()
            assert {answer.status for answer in answers if answer is not None} == {404}
        lines = [line for line in service.output.splitlines() if "refused" in line]
        assert len(lines) == 1
        assert "127.0.0.1" in lines[0]
        assert TOKEN not in service.output
    finally:
        service.end()


def test_the_limit_of_open_files_of_this_process() -> None:
    """The attacks need more connections than most systems allow by default."""
    assert os.sysconf("SC_OPEN_MAX") > HALF_SENT
