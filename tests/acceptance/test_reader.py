"""Two real services: one records on a primary, and one only reads, on a streaming replica of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import asyncpg
import pytest

from service.database.embedded_postgres import EmbeddedPostgres
from tests.faults.standby import kill_server, make_standby, promote
from tests.support.client import Client
from tests.support.databases import FAST_SETTINGS
from tests.support.folders import copied_folder, temporary_folder
from tests.support.processes import RunningService, ended_service, run_command
from tests.support.waiting import until_async

# Shorter than the default, so that a test need not wait.
AGE_SECONDS_MAX: Final = "0.5"
# Replays that the reader reads through.
REPLAYS: Final = 3


class Services(NamedTuple):
    """A primary and its standby, and a service on each of them."""

    primary: EmbeddedPostgres
    standby: EmbeddedPostgres
    recording: RunningService
    reading: RunningService


class Pair(NamedTuple):
    """The running parts, and a client of each service."""

    parts: Services
    recorder: Client
    reader: Client


@contextmanager
def running_services(state_template: Path) -> Iterator[Services]:
    """Run a primary, its standby, and a service on each, for the length of the block."""
    with temporary_folder() as folder, copied_folder(state_template) as state_dir, ExitStack() as stack:
        primary = EmbeddedPostgres(state_dir, settings=FAST_SETTINGS)
        stack.callback(primary.stop)
        primary.start()
        standby = make_standby(state_dir, folder / "standby", FAST_SETTINGS)
        stack.callback(standby.stop)
        standby.start()
        reader_settings = {"READ_ONLY": "true", "REPLICA_AGE_SECONDS_MAX": AGE_SECONDS_MAX}
        recording = RunningService(folder, DATABASE_URL=primary.dsn)
        reading = RunningService(folder, DATABASE_URL=standby.dsn, **reader_settings)
        for service in (recording, reading):
            stack.enter_context(ended_service(service))
        yield Services(primary, standby, recording, reading)


@pytest.fixture(scope="module")
def shared_services(state_template: Path) -> Iterator[Services]:
    """Run services for the tests that leave them as they were, since a standby takes seconds to make."""
    with running_services(state_template) as services:
        yield services


@pytest.fixture
async def shared(shared_services: Services) -> AsyncIterator[Pair]:
    """Return services that other tests use too."""
    async with pair_of(shared_services) as pair:
        yield pair


@pytest.fixture
async def own(state_template: Path) -> AsyncIterator[Pair]:
    """Return services of this test alone."""
    with running_services(state_template) as services:
        async with pair_of(services) as pair:
            yield pair


@asynccontextmanager
async def pair_of(services: Services) -> AsyncIterator[Pair]:
    async with aiohttp.ClientSession() as session:
        yield Pair(services, Client(session, services.recording.port), Client(session, services.reading.port))


async def is_status(client: Client, path: str, status: int) -> bool:
    return await client.status("GET", path) == status


async def test_a_reader_serves_the_reports_of_its_primary(shared: Pair) -> None:
    """A read, a page and a stream of the reader include a report whose position the primary's receipt gives."""
    recorder, reader = shared.recorder, shared.reader
    async with reader.reading("/events/stream") as stream:
        for number in range(3):
            position = (await recorder.webhook(f"KOM{number}"))["position"]
            order, headers = await reader.get_with_headers(f"/orders/KOM{number}?after_position={position}")
            assert order["version"] == 1
            assert int(headers["View-Position"]) >= position
            assert "View-Age" in headers
        assert await stream.positions(3) == [position - 2, position - 1, position]
    after = f"after_position={position}"
    for path in ("/orders", "/orders/KOM1/timeline", "/statistics", "/audit/transitions"):
        assert await reader.get(f"{path}?{after}") == await recorder.get(f"{path}?{after}"), path
    assert "KOM1" in await reader.text(f"/track/KOM1?{after}")
    assert await reader.status("GET", f"/?{after}") == 200
    poll = asyncio.create_task(reader.get(f"/events?after={position}&wait=30"))
    receipt = await recorder.webhook("KOM9")
    assert [event["position"] for event in (await poll)["events"]] == [receipt["position"]]
    ready = await reader.get("/readyz")
    assert (ready["status"], ready["role"]) == ("ready", "reader")
    async with reader.session.put(reader.url("/webhook"), data=b"{}") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert (await response.json(content_type=None))["cause"] == "read_only"
    assert 'webhook_refusals_total{cause="read_only"} 1.0' in await reader.text("/metrics")


