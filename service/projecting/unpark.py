"""Resume one parked order: apply its waiting events to a view, without a rebuild of the view."""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from domain.logged import LoggedEvent
from projections import parked
from projections.parked import ParkedOrder
from projections.postgres import Connection
from projections.view import View
from service.projecting.locks import TAKE_VIEW_LOCK
from service.projecting.projector import OutdatedViewError, apply_batch, view_state

# Returns one order's events above a version, the first ones if there are many; none at the order's end.
ReadOrder = Callable[[str, int], Awaitable[Sequence[LoggedEvent]]]


class Unparked(NamedTuple):
    """The result for one view.

    Attributes:
        view: the view's name.
        was_parked: whether the order was parked in it.
        parked: where and why the order is parked now, None if it is not.
    """

    view: str
    was_parked: bool
    parked: ParkedOrder | None


async def unpark_order(connection: Connection, view: View, order_no: str, read_order: ReadOrder) -> Unparked:
    """Apply the events of a parked order, from the one at fault to the view's position, in one transaction.

    The view has applied all earlier events of the order, and none of these. If one of them fails again, the
    order stays parked, from that event on.

    Args:
        connection: a connection whose search path is the view's schema.
        view: the view.
        order_no: the order.
        read_order: returns the order's events.

    Raises:
        OutdatedViewError: the view was built with another definition.
    """
    async with connection.transaction():
        await connection.execute(TAKE_VIEW_LOCK, view.name)
        state = await view_state(connection)
        if state.definition != view.definition:
            raise OutdatedViewError(f"the view {view.name} is outdated: run 'replay' to rebuild it")
        before = await parked.find(connection, order_no)
        if before is None:
            return Unparked(view.name, was_parked=False, parked=None)
        await parked.remove(connection, order_no)
        version = before["since_version"] - 1
        while events := await read_order(order_no, version):
            applicable = [logged for logged in events if logged[0] <= state.position]
            await apply_batch(connection, view, applicable, has_parked=True, one_by_one=True)
            if len(applicable) < len(events):
                break
            version = events[-1][1].originator_version
        return Unparked(view.name, was_parked=True, parked=await parked.find(connection, order_no))
