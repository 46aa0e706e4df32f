"""Stalls: locks that other sessions hold."""

import asyncio
from typing import Final

from tests.faults.fault import expect_more_refused, expect_status
from tests.faults.world import World
from tests.support.connections import OK, UNAVAILABLE

LOCKED_SECONDS: Final = 10.0
# More than the pool's connections, so that each of them is used.
READS_AT_ONCE: Final = 16


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
    await expect_status(world, "/readyz", OK)
    return 1
