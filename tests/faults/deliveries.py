"""Deliveries to a shop that fails, by services that are killed: nothing lost, nothing out of order."""

import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from typing import Final

import aiohttp

from tests.faults.fault import Fault
from tests.faults.shop import CAUGHT_UP, SETTINGS, ask
from tests.faults.world import Layout, World
from tests.support.receiver import Receiver, is_signed, receiving, troubled
from tests.support.waiting import until_async

FAILING_SHARE: Final = 0.2
RETRY_SECONDS: Final = "0,1,1,2,2,5,5,5,5,5"
OWN_SETTINGS: Final = {**SETTINGS, "SUBSCRIPTION_RETRY_SECONDS": RETRY_SECONDS}
# A hot order that never ends could not be delivered: one event in five costs it a second or more.
REPORTS_BY_ORDER: Final = 6
# Of the table of faults. With --deliveries N, the run ends after N events.
EVENTS: Final = 3_000
KILL_SECONDS: Final = 2.0
LONG_KILL_SECONDS: Final = 10.0
LONG_PER_SECOND: Final = 600.0
# After the last event, the events of the longest schedule are still to come.
CAUGHT_UP_SECONDS_MAX: Final = 180.0
EVENTS_OF_LOG: Final = "SELECT originator_id, originator_version FROM order_events"

TWO_SERVICES: Final = Layout(given_postgres=True, services=2, settings=OWN_SETTINGS)
ONE_SERVICE: Final = Layout(settings=OWN_SETTINGS)


async def kill_a_service(world: World, number: int) -> None:
    """Kill one of the services, and start it again."""
    world.services[number % len(world.services)].kill()
    await world.load.recovered()
    await world.start_service(number % len(world.services))


async def kill_the_server(world: World, _number: int) -> None:
    """Kill PostgreSQL, which its service starts again."""
    os.kill(world.postmaster_pid, signal.SIGKILL)
    await world.load.recovered()


async def deliver(
    events: int, kill_seconds: float, kill: Callable[[World, int], Awaitable[None]], world: World
) -> int:
    """Deliver to a failing shop under load and kills, replay half-way, and make the account."""
    async with receiving() as shop, aiohttp.ClientSession(f"http://127.0.0.1:{world.port}") as session:
        shop.respond = troubled(world.chance, FAILING_SHARE)
        world.load.reports_by_order = REPORTS_BY_ORDER
        body = {"url": shop.url, "verdicts": [], "from_position": 0}
        added = await ask(session, "POST", "/subscriptions", body)
        path = f"/subscriptions/{added['subscription_id']}"
        has_replayed = False
        for kills in count():
            due = time.monotonic() + kill_seconds
            await until_async(partial(_is_due, due, world, events))
            if not has_replayed and len(world.acknowledged()) > events // 2:
                await ask(session, "POST", f"{path}/replay", {"from_position": 0})
                has_replayed = True
            if len(world.acknowledged()) >= events:
                break
            await kill(world, kills)
        await world.load.quiet()
        await _account(world, shop, added["secret"])
        world.load.resume()
    return kills


async def _is_due(due: float, world: World, events: int) -> bool:
    return time.monotonic() > due or len(world.acknowledged()) >= events


async def _account(world: World, shop: Receiver, secret: str) -> None:
    due = time.monotonic() + CAUGHT_UP_SECONDS_MAX
    connection = await world.connect()
    try:
        ((is_done, _, _, delivered, failed),) = await connection.fetch(CAUGHT_UP)
        while not is_done and time.monotonic() < due:
            await world.pause()
            ((is_done, _, _, delivered, failed),) = await connection.fetch(CAUGHT_UP)
        expected = {(order_no, version) for order_no, version in await connection.fetch(EVENTS_OF_LOG)}
    finally:
        await connection.close()
    world.violations.expect(is_done, "the subscription did not catch up")
    places = shop.places()
    world.violations.add("lost deliveries", [f"{place}" for place in sorted(expected - {*places})])
    world.violations.add("deliveries out of order", shop.out_of_order())
    world.violations.add("unknown deliveries", [f"{place}" for place in sorted({*places} - expected)])
    unsigned = [one.message_id for one in shop.accepted[-1_000:] if not is_signed(one, secret)]
    world.violations.add("deliveries without a valid signature", unsigned)
    world.violations.expect(
        shop.in_flight_of_order_max <= 1 or len(world.services) > 1 or bool(failed),
        "two requests of one order at once",
    )
    world.remarks.append(
        f"{len(expected):,} events, {len(shop.requests):,} requests, {FAILING_SHARE:.0%} of them failing: "
        f"lost {len(expected - {*places})}, out of order {len(shop.out_of_order())}, "
        f"repeated {len(places) - len({*places}):,}; saved as {delivered:,} delivered, {failed:,} failed"
    )


def long_deliveries(events: int) -> list[Fault]:
    """Return the two faults with so many events, and a kill every ten seconds."""
    return [
        Fault(
            name,
            f"{events:,} deliveries, {claim}",
            Layout(
                given_postgres=layout.given_postgres,
                services=layout.services,
                settings=OWN_SETTINGS,
                per_second=LONG_PER_SECOND,
            ),
            # Each service is killed every ten seconds.
            partial(deliver, events, LONG_KILL_SECONDS / layout.services, kill),
        )
        for name, claim, layout, kill in (
            ("long-deliveries", "two services killed in turn", TWO_SERVICES, kill_a_service),
            ("long-deliveries-server", "PostgreSQL killed", ONE_SERVICE, kill_the_server),
        )
    ]


DELIVERIES: Final = (
    Fault(
        "deliveries",
        "deliveries to a failing shop, two services killed",
        TWO_SERVICES,
        partial(deliver, EVENTS, KILL_SECONDS, kill_a_service),
    ),
    Fault(
        "deliveries-server",
        "deliveries to a failing shop, PostgreSQL killed",
        ONE_SERVICE,
        partial(deliver, EVENTS, KILL_SECONDS, kill_the_server),
    ),
)
