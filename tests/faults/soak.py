"""A soak: hours of load in minutes, with processes that are killed and views that are rebuilt all the time."""

import asyncio
import json
import os
import signal
import statistics
import time
from functools import partial
from typing import Final

from tests.faults.fault import Fault
from tests.faults.maintenance import rebuild
from tests.faults.resources import Resources
from tests.faults.world import Layout, World
from tests.support.connections import OK, get
from tests.support.processes import worker_pids
from tests.support.waiting import until_async

PROCESSES: Final = 2
# A process is killed each time that this many seconds are over.
KILL_SECONDS: Final = 10.0
# The memory of the last third of the time, as a multiple of that of the first third.
MEMORY_RATIO_MAX: Final = 1.2
REBUILD_SECONDS_MAX: Final = 600.0
# One kill in this number hits the older process, so that the memory of a long-lived one is seen too.
KILLS_OF_OLDEST: Final = 8


def soak(seconds: float) -> Fault:
    """Return a fault that lasts for some seconds."""
    return Fault(
        "soak",
        f"{PROCESSES} processes for {seconds:,.0f} s, kills and rebuilds without a pause",
        Layout(given_postgres=True, processes=PROCESSES),
        partial(_soak, seconds),
    )


async def _soak(seconds: float, world: World) -> int:
    # The log grows to hundreds of thousands of events, and the load has the processor too.
    world.command_seconds_max = REBUILD_SECONDS_MAX
    until = time.monotonic() + seconds
    rebuilds = asyncio.create_task(_rebuild_until(until, world))
    memory = []
    kills = 0
    try:
        while time.monotonic() < until and not rebuilds.done():
            await asyncio.sleep(KILL_SECONDS)
            memory.append(_memory_mb(world))
            kills += 1
            workers = worker_pids(world.service)
            os.kill(workers[0] if kills % KILLS_OF_OLDEST == 0 else workers[-1], signal.SIGKILL)
            await until_async(partial(_are_ready, world, set(workers)))
        await rebuilds
    finally:
        rebuilds.cancel()
        await asyncio.gather(rebuilds, return_exceptions=True)
    third = max(1, len(memory) // 3)
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    world.violations.expect(
        last <= MEMORY_RATIO_MAX * first, f"memory grows: {first:.0f} MB at first, {last:.0f} MB at last"
    )
    world.remarks.append(
        f"{rebuilds.result()} rebuilds; memory of all processes {first:.0f} MB at first, {last:.0f} MB at last"
    )
    return kills


async def _rebuild_until(due: float, world: World) -> int:
    times = 0
    while time.monotonic() < due:
        await rebuild(world)
        times += 1
    return times


async def _are_ready(world: World, before: set[int]) -> bool:
    """Return whether another process has taken the place of a killed one, and all are ready."""
    if not set(worker_pids(world.service)) - before:
        return False
    answer = await world.connections.request(get("/readyz"))
    return (
        answer is not None and answer.status == OK and json.loads(answer.body)["ready_processes"] == PROCESSES
    )


def _memory_mb(world: World) -> float:
    pids = [world.service.process.pid, *worker_pids(world.service)]
    return sum(Resources.of(pid, world.port).memory_mb for pid in pids)
