"""View freshness: waiting for a position, and the lag behind the log."""

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from math import isfinite
from typing import Final, NamedTuple

from aiohttp import web
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.parked import ParkedOrder, count_parked, list_parked
from projections.postgres import Connection
from service.database.connections import as_unavailable
from service.event_log import store
from service.http.problems import ProblemError, beyond_head, unavailable
from service.projecting.position import AFTER_POSITION_SECONDS_MAX, ViewPosition, ViewPositions
from service.projecting.projector import SELECT_VIEW

# The time limit for reading the head of the log.
HEAD_READ_SECONDS_MAX: Final = 2.0
# A view that needs longer is usually not behind: the position lies beyond the log's head.
HEAD_SECONDS: Final = 0.25
PARKED_LISTED_MAX: Final = 100

# Headers of a response from views that other processes write: the position up to which the views certainly
# have every report, and for how many seconds they may have missed some.
POSITION_HEADER: Final = "View-Position"
AGE_HEADER: Final = "View-Age"

# In the schema that the search path names.
POSITION: Final = "SELECT position FROM projection"


class Freshness(NamedTuple):
    """The position of the views that a response was read from, and their age in seconds."""

    position: int
    age_seconds: float


# Of the present request's views, if other processes write them. Each request has its own context.
_FRESHNESS: Final[ContextVar[Freshness | None]] = ContextVar("freshness", default=None)


class Projection(TypedDict):
    """The position of a view, its lag behind the log, and its parked orders."""

    view: str
    position: int
    head: int
    lag_events: int
    lag_seconds: float
    is_outdated: bool
    parked: list[ParkedOrder]


class Lag(TypedDict):
    """A view's lag behind the log, and the number of its parked orders."""

    view: str
    position: int
    events: int
    seconds: float
    parked: int


async def wait_for(positions: ViewPositions, position: int | None, *views: str) -> None:
    """Wait until views have reached a position of the log.

    Args:
        positions: how far each view has come.
        position: the position, None to check only that no view is being rebuilt.
        views: the views' names.

    Raises:
        ProblemError: 503, a view is being rebuilt, or has not reached the position in time; 410, the log ends
            before the position.
    """
    for view in views:
        if positions[view].is_outdated:
            raise unavailable(f"the view {view} is being rebuilt", view=view)
    if position is not None:
        await _reach(positions, position, views)
    observed = [one for view in views if (one := positions[view]).is_observed]
    if observed:
        # Before the read, which may find later reports.
        ages = (one.age_seconds for one in observed)
        _FRESHNESS.set(Freshness(min(one.reach.position for one in observed), max(ages)))


async def add_freshness(_request: web.Request, response: web.StreamResponse) -> None:
    """Add the headers of views that other processes write: a signal handler for ``on_response_prepare``."""
    if (freshness := _FRESHNESS.get()) is None:
        return
    response.headers[POSITION_HEADER] = str(freshness.position)
    if isfinite(freshness.age_seconds):
        response.headers[AGE_HEADER] = f"{freshness.age_seconds:.3f}"


def beyond(positions: ViewPositions, position: int, head: int) -> ProblemError:
    """Return the problem for a position above the head of the log that this process can see.

    A replica cannot distinguish a position that its primary has lost from one that it has not replayed yet.
    """
    if not any(one.is_observed for one in positions.values()):
        return beyond_head(position, head)
    detail = f"this process reads a database that has reached position {head}, but not yet {position}"
    return unavailable(detail, position=head)


async def _reach(positions: ViewPositions, position: int, views: Sequence[str]) -> None:
    if all(await _wait(positions, position, views, HEAD_SECONDS)):
        return
    if not positions[views[0]].is_observed:
        with as_unavailable():
            async with asyncio.timeout(HEAD_READ_SECONDS_MAX):
                head = await positions[views[0]].read_head()
        if position > head:
            raise beyond_head(position, head)
    reached = await _wait(positions, position, views, AFTER_POSITION_SECONDS_MAX)
    for view, has_reached in zip(views, reached, strict=True):
        if not has_reached:
            detail = f"the view {view} has not reached position {position} yet"
            raise unavailable(detail, view=view, position=positions[view].reach.position)


async def _wait(
    positions: ViewPositions, position: int, views: Sequence[str], seconds_max: float
) -> list[bool]:
    return await asyncio.gather(*(positions[view].reach.wait_for(position, seconds_max) for view in views))


async def read_lag(connection: Connection, position: ViewPosition) -> Lag:
    """Return a view's lag behind the log."""
    name = position.view.name
    async with connection.transaction(readonly=True):
        await connection.execute(SELECT_VIEW, name)
        reached: int = await connection.fetchval(POSITION) or 0
        # An outdated view may have other tables.
        parked = 0 if position.is_outdated else await count_parked(connection)
    events, seconds = await store.read_lag(connection, reached)
    return Lag(view=name, position=reached, events=events, seconds=seconds, parked=parked)


async def read_projection(connection: Connection, position: ViewPosition) -> Projection:
    """Return a view's position, lag and parked orders, the first PARKED_LISTED_MAX of them."""
    lag = await read_lag(connection, position)
    async with connection.transaction(readonly=True):
        await connection.execute(SELECT_VIEW, position.view.name)
        parked = [] if position.is_outdated else await list_parked(connection, PARKED_LISTED_MAX)
    return {
        "view": lag["view"],
        "position": lag["position"],
        # Read after the position, so that it is lower only if the log has lost events.
        "head": await store.head_position(connection),
        "lag_events": lag["events"],
        "lag_seconds": lag["seconds"],
        "is_outdated": position.is_outdated,
        "parked": parked,
    }
