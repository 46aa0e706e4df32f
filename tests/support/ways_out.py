"""The ways out of the log: for each follower and each memory, what it gives away after an erasure."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NamedTuple

from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from tests.support.client import Client
from tests.support.receiver import Receiver

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
