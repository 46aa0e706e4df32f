"""The faults. Each breaks something several times while the load continues."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from projections.postgres_errors import Connection
from service.database.schema import VIEWS
from tests.faults.proxy import Cut
from tests.faults.resources import children
from tests.faults.world import Layout, SkippedError, World, in_thread
from tests.support.connections import OK, UNAVAILABLE, get
from tests.support.load import Load
from tests.support.waiting import PATIENCE_SECONDS

LOCKED_SECONDS: Final = 10.0
# More than the pool's connections, so that each of them is used.
READS_AT_ONCE: Final = 16
DISK_MB: Final = 512
# Longer than the time limit of a request.
DISK_FULL_SECONDS: Final = 5.0
DISKS_FILLED: Final = 2
FAILED_SYNCS: Final = 2
PAGE_BYTES: Final = 4096

# With a commit this slow, one machine can both serve the capacity and send three times as much.
COMMIT_SECONDS: Final = 0.2
CAPACITY_CALLERS: Final = 1_024
CAPACITY_SECONDS: Final = 6.0
RAMP_SECONDS: Final = 1.0
OVERLOAD: Final = 3.0
OVERLOAD_SECONDS: Final = 20.0
OVERLOAD_CONNECTIONS: Final = 2_000
GOODPUT_MIN: Final = 0.8
ACCEPTED_P99_SECONDS_MAX: Final = 1.0
OVERLOAD_MEMORY_MB_MAX: Final = 100.0

SLOW_SOCKETS: Final = 500
# The service's own limit, plus a margin for a busy machine.
SLOW_SECONDS_MAX: Final = 10.0 + 3.0
QUIET_SECONDS: Final = 3.0
P99_ROOM: Final = 5.0
# Below this value, a multiple of a quiet p99 is noise of the scheduler.
P99_NOISE_SECONDS: Final = 0.1

REPEATED_REPORTS: Final = 1_000
REPEATS: Final = 46
REPEATING_CALLERS: Final = 32


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    claim: str
    layout: Layout
    # Breaks something, and returns how often.
    break_it: Callable[[World], Awaitable[int]]
    is_short: bool = False


OWN: Final = Layout()
GIVEN: Final = Layout(given_postgres=True)
PROXIED: Final = Layout(given_postgres=True, through_proxy=True)


async def kill_service(world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        world.service.kill()
        await world.start_service()
        await world.load.recovered()
    return world.effort.times


async def terminate_service(world: World) -> int:
    with socket.create_connection(("127.0.0.1", world.port)) as half:
        half.sendall(b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await world.pause()
        began = time.monotonic()
        try:
            code = await in_thread(world.service.terminate)
        except subprocess.TimeoutExpired:
            code = -1
        took = time.monotonic() - began
    world.violations.expect(code == 0, "SIGTERM did not end it in order")
    world.remarks.append(f"exit code {code} after {took:.1f} s")
    await world.start_service()
    return 1


async def kill_backend(world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        connection = await world.connect()
        pid = await _backend(connection, "%INSERT INTO order_events%", [])
        await connection.close()
        os.kill(pid, signal.SIGKILL)
        await world.load.recovered()
    return world.effort.times


async def _backend(connection: Connection, statement: str, known: list[int]) -> int:
    """Return the server process whose last statement matches, except the known ones."""
    find = """
        SELECT pid FROM pg_stat_activity
        WHERE query LIKE $1 AND pid <> pg_backend_pid() AND pid <> ALL($2::int[])
        ORDER BY query_start DESC LIMIT 1
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (pid := await connection.fetchval(find, statement, known)) is None:  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.05)
    return int(pid)


