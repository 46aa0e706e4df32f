"""Every follower of the log and every memory: after an erasure, none gives away what was erased."""

from collections.abc import AsyncIterator
from functools import partial
from ipaddress import ip_network
from typing import Final

import aiohttp
import pytest

from projections.postgres import Connection
from service.app import Service
from service.database.connections import connected
from service.database.operations import Actor
from service.features.settings import Settings
from service.listening import serving
from service.maintenance.erasure import erase_order, settle
from service.projecting.position import ViewPosition
from tests.support.client import Client
from tests.support.receiver import receiving
from tests.support.waiting import condition, until_async
from tests.support.ways_out import EXPERIMENTS, NAMELESS, ORDERS, READS, House, wanted

EVERY_FEATURE: Final = ("pages", "subscriptions", "proofs")


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
