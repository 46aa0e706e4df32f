"""Stalls: locks that other sessions hold for longer or shorter than a report's time."""

import asyncio
from collections.abc import Sequence
from typing import Final

from service.event_log.store import APPEND_LOCK
from tests.faults.fault import expect_more_refused, expect_status, until_ready
from tests.faults.world import World
from tests.support.connections import OK, UNAVAILABLE

LOCKED_SECONDS: Final = 10.0
# More than the pool's connections, so that each of them is used.
READS_AT_ONCE: Final = 16

STALLS_PER_SECOND: Final = 100.0
# Shorter than a report's time of 3 s by far and by little, and longer by little and by far.
STALLS_SECONDS: Final = (0.5, 2.9, 3.1, 10.0)
REPORT_SECONDS: Final = 3.0
# The service's event loop reads the clock once for each turn, so a time limit may end a little early.
CLOCK_SECONDS: Final = 0.02


async def lock_table(world: World) -> int:
    connection = await world.connect()
    refused = world.connections.answers[UNAVAILABLE]
    try:
        await connection.execute("BEGIN; LOCK TABLE order_events IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(LOCKED_SECONDS)
    finally:
        await connection.close()
    expect_more_refused(world, refused)
    await world.load.recovered()
    await asyncio.gather(*(expect_status(world, "/orders", OK) for _ in range(READS_AT_ONCE)))
    await until_ready(world)
    return 1


async def hold_append_lock(stalls_seconds: Sequence[float], world: World) -> int:
    """Hold the lock of every append several times. Only reports whose own time is over may be refused."""
    refused = world.load.refused
    for seconds in stalls_seconds:
        await world.pause()
        already = len(refused)
        connection = await world.connect()
        try:
            await connection.execute("SELECT pg_advisory_lock($1)", APPEND_LOCK)
            await asyncio.sleep(seconds)
        finally:
            await connection.close()
        await world.load.recovered()
        waits = refused[already:]
        world.remarks.append(f"{seconds} s: {len(waits)} refused")
        early = [wait for wait in waits if wait < REPORT_SECONDS - CLOCK_SECONDS]
        shortest = f", one after {min(early):.2f} s" if early else ""
        world.violations.expect(not early, f"a stall of {seconds} s: {len(early)} refused too early{shortest}")
        if seconds < REPORT_SECONDS:
            world.expect_in_time(not waits, f"a stall of {seconds} s: {len(waits)} of the reports were refused")
    return len(stalls_seconds)
