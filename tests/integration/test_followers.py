"""Every follower of the log and every memory: after an erasure, none gives away what was erased."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from ipaddress import ip_network
from typing import Final, NamedTuple

import aiohttp
import pytest

from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import connected
from service.database.operations import Actor
from service.features.settings import Settings
from service.listening import serving
from service.maintenance.erasure import erase_order, settle
from service.projecting.position import ViewPosition
from tests.support.client import Client
from tests.support.receiver import Receiver, receiving
from tests.support.waiting import condition, until_async

EVERY_FEATURE: Final = ("pages", "subscriptions", "proofs")
# Each order with its buyer, who is named in the body and in an unknown word. The first one is erased.
ORDERS: Final = {"KOM1": "Budi", "KOM2": "Ani"}
ROWS: Final = "SELECT coalesce(string_agg(rows::text, ' '), '') FROM {table} AS rows"


class House(NamedTuple):
    """A service with every feature, whose memories hold two orders, one of which was erased a moment ago."""

    service: Service
    client: Client
    receiver: Receiver
    connection: Connection


def wanted(receiver: Receiver) -> dict[str, object]:
    """Return a declaration of a subscription for all events and their bodies."""
    return {"url": receiver.url, "verdicts": [], "include": ["body"]}


async def in_view(house: House, name: str) -> str:
    """Return all rows of a view."""
    view = next(view for view in VIEWS if view.name == name)
    tables = [ROWS.format(table=f"{view.name}.{table.name}") for table in view.tables]
    return " ".join([await house.connection.fetchval(table) for table in tables])


async def in_stream(house: House) -> str:
    """Return what a new live reader gets."""
    async with house.client.reading("/events/stream?after=0") as reader:
        return " ".join([(await reader.message())["data"] for _ in ORDERS])


async def in_delivery(house: House) -> str:
    """Return what a new subscription gets, and what an old one gets again."""
    await house.client.post("/subscriptions", 201, {**wanted(house.receiver), "from_position": 0})
    received = await house.receiver.wait_for(2 * len(ORDERS))
    return " ".join(one.raw.decode() for one in received[len(ORDERS) :])


async def in_proof(house: House) -> str:
    """Return the proofs of the orders."""
    return json.dumps([await house.client.get(f"/orders/{order_no}/proof?bodies=true") for order_no in ORDERS])


async def in_pages(house: House) -> str:
    """Return the log in pages."""
    return json.dumps(await house.client.get("/events"))


async def in_memory(house: House) -> str:
    """Return what memory gives away."""
    await house.service.core.memory.hear_in_time()
    return " ".join(repr(event.body) for _, event in house.service.core.memory.recall(0, 10))


# For each follower: what it gives away after an erasure. A new follower needs an experiment.
EXPERIMENTS: Final[dict[str, Callable[[House], Awaitable[str]]]] = {
    **{view.name: partial(in_view, name=view.name) for view in VIEWS},
    "live streams": in_stream,
    "subscriptions": in_delivery,
    "proofs": in_proof,
}
# They have no text of a report, or drop all events with an erased one.
NAMELESS: Final = {"current_status", "statistics", "the memory of commits"}
# What else gives events away.
READS: Final[dict[str, Callable[[House], Awaitable[str]]]] = {
    "the pages of the log": in_pages,
    "the memory of commits": in_memory,
}


@pytest.fixture
async def house(dsn: str, owner_dsn: str, connection: Connection) -> AsyncIterator[House]:
    """Record a report of each order with every follower at work, and erase the first one."""
    settings = Settings(port=0, features=EVERY_FEATURE, subscription_networks=(ip_network("127.0.0.0/8"),))
    async with (
        serving(settings, dsn) as (port, service),
        aiohttp.ClientSession() as session,
        receiving() as receiver,
    ):
        client = Client(session, port)
        await client.post("/subscriptions", 201, wanted(receiver))
        async with client.reading("/events/stream") as reader:
            for order_no, buyer in ORDERS.items():
                await client.webhook(order_no, f"Kurir di rumah {buyer}", buyer=buyer)
            assert await reader.positions(2) == [1, 2]
            await receiver.wait_for(2)
            for view in service.core.positions.values():
                await until_async(condition(partial(has_reached, view, 2)))
            await until_async(condition(partial(is_hot, service)))
            async with connected(owner_dsn) as owner, connected(dsn) as own:
                await erase_order(owner, "KOM1", "asked for", Actor("cli", "tests"))
                assert await settle(owner, own, ["KOM1"]) == []
            yield House(service, client, receiver, connection)


def has_reached(view: ViewPosition, position: int) -> bool:
    return view.reach.position >= position


def is_hot(service: Service) -> bool:
    """Return whether both memories give both events away."""
    tail = service.core.tail.after(0, None, 10) or ()
    return len(service.core.memory.recall(0, 10)) == len(tail) == len(ORDERS)


async def test_every_follower_has_an_experiment(house: House) -> None:
    """A new follower of the log is not forgotten here."""
    assert {*house.service.core.followers.names} == {*EXPERIMENTS}


@pytest.mark.parametrize("name", [*EXPERIMENTS, *READS])
async def test_nothing_that_was_erased_leaves(house: House, name: str) -> None:
    """As soon as the erasure has returned, what a follower or a memory gives away lacks the buyer's name."""
    given = await {**EXPERIMENTS, **READS}[name](house)
    erased, kept = ORDERS.values()
    assert (erased in given, kept in given) == (False, name not in NAMELESS)