@pytest.mark.long
async def test_keys_reach_a_reader_with_the_replication(own: Pair) -> None:
    """A key works at the reader once the standby has it, and no longer once it has its revocation."""

    def keys(*arguments: str) -> str:
        run = run_command(own.parts.recording.state_dir, "keys", *arguments, DATABASE_URL=own.parts.primary.dsn)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    secret = await asyncio.to_thread(keys, "create", "dashboard")

    def has_status(status: int) -> Any:
        async def is_status_with_key() -> bool:
            bearer = {"Authorization": f"Bearer {secret}"}
            return await own.reader.status("GET", "/orders", headers=bearer) == status

        return is_status_with_key

    await until_async(partial(is_status, own.reader, "/orders", 401))
    await until_async(has_status(200))
    await asyncio.to_thread(keys, "revoke", "dashboard")
    await until_async(has_status(401))


async def test_a_service_without_the_setting_is_not_ready_on_a_standby(shared: Pair) -> None:
    """A load balancer must not send webhooks to a demoted server's service."""
    service = RunningService(shared.parts.reading.state_dir, DATABASE_URL=shared.parts.standby.dsn)
    with ended_service(service):
        problem = await Client(shared.reader.session, service.port).get("/readyz", 503)
        assert problem["cause"] == "read_only"


async def test_a_reader_outlives_its_standby(shared: Pair) -> None:
    """While the standby is away, the reader is not ready; then it reads what was recorded in the meantime."""
    recorder, reader = shared.recorder, shared.reader
    position = (await recorder.webhook("KOM1"))["position"]
    await reader.get(f"/orders/KOM1?after_position={position}")
    await asyncio.to_thread(kill_server, shared.parts.standby)

    async def is_unreachable() -> bool:
        # On a busy machine, the first attempt may end without an answer in time.
        return bool((await reader.get("/readyz", 503))["cause"] == "unreachable")

    await until_async(is_unreachable)
    await reader.get("/orders/KOM1", 503)
    await reader.get("/livez")
    receipt = await recorder.webhook("KOM1", "Diterima")
    await asyncio.to_thread(shared.parts.standby.start)
    await until_async(partial(is_status, reader, "/readyz", 200), lambda: shared.parts.reading.output)
    path = f"/orders/KOM1?after_position={receipt['position']}"
    await until_async(partial(is_status, reader, path, 200), lambda: shared.parts.reading.output)
    assert (await reader.get(path))["status"] == "delivered"


async def test_a_reader_reads_through_replays(shared: Pair) -> None:
    """Views that are swapped on the primary cause no failed read on the standby. Each replay takes seconds."""
    recorder, reader = shared.recorder, shared.reader
    for number in range(50):
        position = (await recorder.webhook(f"KOM{number}"))["position"]
    await reader.get(f"/orders/KOM1/timeline?after_position={position}")
    statuses: Counter[tuple[str, int]] = Counter()

    async def read(path: str) -> None:
        while not replaying.done():
            statuses[path, await reader.status("GET", path)] += 1

    def replay() -> list[int]:
        run = partial(
            run_command, shared.parts.recording.state_dir, "replay", DATABASE_URL=shared.parts.primary.dsn
        )
        return [run().returncode for _ in range(REPLAYS)]

    replaying = asyncio.create_task(asyncio.to_thread(replay))
    paths = ("/orders", "/orders/KOM1", "/orders/KOM1/timeline", "/statistics", "/", "/track/KOM1")
    await asyncio.gather(replaying, *map(read, paths))
    assert replaying.result() == [0] * REPLAYS
    assert {status for _, status in statuses} == {200}, (statuses, shared.parts.reading.output)
    receipt = await recorder.webhook("KOM1", "Diterima")
    path = f"/orders/KOM1/timeline?after_position={receipt['position']}"
    assert (await reader.get(path))["status"] == "delivered"


