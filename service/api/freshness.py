"""The views, as who reads them finds them: waited for, and how far behind the log they are."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

from projections.engine import Projector
from service.database.connections import Connection
from service.event_log import store as event_store
from service.http.problems import unavailable

# How long a read waits for a view to come to the position that it asks for.
AFTER_POSITION_SECONDS_MAX: Final = 5.0
# Counting the events behind the head stops here: beyond it the exact number tells nobody more.
LAG_EVENTS_MAX: Final = 100_000

# Under the search path of a view: each has tables of these names.
LOOK_AT_VIEW: Final = "SELECT set_config('search_path', $1, true)"
POSITION: Final = "SELECT position FROM projection"
COUNT_SET_ASIDE: Final = "SELECT count(*) FROM set_aside"


async def wait_for(projectors: Mapping[str, Projector], position: int | None, *views: str) -> None:
    """Wait until views have a position of the log.

    Args:
        projectors: of the views, by name.
        position: None where whatever they have will do.
        views: their names.

    Raises:
        ProblemError: 503, one is being rebuilt, or has not come to the position in time.
    """
    for view in views:
        if projectors[view].is_outdated:
            raise unavailable(f"the view {view} is being rebuilt", view=view)
    if position is None:
        return
    reached = [projectors[view].reached(position, AFTER_POSITION_SECONDS_MAX) for view in views]
    for view, is_there in zip(views, await asyncio.gather(*reached), strict=True):
        if not is_there:
            detail = f"the view {view} has not come to position {position} yet"
            raise unavailable(detail, view=view, position=projectors[view].position)


class Lag(NamedTuple):
    """How far a view has come and is behind, and how many orders are set aside in it."""

    view: str
    position: int
    events: int
    seconds: float
    set_aside: int


async def view_lag(connection: Connection, view: str) -> Lag:
    """Return how far a view is behind the log."""
    async with connection.transaction(readonly=True):
        await connection.execute(LOOK_AT_VIEW, view)
        position: int = await connection.fetchval(POSITION) or 0
        set_aside: int = await connection.fetchval(COUNT_SET_ASIDE)
    oldest = await event_store.oldest_after(connection, position)
    if oldest is None:
        return Lag(view, position, 0, 0.0, set_aside)
    events = await event_store.count_after(connection, position, LAG_EVENTS_MAX)
    return Lag(view, position, events, max(0.0, (datetime.now(UTC) - oldest).total_seconds()), set_aside)
