"""A soak: hours of load in minutes, with services that are killed and views that are rebuilt all the time."""

import asyncio
import statistics
import time
from functools import partial
from typing import Final

from tests.faults.fault import Fault
from tests.faults.maintenance import rebuild
from tests.faults.world import Layout, World

SERVICES: Final = 2
# A service is killed each time that this many seconds are over.
KILL_SECONDS: Final = 10.0
# The memory of the last third of the time, as a multiple of that of the first third.
MEMORY_RATIO_MAX: Final = 1.2
REBUILD_SECONDS_MAX: Final = 600.0
# One kill in this number hits the first service, so that the memory of a long-lived one is seen too.
KILLS_OF_FIRST: Final = 8


def soak(seconds: float) -> Fault:
    """Return a fault that lasts for some seconds."""
    return Fault(
        "soak",
        f"{SERVICES} services for {seconds:,.0f} s, kills and rebuilds without a pause",
        Layout(given_postgres=True, services=SERVICES),
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
            number = 0 if kills % KILLS_OF_FIRST == 0 else SERVICES - 1
            world.services[number].kill()
            await world.start_service(number)
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
        f"{rebuilds.result()} rebuilds; memory of both services {first:.0f} MB at first, {last:.0f} MB at last"
    )
    return kills


async def _rebuild_until(due: float, world: World) -> int:
    times = 0
    while time.monotonic() < due:
        await rebuild(world)
        times += 1
    return times


def _memory_mb(world: World) -> float:
    return sum(one.memory_mb for one in world.resources())
