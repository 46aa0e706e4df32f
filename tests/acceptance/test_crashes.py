"""What a kill -9 costs: nothing that was acknowledged. Real processes, killed for real, under load."""

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests.acceptance.running import Load, RunningService, assert_exactly_once, run_command

BEFORE_SECONDS = 1.0
RECOVERED_SECONDS_MAX = 20.0
# The budget of one request by the settings, and room for a slow machine.
BUDGET_SECONDS = 3.0
ROOM_SECONDS = 2.0


async def loaded(load: Load, at_least: int = 50) -> "asyncio.Task[None]":
    """Start the load, and come back when it has got some answers."""
    task = asyncio.create_task(load.run())
    due = time.monotonic() + RECOVERED_SECONDS_MAX
    while len(load.acknowledged) < at_least:
        assert time.monotonic() < due, load.answers
        await asyncio.sleep(0.02)
    return task


async def recovered(load: Load, more: int = 50) -> None:
    """Wait until the load is acknowledged again."""
    target = len(load.acknowledged) + more
    due = time.monotonic() + RECOVERED_SECONDS_MAX
    while len(load.acknowledged) < target:
        assert time.monotonic() < due, load.answers
        await asyncio.sleep(0.02)


async def finish(load: Load, task: "asyncio.Task[None]") -> None:
    load.stopped = True
    await task
    assert set(load.answers) <= {200, 503}


def assert_views_equal_a_rebuild(state_dir: Path) -> None:
    verified = run_command(state_dir, "replay", "--verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr


async def test_kill_of_the_service(service: RunningService, state_dir: Path) -> None:
    """After kill -9 of the service and a restart, every acknowledged report is there exactly once."""
    load = Load(service.url)
    task = await loaded(load)
    await asyncio.sleep(BEFORE_SECONDS)
    service.kill()
    await finish(load, task)
    again = RunningService(state_dir).start()
    try:
        await assert_exactly_once(again.url, load)
        assert_views_equal_a_rebuild(state_dir)
    finally:
        again.end()


async def test_kill_of_postgresql(service: RunningService, state_dir: Path) -> None:
    """After kill -9 of the postmaster the service starts it again, and goes on by itself."""
    load = Load(service.url)
    task = await loaded(load)
    await asyncio.sleep(BEFORE_SECONDS)
    os.kill(service.postmaster_pid, signal.SIGKILL)
    await recovered(load)
    await finish(load, task)
    await assert_exactly_once(service.url, load)
    assert_views_equal_a_rebuild(state_dir)
    assert "was restarted" in service.output


async def test_kill_of_the_backend_that_commits(service: RunningService, state_dir: Path) -> None:
    """After kill -9 of the very backend that appends, what was in doubt is there once, either way."""
    load = Load(service.url)
    task = await loaded(load)
    for _ in range(3):
        connection = await asyncpg.connect(service.dsn)
        pid: int = await connection.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE query LIKE '%INSERT INTO order_events%' "
            "AND pid <> pg_backend_pid() ORDER BY query_start DESC LIMIT 1"
        )
        await connection.close()
        os.kill(pid, signal.SIGKILL)
        await recovered(load)
    await finish(load, task)
    await assert_exactly_once(service.url, load)
    assert_views_equal_a_rebuild(state_dir)


async def test_what_was_read_once_is_not_taken_back_by_a_crash(service: RunningService) -> None:
    """A read with after_position has the report, before a crash of PostgreSQL and after it, or it is 503."""
    async with aiohttp.ClientSession() as session:
        for number in range(3):
            body = {"order_no": f"KOM{number}", "status": "Dikirim"}
            async with session.put(f"{service.url}/webhook", json=body) as response:
                position = (await response.json())["position"]
            url = f"{service.url}/orders/KOM{number}?after_position={position}"
            async with session.get(url) as response:
                assert response.status == 200
            connection = await asyncpg.connect(service.dsn)
            pid: int = await connection.fetchval("SELECT pg_backend_pid()")
            os.kill(pid, signal.SIGKILL)
            statuses: set[int] = set()
            due = time.monotonic() + RECOVERED_SECONDS_MAX
            while time.monotonic() < due and 200 not in statuses:
                async with session.get(url) as response:
                    statuses.add(response.status)
            assert statuses <= {200, 503}
            assert 200 in statuses


async def test_postgresql_stopped_for_five_seconds(service: RunningService, state_dir: Path) -> None:
    """While PostgreSQL stands still answers are 503 within the budget; afterwards all is as before."""
    load = Load(service.url)
    task = await loaded(load)
    pids = await server_pids(service)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        async with aiohttp.ClientSession() as session:
            await asyncio.sleep(0.5)
            async with session.get(f"{service.url}/orders/KOM1") as response:
                assert response.status == 503
                assert response.headers["Retry-After"]
            async with session.get(f"{service.url}/readyz") as response:
                assert response.status == 503
            async with session.get(f"{service.url}/livez") as response:
                assert response.status == 200
        await asyncio.sleep(max(0.0, 5.0 - (time.monotonic() - began)))
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)
    await recovered(load)
    await finish(load, task)
    assert load.answers[503] > 0
    assert load.slowest < BUDGET_SECONDS + ROOM_SECONDS
    await assert_exactly_once(service.url, load)
    assert_views_equal_a_rebuild(state_dir)


async def server_pids(service: RunningService) -> list[int]:
    connection = await asyncpg.connect(service.dsn)
    rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    await connection.close()
    return [service.postmaster_pid, *(row[0] for row in rows)]


async def test_sigterm_with_a_body_that_is_half_here(service: RunningService) -> None:
    """SIGTERM: exit code 0 in time, what was taken is answered, a half-sent body is not waited for."""
    load = Load(service.url)
    task = await loaded(load)
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"PUT /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        code = await asyncio.to_thread(service.terminate)
    await finish(load, task)
    assert code == 0
    again = RunningService(service.state_dir).start()
    try:
        await assert_exactly_once(again.url, load)
    finally:
        again.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_its_data_is_there_again(state_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM alike: exit code 0, no process left, and the next start has the data."""
    service = RunningService(state_dir).start()
    postmaster = service.postmaster_pid
    sent = run_command(state_dir, "send", "KOM1", "AWB1", "Dikirim", "--url", f"{service.url}/webhook")
    assert sent.returncode == 0, sent.stderr
    service.process.send_signal(number)
    assert service.process.wait(15) == 0, service.output
    with pytest.raises(ProcessLookupError):
        os.kill(postmaster, 0)
    again = RunningService(state_dir).start()
    audit = run_command(state_dir, "audit", "KOM1")
    again.end()
    assert "Dikirim" in audit.stdout
