"""Parked orders: orders with an event that a view could not apply.

Later events of a parked order wait in the log until a replay rebuilds the view. Each view has a table
``parked_orders`` in its own schema; these statements find it by the connection's search path.
"""

from collections.abc import Iterable
from typing import Final, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection


class ParkedOrder(TypedDict):
    """An order that a view parked: the version and position of the event at fault, and the reason."""

    order_no: str
    since_version: int
    position: int
    reason: str


class Parked(TypedDict):
    """An order that is parked in a view: the view lacks the order's events from ``since_version`` on."""

    view: str
    since_version: int
    reason: str


PARK: Final = "INSERT INTO parked_orders (order_no, since_version, position, reason) VALUES ($1, $2, $3, $4)"
PARKED_AMONG: Final = "SELECT order_no FROM parked_orders WHERE order_no = ANY($1)"
PARKED_ORDER: Final = """
    SELECT order_no, since_version, position, reason FROM parked_orders WHERE order_no = $1
"""
REMOVE: Final = "DELETE FROM parked_orders WHERE order_no = $1"
PARKED_ORDERS: Final = """
    SELECT order_no, since_version, position, reason FROM parked_orders ORDER BY position LIMIT $1
"""
COUNT_PARKED: Final = "SELECT count(*) FROM parked_orders"


async def park(connection: Connection, orders: Iterable[ParkedOrder]) -> None:
    """Park orders that are not parked yet."""
    await connection.executemany(PARK, [tuple(order.values()) for order in orders])


async def find_parked(connection: Connection, order_nos: Iterable[str]) -> set[str]:
    """Return which of these orders are parked."""
    return {order_no for (order_no,) in await connection.fetch(PARKED_AMONG, list(order_nos))}


async def find(connection: Connection, order_no: str) -> ParkedOrder | None:
    """Return where and why an order is parked, None if it is not."""
    row = await connection.fetchrow(PARKED_ORDER, order_no)
    return None if row is None else cast("ParkedOrder", dict(row))


async def remove(connection: Connection, order_no: str) -> None:
    """Forget that an order is parked. Its waiting events must be applied in the same transaction."""
    await connection.execute(REMOVE, order_no)


async def list_parked(connection: Connection, limit: int) -> list[ParkedOrder]:
    """Return the parked orders by position, at most ``limit``."""
    return [
        {"order_no": order_no, "since_version": version, "position": position, "reason": reason}
        for order_no, version, position, reason in await connection.fetch(PARKED_ORDERS, limit)
    ]


async def count_parked(connection: Connection) -> int:
    """Return how many orders are parked."""
    count: int = await connection.fetchval(COUNT_PARKED)
    return count
