"""The cache of order states, so that most reports are judged without reading the database."""

from collections.abc import Iterable
from typing import Any

from domain.order import NEW_ORDER, Order, OrderState, evolve


class OrderStates:
    """The last known states of orders, in two generations: the older is dropped when the younger is full.

    A state may be stale, since other processes record too. The log's primary key refuses an event that was
    decided from a stale state.

    Args:
        orders_max: the maximum number of orders to keep, about 500 bytes each.
    """

    def __init__(self, orders_max: int) -> None:
        self._generation_max = orders_max // 2
        # Plain tuples of plain values: unlike named tuples, they are ignored by the garbage collector.
        self._young: dict[str, tuple[Any, ...]] = {}
        self._old: dict[str, tuple[Any, ...]] = {}

    def look_up(self, order_nos: Iterable[str]) -> tuple[dict[str, OrderState], list[str]]:
        """Return the known states of these orders, and the orders whose state is not known."""
        known: dict[str, OrderState] = {}
        missing: list[str] = []
        for order_no in order_nos:
            state = self._young.get(order_no) or self._old.get(order_no)
            if state is None:
                missing.append(order_no)
            else:
                known[order_no] = OrderState._make(state)
        return known, missing

    def learn(self, events: Iterable[Order.StatusReported]) -> None:
        """Keep the states after these committed events."""
        for event in events:
            self._young[event.originator_id] = tuple(evolve(NEW_ORDER, event))
        if len(self._young) > self._generation_max:
            self._young, self._old = {}, self._young

    def clear(self) -> None:
        """Drop every state."""
        self._young, self._old = {}, {}

    def forget(self, order_nos: Iterable[str]) -> None:
        """Drop the states of these orders, because another writer may have changed them."""
        for order_no in order_nos:
            self._young.pop(order_no, None)
            self._old.pop(order_no, None)