async def end_postmaster(number: signal.Signals, world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        os.kill(world.postmaster_pid, number)
        await world.load.recovered()
    return world.effort.times


async def stand_still(seconds: float, world: World) -> int:
    postmaster = world.postmaster_pid
    stopped = [postmaster]
    began = time.monotonic()
    try:
        # The postmaster stops first, so that it cannot start another process in the meantime.
        os.kill(postmaster, signal.SIGSTOP)
        for pid in children(postmaster):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        await _expect(world, "/livez", OK)
        await _expect(world, "/readyz", UNAVAILABLE)
        if seconds > world.effort.answered_seconds_max:
            await _expect(world, "/orders/KOM-H1", UNAVAILABLE)
        await asyncio.sleep(began + seconds - time.monotonic())
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
    await world.load.recovered()
    return 1


async def lock_table(world: World) -> int:
    connection = await world.connect()
    refused = world.connections.answers[UNAVAILABLE]
    try:
        await connection.execute("BEGIN; LOCK TABLE order_events IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(LOCKED_SECONDS)
    finally:
        await connection.close()
    _expect_more_refused(world, refused)
    await world.load.recovered()
    await asyncio.gather(*(_expect(world, "/orders", OK) for _ in range(READS_AT_ONCE)))
    await _expect(world, "/readyz", OK)
    return 1


def _expect_more_refused(world: World, before: int) -> None:
    refused = world.connections.answers[UNAVAILABLE] - before
    world.violations.expect(refused > 0, "nothing was refused: this broke nothing")


async def _expect(world: World, path: str, status: int) -> None:
    answer = await world.connections.request(get(path))
    got = answer.status if answer is not None else "no answer"
    world.violations.expect(got == status, f"GET {path}: {got} in place of {status}")


async def cut(where: Cut, world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        await world.proxy.cut(where, PATIENCE_SECONDS)
        await world.load.recovered()
    return world.effort.times


async def fill_disk(world: World) -> int:
    filler = world.state_dir / "filler"
    for _ in range(DISKS_FILLED):
        await world.pause()
        refused = world.connections.answers[UNAVAILABLE]
        try:
            _fill(filler)
            await asyncio.sleep(DISK_FULL_SECONDS)
        finally:
            filler.unlink(missing_ok=True)
        _expect_more_refused(world, refused)
        await world.load.recovered()
    return DISKS_FILLED


def _fill(filler: Path) -> None:
    """Fill the disk completely while other processes also write to it."""
    step = DISK_MB * 1024 * 1024
    size = 0
    with filler.open("wb") as file:
        while step >= PAGE_BYTES:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError:
                step //= 2


async def fail_fdatasync(world: World) -> int:
    if shutil.which("strace") is None:
        raise SkippedError("strace is not installed")
    server_log = world.state_dir / "postgres.log"
    for times in range(1, FAILED_SYNCS + 1):
        await world.pause()
        attached = [part for pid in children(world.postmaster_pid) for part in ("-p", str(pid))]
        inject = ("-f", "-qq", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO")
        strace = await asyncio.create_subprocess_exec(
            "strace", *inject, *attached, stderr=asyncio.subprocess.PIPE
        )
        try:
            # strace ends with the processes that it is attached to: they must panic and recover from the disk.
            async with asyncio.timeout(PATIENCE_SECONDS):
                _, said = await strace.communicate()
            if server_log.read_text(encoding="utf-8").count("PANIC") < times:
                raise SkippedError(f"strace cannot make fdatasync fail: {said.decode().strip()}")
        except TimeoutError:
            world.violations.lines.append("commits went on without fdatasync")
        finally:
            if strace.returncode is None:
                strace.kill()
                await strace.wait()
        await world.load.recovered()
    return FAILED_SYNCS


async def kill_listener(world: World) -> int:
    connection = await world.connect()
    known: list[int] = []
    try:
        for _ in range(world.effort.times):
            known.append(await _backend(connection, "LISTEN%", known))
            await connection.execute("SELECT pg_terminate_backend($1)", known[-1])
            await world.pause()
        # The service must listen again.
        await _backend(connection, "LISTEN%", known)
    finally:
        await connection.close()
    return world.effort.times


async def crash_before_projection(world: World) -> int:
    hold = "SELECT pg_advisory_lock(hashtextextended('view ' || name, 0)) FROM unnest($1::text[]) AS name"
    head = "SELECT max(notification_id) FROM order_events"
    for _ in range(2):
        await world.pause()
        connection = await world.connect()
        try:
            await connection.execute(hold, [view.name for view in VIEWS])
            position: int = await connection.fetchval("SELECT position FROM current_status.projection")
            await world.load.recovered()
            behind = await connection.fetchval(head) - position
            world.service.kill()
            stands: int = await connection.fetchval("SELECT position FROM current_status.projection")
            world.violations.expect(behind > 0 and stands == position, "the view was not held back")
        finally:
            await connection.close()
        await world.start_service()
        await world.load.recovered()
    return 2


async def overload(world: World) -> int:
    world.proxy.append_delay_seconds = COMMIT_SECONDS
    await world.connections.open(OVERLOAD_CONNECTIONS)
    measured = world.new_load("CAP")
    until = time.monotonic() + CAPACITY_SECONDS
    steady = time.monotonic() + RAMP_SECONDS
    await measured.attempt_all(_bodies_until(measured, until), CAPACITY_CALLERS)
    counted = sum(steady < one.at < until for one in measured.acknowledged)
    capacity = counted / (CAPACITY_SECONDS - RAMP_SECONDS)

    load = world.new_load("OVR")
    load.retries = False
    before = world.resources()[0].memory_mb
    most = before
    began = time.monotonic()
    running = world.background(load.run(OVERLOAD * capacity))
    while time.monotonic() < began + OVERLOAD_SECONDS:
        await asyncio.sleep(0.25)
        most = max(most, world.resources()[0].memory_mb)
    goodput = sum(one.at < began + OVERLOAD_SECONDS for one in load.acknowledged) / OVERLOAD_SECONDS
    await load.finish()
    await running
    world.proxy.append_delay_seconds = 0.0
    p99 = load.p99_seconds(began)
    world.remarks.append(
        f"capacity {capacity:.0f}/s, goodput {goodput / capacity:.2f} of it, accepted p99 {p99:.2f} s, "
        f"memory +{most - before:.0f} MB, {load.skipped} not sent"
    )
    in_time = world.expect_in_time
    in_time(goodput >= GOODPUT_MIN * capacity, f"goodput is {goodput / capacity:.2f} of the capacity")
    in_time(p99 < ACCEPTED_P99_SECONDS_MAX, f"p99 of the accepted is {p99:.2f} s")
    world.violations.expect(most - before <= OVERLOAD_MEMORY_MB_MAX, f"memory grew by {most - before:.0f} MB")
    return 1


def _bodies_until(load: Load, until: float) -> Iterator[str]:
    while time.monotonic() < until:
        yield load.next_body()[0]


async def slow_sockets(world: World) -> int:
    quiet = time.monotonic()
    await asyncio.sleep(QUIET_SECONDS)
    before = world.load.p99_seconds(quiet)
    began = time.monotonic()
    ended = await asyncio.gather(*(_trickle(world.port, number) for number in range(SLOW_SOCKETS)))
    p99 = world.load.p99_seconds(began)
    still_open = sum(seconds > SLOW_SECONDS_MAX for seconds in ended)
    in_time = world.expect_in_time
    in_time(still_open == 0, f"{still_open} slow connections are open after {SLOW_SECONDS_MAX:.0f} s")
    most = max(P99_ROOM * before, P99_NOISE_SECONDS)
    in_time(p99 <= most, f"p99 went from {before:.3f} to {p99:.3f} s")
    world.remarks.append(
        f"closed after {max(ended):.1f} s at most, p99 {before * 1e3:.0f} to {p99 * 1e3:.0f} ms"
    )
    return 1


async def _trickle(port: int, number: int) -> float:
    """Send a header or a body at a byte a second, and return the seconds until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if number % 2:
        writer.write(b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    else:
        writer.write(b"PUT /webhook HTTP/1.1\r\nX")
    began = time.monotonic()
    try:
        while time.monotonic() < began + SLOW_SECONDS_MAX + 1.0:
            writer.write(b" " if number % 2 else b"x")
            try:
                async with asyncio.timeout(1.0):
                    await reader.read()
                    break
            except TimeoutError:
                continue
    except OSError:
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - began


async def repeat_46_times(world: World) -> int:
    texts = [
        json.dumps({"order_no": f"REP{number}", "status": "Dikirim"}) for number in range(REPEATED_REPORTS)
    ]
    all_of_them = texts * REPEATS
    world.chance.shuffle(all_of_them)
    load = world.new_load("REP")
    began = time.monotonic()
    await load.attempt_all(iter(all_of_them), REPEATING_CALLERS)
    world.remarks.append(f"{len(all_of_them) / (time.monotonic() - began):.0f}/s")
    connection = await world.connect()
    wrong = await connection.fetchval(
        "SELECT count(*) FROM (SELECT count(*) AS events FROM order_events GROUP BY originator_id) AS orders "
        "WHERE events <> $1",
        REPEATS,
    )
    await connection.close()
    unanswered = len(all_of_them) - len(load.acknowledged)
    world.violations.expect(unanswered == 0, f"{unanswered} of the repeats were not answered 200")
    world.violations.expect(wrong == 0, f"{wrong} orders have not {REPEATS} events")
    return REPEATS


async def kill_in_turn(world: World) -> int:
    for number in range(2 * world.effort.times):
        await world.pause()
        world.services[number % 2].kill()
        await world.load.recovered()
        await world.start_service(number % 2)
    return 2 * world.effort.times


# The signal that `pg_ctl stop -m immediate` sends.
stop_immediately: Final = partial(end_postmaster, signal.SIGQUIT)

FAULTS: Final = (
    Fault("kill-service", "kill -9 of the service", OWN, kill_service, is_short=True),
    Fault("sigterm", "SIGTERM with a half-sent body", OWN, terminate_service),
    Fault("kill-backend", "kill -9 of a database backend", OWN, kill_backend),
    Fault(
        "kill-postmaster",
        "kill -9 of the postmaster",
        OWN,
        partial(end_postmaster, signal.SIGKILL),
        is_short=True,
    ),
    Fault("stop-immediate", "pg_ctl stop -m immediate", OWN, stop_immediately),
    Fault("still-2s", "SIGSTOP of PostgreSQL for 2 s", OWN, partial(stand_still, 2.0)),
    Fault("still-10s", "SIGSTOP of PostgreSQL for 10 s", OWN, partial(stand_still, 10.0)),
    Fault("lock-table", "a table lock held for 10 s", OWN, lock_table),
    Fault("cut-statement", "connection cut mid-statement", PROXIED, partial(cut, Cut.MID_STATEMENT)),
    Fault("cut-commit", "connection cut after COMMIT", PROXIED, partial(cut, Cut.AFTER_COMMIT), is_short=True),
    Fault("disk-full", "disk full", Layout(disk_mb=DISK_MB), fill_disk),
    Fault("fdatasync", "fdatasync fails", OWN, fail_fdatasync),
    Fault("kill-listener", "LISTEN connection killed", OWN, kill_listener),
    Fault("before-projection", "crash between append and projection", GIVEN, crash_before_projection),
    Fault(
        "overload",
        "3 times the capacity for 20 s",
        Layout(given_postgres=True, through_proxy=True, has_load=False),
        overload,
    ),
    Fault("slow-sockets", "500 slow sockets", OWN, slow_sockets),
    Fault("repeats", "1,000 reports sent 46 times", Layout(has_load=False), repeat_46_times),
    Fault("two-services", "two services killed in turn", Layout(given_postgres=True, services=2), kill_in_turn),
)
