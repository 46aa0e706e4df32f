"""An event together with its position in the log, as everything that follows the log gets it."""

from typing import NamedTuple, TypeAlias

from domain.order import Order


class FailedEvent(NamedTuple):
    """An event that cannot be decoded or applied: its order, its version, and the reason."""

    originator_id: str
    originator_version: int
    reason: str


# A position and its event. Plain tuples are the cheapest, and every follower handles one for each event.
DecodedEvent: TypeAlias = tuple[int, Order.StatusReported]
LoggedEvent: TypeAlias = tuple[int, Order.StatusReported | FailedEvent]
