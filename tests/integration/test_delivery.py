"""The deliverer with a clock of its own: endpoints that are down for long, schedules, and limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.background import supervise
from service.database.connections import DedicatedConnection, connect, connected
from service.database.log_identity import LogIdentity
from service.database.operations import Actor
from service.event_log.follow import Log
from service.features.subscriptions.check import check
from service.features.subscriptions.delivery import IN_FLIGHT_MAX
from service.features.subscriptions.dispatcher import Dispatcher
from service.features.subscriptions.endpoint import PROBE_SECONDS_MAX
from service.features.subscriptions.held_orders import HELD_ORDERS_MAX, retry_held
from service.features.subscriptions.progress import Progress
from service.features.subscriptions.sending import Sender
from service.features.subscriptions.settings import SubscriptionsSettings
from service.features.subscriptions.subscription import (
    Declaration,
    Include,
    add_subscription,
    find_subscription,
)
from service.maintenance.erasure import erase_order, settle
from tests.support.client import serving_client
from tests.support.receiver import Received, Receiver, hang, receiving
from tests.support.waiting import until_async

ORDERS = 400
NETWORK = "127.0.0.0/8"


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        """Return the time."""
        return self.now

    def move(self, **duration: float) -> None:
        """Move it forward."""
        self.now += timedelta(**duration)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return an endpoint."""
    async with receiving() as receiver:
        yield receiver


@asynccontextmanager
async def dispatching(dsn: str, clock: Clock, retry_seconds: tuple[float, ...]) -> AsyncIterator[Dispatcher]:
    """Deliver without a service, by a clock."""
    log = LogIdentity()
    to_database = partial(connect, dsn, log.read)
    reading, saving = DedicatedConnection(to_database), DedicatedConnection(to_database)
    sender = Sender([ip_network(NETWORK)], log)
    dispatcher = Dispatcher(Progress(saving), Log(reading), sender, retry_seconds, clock)
    task = asyncio.create_task(supervise("deliver", dispatcher.run))
    try:
        yield dispatcher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await dispatcher.stop()
        await reading.close()
        await saving.close()


async def record(dsn: str, orders: int) -> None:
    """Record one event for each of some orders, and two for the first."""
    # This service delivers too.
    async with serving_client(dsn, subscription_networks=NETWORK) as client:
        await asyncio.gather(*(client.webhook(f"KOM{number}") for number in range(orders)))
        await client.webhook("KOM0", "Diterima")


async def add(connection: Connection, receiver: Receiver, *include: Include) -> Any:
    """Add a subscription for all events."""
    declaration = Declaration(receiver.url, [], include=include)
    added = await add_subscription(connection, declaration, 0, Actor("cli", None))
    return added["subscription_id"]


def refuse(status: int) -> Callable[[Received], Awaitable[web.StreamResponse]]:
    """Return a response function with one status."""

    async def respond(_received: Received) -> web.StreamResponse:
        return web.Response(status=status)

    return respond


