"""Traffic that a service must endure: more than its capacity, and every report many times."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Final

from tests.faults.world import World
from tests.support.load import Load

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

REPEATED_REPORTS: Final = 1_000
REPEATS: Final = 46
REPEATING_CALLERS: Final = 32


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
