"""Faults of processes: killed, stopped and suspended services, servers and backends."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from functools import partial
from typing import Final

from projections.views import VIEWS
from service.projecting.locks import HOLD_VIEW_LOCK
from tests.faults import mutants
from tests.faults.fault import expect_status, find_backend
from tests.faults.resources import children
from tests.faults.world import World, in_thread
from tests.support.connections import OK, UNAVAILABLE

# Longer than another process waits before it stands in for the leader of a view.
SUSPENDED_SECONDS: Final = 2.5
SUSPENDED_SHARE: Final = 0.3


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
        pid = await find_backend(connection, "%INSERT INTO order_events%", [])
        await connection.close()
        os.kill(pid, signal.SIGKILL)
        await world.load.recovered()
    return world.effort.times


async def end_postmaster(number: signal.Signals, world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        os.kill(world.postmaster_pid, number)
        await world.load.recovered()
    return world.effort.times


def suspend(postmaster: int) -> list[int]:
    """Suspend a server, and return its processes."""
    # The postmaster stops first, so that it cannot start another process in the meantime.
    os.kill(postmaster, signal.SIGSTOP)
    pids = [postmaster, *children(postmaster)]
    for pid in pids[1:]:
        os.kill(pid, signal.SIGSTOP)
    return pids


async def stand_still(seconds: float, world: World) -> int:
    began = time.monotonic()
    stopped = suspend(world.postmaster_pid)
    try:
        with world.outage():
            await expect_status(world, "/livez", OK)
            await expect_status(world, "/readyz", UNAVAILABLE)
            if seconds > world.effort.answered_seconds_max:
                await expect_status(world, "/orders/KOM-H1", UNAVAILABLE)
            await asyncio.sleep(began + seconds - time.monotonic())
    finally:
        for pid in reversed(stopped):
            os.kill(pid, signal.SIGCONT)
    await world.load.recovered()
    return 1


async def kill_listener(world: World) -> int:
    connection = await world.connect()
    known: list[int] = []
    try:
        for _ in range(world.effort.times):
            known.append(await find_backend(connection, "LISTEN%", known))
            await connection.execute("SELECT pg_terminate_backend($1)", known[-1])
            await world.pause()
        # The service must listen again.
        await find_backend(connection, "LISTEN%", known)
    finally:
        await connection.close()
    return world.effort.times


async def crash_before_projection(world: World) -> int:
    head = "SELECT max(notification_id) FROM order_events"
    for _ in range(2):
        await world.pause()
        connection = await world.connect()
        try:
            await connection.executemany(HOLD_VIEW_LOCK, [(view.name,) for view in VIEWS])
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


async def kill_in_turn(world: World) -> int:
    for number in range(2 * world.effort.times):
        await world.pause()
        world.services[number % 2].kill()
        await world.load.recovered()
        await world.start_service(number % 2)
    return 2 * world.effort.times


async def upgrade_slowly(world: World) -> int:
    """Kill, end or suspend one of two releases with different features, at random; then upgrade both.

    Each start of a release rebuilds the timeline, and leaves the other release without it.
    """
    other = world.services[1]
    command, settings = other.command, other.settings
    await in_thread(other.terminate)
    other.command = mutants.command(mutants.fold_otherwise)
    other.settings = settings | {"FEATURES": "none"}
    await world.start_service(1)
    times = 6 * world.effort.times
    for _ in range(times):
        await world.pause(0.5, 2.0)
        number = world.chance.randrange(2)
        service = world.services[number]
        if world.chance.random() < SUSPENDED_SHARE:
            service.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(SUSPENDED_SECONDS)
            service.process.send_signal(signal.SIGCONT)
        else:
            await in_thread(world.chance.choice((service.kill, service.terminate)))
            await world.start_service(number)
        await world.load.recovered()
    await in_thread(other.terminate)
    other.command, other.settings = command, settings
    await world.start_service(1)
    # It must also give the view back, whose release started first.
    await in_thread(world.service.terminate)
    await world.start_service()
    return times


# The signal that `pg_ctl stop -m immediate` sends.
stop_immediately: Final = partial(end_postmaster, signal.SIGQUIT)