async def test_an_endpoint_that_is_down_for_an_hour(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """Few orders are held, the rest of the log is not read, and a request a minute finds out when it is up."""
    await record(dsn, ORDERS)
    subscription_id = await add(connection, receiver)
    receiver.respond = refuse(503)
    clock = Clock()
    async with dispatching(dsn, clock, (0, 5, 7_200, 7_200)):
        await until_async(is_quiet(receiver))
        first = await find_subscription(connection, subscription_id)
        for _ in range(60):
            before = len(receiver.requests)
            clock.move(minutes=1)
            await receiver.wait_for_requests(before + 1)
        await until_async(is_quiet(receiver))
        last = await find_subscription(connection, subscription_id)
        assert first["lag_events"] > ORDERS // 4
        assert 1 <= first["held_orders"] <= last["held_orders"] <= 4 * IN_FLIGHT_MAX
        assert len(receiver.requests) < ORDERS
        receiver.respond = refuse(200)
        clock.move(seconds=PROBE_SECONDS_MAX)
        await receiver.wait_for(ORDERS + 1)
        await until_async(partial(is_done, connection, subscription_id))
    assert receiver.out_of_order() == []
    assert len({*receiver.places()}) == ORDERS + 1


async def test_what_waits_for_an_endpoint_that_is_down_is_erased(
    dsn: str, owner_dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """Neither the events that were read nor what the endpoint said of them leave the service, or stay in it."""
    orders = [f"KOM{number}" for number in range(4 * IN_FLIGHT_MAX)]
    async with serving_client(dsn) as client:
        for order_no in orders:
            body = {"order_no": order_no, "status": "Dikirim", "buyer": "Budi"}
            await client.raw(json.dumps(body).encode())
    await add(connection, receiver, "body")

    async def repeat_and_refuse(received: Received) -> web.StreamResponse:
        return web.Response(status=503, body=received.raw)

    receiver.respond = repeat_and_refuse
    clock = Clock()
    saved = "SELECT count(*) FROM held_orders WHERE last_error ~ 'Budi'"
    async with dispatching(dsn, clock, (0, 5, 7_200)):
        await until_async(is_quiet(receiver))
        assert await connection.fetchval(saved) > 0
        assert all(b"Budi" in one.raw for one in receiver.requests)
        async with connected(owner_dsn) as owner, connected(dsn) as own:
            for order_no in orders:
                await erase_order(owner, order_no, "asked for", Actor("cli", None))
            await settle(owner, own, orders)
        sent = len(receiver.requests)
        clock.move(seconds=PROBE_SECONDS_MAX)
        await receiver.wait_for_requests(sent + 1)
        await until_async(is_quiet(receiver))
        assert await connection.fetchval(saved) == 0
        assert not await connection.fetchval("SELECT bool_or(responses::text ~ 'Budi') FROM subscriptions")
        receiver.respond = refuse(200)
        clock.move(hours=2)
        await receiver.wait_for(len(orders))
    assert not any(b"Budi" in one.raw for one in receiver.requests[sent:])
    assert {order_no for order_no, _ in receiver.places()} == {*orders}


async def test_probes_cost_no_attempt(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """An endpoint that is down and slow has several probes at once. Each order keeps its schedule."""
    await record(dsn, ORDERS)
    subscription_id = await add(connection, receiver)
    receiver.respond = refuse(503)
    clock, answers = Clock(), asyncio.Event()

    async def refuse_later(_received: Received) -> web.StreamResponse:
        await answers.wait()
        return web.Response(status=503)

    async with dispatching(dsn, clock, (0, 7_200, 7_200)):
        await until_async(is_quiet(receiver))
        receiver.respond = refuse_later
        # Held orders and new ones are probed in turns.
        for _ in range(6):
            before = len(receiver.requests)
            clock.move(seconds=PROBE_SECONDS_MAX)
            await receiver.wait_for_requests(before + 1)
        answers.set()
        await until_async(partial(is_saved, connection, subscription_id, receiver))
    assert await connection.fetchval("SELECT max(attempts) FROM held_orders") == 1


@pytest.mark.attacks("connecting", "endpoint")
async def test_an_endpoint_that_never_answers(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """An endpoint gets so many requests at a time, and no further one before it answers one of them."""
    await record(dsn, ORDERS)
    await add(connection, receiver)
    receiver.respond = hang
    async with dispatching(dsn, Clock(), (0,)):
        await receiver.wait_for_requests(IN_FLIGHT_MAX)
        await until_async(is_quiet(receiver))
        assert len(receiver.requests) == IN_FLIGHT_MAX


async def test_an_endpoint_that_fails_for_some_orders(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """It seems to be down, but requests for other orders find out that it is up."""
    async with serving_client(dsn) as client:
        for number in range(80):
            await client.webhook(f"BAD{number}")
        for number in range(100):
            await client.webhook(f"GOOD{number}")
    subscription_id = await add(connection, receiver)

    async def respond(received: Received) -> web.StreamResponse:
        return web.Response(status=500 if received.order_no.startswith("BAD") else 200)

    async def are_delivered() -> bool:
        clock.move(seconds=PROBE_SECONDS_MAX)
        found = await find_subscription(connection, subscription_id)
        return (len(receiver.accepted), found["held_orders"], found["lag_events"]) == (100, 80, 0)

    receiver.respond = respond
    clock = Clock()
    async with dispatching(dsn, clock, (0, 86_400)):
        await until_async(partial(is_down, connection, subscription_id))
        await until_async(are_delivered)


async def is_down(connection: Connection, subscription_id: Any) -> bool:
    """Return whether the endpoint is known to be down."""
    return (await find_subscription(connection, subscription_id))["down_since"] is not None


def is_quiet(receiver: Receiver) -> Callable[[], Awaitable[bool]]:
    """Return a condition: no request arrives for a while, as far as a test can tell."""
    counts: list[int] = []

    async def quiet() -> bool:
        counts.append(len(receiver.requests))
        return len(counts) > 25 and counts[-1] > 0 and len({*counts[-25:]}) == 1

    return quiet


async def is_saved(connection: Connection, subscription_id: Any, receiver: Receiver) -> bool:
    """Return whether the result of every request that a receiver got is saved."""
    found = await find_subscription(connection, subscription_id)
    return found["delivered"] + found["failed"] == len(receiver.requests)


async def is_done(connection: Connection, subscription_id: Any) -> bool:
    """Return whether a subscription has nothing left to deliver."""
    found = await find_subscription(connection, subscription_id)
    return found["lag_events"] == 0 and found["held_orders"] == 0


async def test_the_schedule_of_one_order(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """The attempts follow the schedule, with a jitter of a tenth; after the last one the order stays held."""
    await record(dsn, 1)
    subscription_id = await add(connection, receiver)
    receiver.respond = refuse(500)
    clock = Clock()
    async with dispatching(dsn, clock, (0, 100, 1_000)) as dispatcher:
        for attempts, seconds in ((1, 90), (2, 900)):
            await receiver.wait_for_requests(attempts)
            held = await until_async(partial(attempted, connection, attempts))
            pause = (held["next_attempt_at"] - clock.now).total_seconds()
            assert seconds <= pause <= seconds * 11 / 9
            clock.move(seconds=pause + 0.1)
        held = await until_async(partial(attempted, connection, 3))
        assert held["next_attempt_at"] is None
        clock.move(days=30)
        dispatcher.wake()
        await until_async(partial(attempted, connection, 3))
    assert len(receiver.requests) == 3
    assert not await is_done(connection, subscription_id)


async def attempted(connection: Connection, attempts: int) -> Any:
    """Return the held order, if it was attempted so often."""
    return await connection.fetchrow("SELECT * FROM held_orders WHERE attempts = $1", attempts)


async def test_another_process_takes_over(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """Of two processes one delivers; when its session ends, the other one goes on, and repeats little."""
    await record(dsn, 20)
    subscription_id = await add(connection, receiver)
    clock = Clock()
    async with dispatching(dsn, clock, (0, 1)), dispatching(dsn, clock, (0, 1)):
        await receiver.wait_for(21)
        await until_async(partial(is_done, connection, subscription_id))
        locks = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND database IS NOT NULL"
        (pid,) = {row["pid"] for row in await connection.fetch(locks)}
        await connection.execute("SELECT pg_terminate_backend($1)", pid)
        await record(dsn, 30)
        await receiver.wait_for(21 + 31)
        await until_async(partial(is_done, connection, subscription_id))
    assert receiver.out_of_order() == []
    assert {order_no for order_no, _ in receiver.places()} == {f"KOM{number}" for number in range(30)}


async def test_an_undecodable_event_holds_its_order(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """An event that this release cannot read awaits an operator; the other orders go on."""
    insert = "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ($1, 1, $2, $3)"
    await connection.execute(insert, "KOM9", "order.unknown", b"{}")
    await record(dsn, 1)
    subscription_id = await add(connection, receiver)
    async with dispatching(dsn, Clock(), (0, 1)):
        await receiver.wait_for(2)
        held = await until_async(partial(attempted, connection, 0))
        found = await find_subscription(connection, subscription_id)
    assert (held["order_no"], held["next_attempt_at"]) == ("KOM9", None)
    assert found["held_orders"] == 1


async def test_too_many_held_orders(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """A subscription with too many held orders reads nothing further, and the log and ``check`` say so."""
    await record(dsn, 1)
    subscription_id = await add(connection, receiver)
    hold = """
        INSERT INTO held_orders (subscription_id, order_no, version, position, held_since, attempts)
        SELECT $1, 'OLD' || number, 1, 0, now(), 10 FROM generate_series(1, $2) AS number
    """
    await connection.execute(hold, subscription_id, HELD_ORDERS_MAX)
    clock = Clock()
    with capture_logs() as logs:
        async with dispatching(dsn, clock, (0, 1)):
            (logged,) = await until_async(partial(errors, logs))
            assert logged["held_orders"] == HELD_ORDERS_MAX
            findings = [one async for one in check(connection, SubscriptionsSettings(), ())]
            assert [one.text for one in findings if one.kind == "WRONG" and "holds 10,000 orders" in one.text]
            assert receiver.requests == []
            await retry_held(connection, subscription_id, "OLD1", Actor("cli", None))
            clock.move(minutes=1)
            await receiver.wait_for(2)
    assert len(await errors(logs)) == 1


async def errors(logs: Sequence[Any]) -> list[Any]:
    """Return the logged errors."""
    return [one for one in logs if one["log_level"] == "error"]