@pytest.mark.long
async def test_a_reader_of_an_old_standby_is_not_ready(own: Pair) -> None:
    """Reads go on while the standby does not replay, but /readyz and View-Age show it."""
    recorder, reader = own.recorder, own.reader
    standby = await asyncpg.connect(own.parts.standby.dsn)
    position = (await recorder.webhook("KOM1"))["position"]
    await reader.get(f"/orders/KOM1?after_position={position}")
    await standby.execute("SELECT pg_wal_replay_pause()")
    await recorder.webhook("KOM1")
    await until_async(partial(is_status, reader, "/readyz", 503))
    problem = await reader.get("/readyz", 503)
    assert problem["cause"] == "replica_behind"
    assert problem["age_seconds"] > float(AGE_SECONDS_MAX)
    assert "more than 0.5 s" in problem["detail"]
    problem = await reader.get(f"/orders/KOM1?after_position={position + 1}", 503)
    assert problem["position"] == position

    async def is_old() -> bool:
        order, headers = await reader.get_with_headers("/orders/KOM1")
        assert order["version"] == 1
        return float(headers["View-Age"]) > float(AGE_SECONDS_MAX)

    await until_async(is_old)
    checked = await asyncio.to_thread(check, own.parts)
    assert checked.returncode == 1
    assert "WRONG  the standby may have missed the commits of" in checked.stdout
    await standby.execute("SELECT pg_wal_replay_resume()")
    await standby.close()
    await until_async(partial(is_status, reader, "/readyz", 200))
    # Without its primary, a standby that starts cannot know how old it is.
    assert own.parts.recording.terminate() == 0
    await asyncio.to_thread(kill_server, own.parts.primary)
    await asyncio.to_thread(kill_server, own.parts.standby)
    await asyncio.to_thread(own.parts.standby.start)
    await until_async(partial(is_status, reader, "/orders/KOM1", 200))
    problem = await reader.get("/readyz", 503)
    assert problem["cause"] == "replica_behind"


def check(parts: Services) -> Any:
    return run_command(parts.reading.state_dir, "check", **parts.reading.settings)


async def test_the_check_accepts_a_reader_of_a_standby(shared: Pair) -> None:
    """The only faults that it finds are those of a test's server; commands that write are refused."""
    checked = await asyncio.to_thread(check, shared.parts)
    lines = checked.stdout.splitlines()
    assert "ok     the service only reads, and refuses webhooks with 503" in lines
    assert any(line.startswith("ok     the standby may have missed the commits of 0.") for line in lines), lines
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert [line for line in wrong if "fsync" not in line and "full_page_writes" not in line] == []
    run = partial(
        run_command, shared.parts.reading.state_dir, "keys", "create", "a", **shared.parts.reading.settings
    )
    created = await asyncio.to_thread(run)
    assert created.returncode == 1
    assert "read-only transaction" in created.stderr


@pytest.mark.long
async def test_a_reader_stays_a_reader_after_a_promotion(own: Pair) -> None:
    """A promoted server's reader still records nothing; a service that records can use the server at once."""
    recorder, reader = own.recorder, own.reader
    position = (await recorder.webhook("KOM1"))["position"]
    await reader.get(f"/orders/KOM1?after_position={position}")
    assert own.parts.recording.terminate() == 0
    await asyncio.to_thread(kill_server, own.parts.primary)
    standby = await asyncpg.connect(own.parts.standby.dsn)
    await promote(standby)
    await standby.close()
    service = RunningService(own.parts.recording.state_dir, DATABASE_URL=own.parts.standby.dsn)
    with ended_service(service):
        receipt = await Client(reader.session, service.port).webhook("KOM1", "Diterima")
        path = f"/orders/KOM1?after_position={receipt['position']}"
        await until_async(partial(is_status, reader, path, 200), lambda: own.parts.reading.output)
        assert (await reader.get(path))["status"] == "delivered"
        assert (await reader.get("/readyz"))["role"] == "reader"
        assert await reader.status("PUT", "/webhook", b'{"order_no":"KOM1","status":"Selesai"}') == 503
        assert (await reader.get("/orders/KOM1"))["version"] == 2
    assert "Traceback" not in own.parts.reading.output
    assert own.parts.reading.terminate() == 0
