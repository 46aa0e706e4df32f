"""What whoever watches over the service asks: whether it lives, is ready, and how far the views have come."""

from collections.abc import Sequence
from typing import Final

from aiohttp import web

from projections.engine import Projector
from service.api import representations
from service.api.freshness import LOOK_AT_VIEW, view_lag
from service.database.connections import Connection, HeldConnection, Pool, borrowed
from service.event_log import store as event_store
from service.http.endpoints import Endpoint
from service.http.parameters import Query
from service.http.problems import Kind, answer

READY_SECONDS_MAX: Final = 1.0
SET_ASIDE_SHOWN_MAX: Final = 100

# Under the search path of a view.
ALL_SET_ASIDE: Final = (
    "SELECT order_no, since_version, position, reason FROM set_aside ORDER BY position LIMIT $1"
)
IS_ALIVE: Final = "SELECT 1"


class OperationsApi:
    """Tells how the service itself is.

    Args:
        pool: where its connections come from.
        held: a connection that waits for no reader, to see whether the database answers.
        projectors: of the views.
        seconds_max: how long one request may take.
    """

    def __init__(
        self, pool: Pool, held: HeldConnection, projectors: Sequence[Projector], seconds_max: float
    ) -> None:
        self._pool = pool
        self._held = held
        self._projectors = projectors
        self._seconds_max = seconds_max

    @Endpoint("GET", "/projections", representations.Projections)
    async def show_projections(self, _request: web.Request, _query: Query) -> web.Response:
        """How far each view has come, and what is set aside in it."""
        async with borrowed(self._pool, self._seconds_max) as connection:
            head = await event_store.head_position(connection)
            views = [await _view(connection, projector, head) for projector in self._projectors]
        return answer({"head": head, "projections": views})

    @Endpoint("GET", "/livez", representations.Health, scope=None)
    async def is_alive(self, _request: web.Request, _query: Query) -> web.Response:
        """The process answers; nothing else is asked."""
        return answer({"status": "alive"})

    @Endpoint("GET", "/readyz", representations.Health, scope=None, problems=(Kind.UNAVAILABLE,))
    async def is_ready(self, _request: web.Request, _query: Query) -> web.Response:
        """The database answers, in time."""
        async with self._held.lent(READY_SECONDS_MAX) as connection:
            await connection.fetchval(IS_ALIVE)
        return answer({"status": "ready"})


async def _view(connection: Connection, projector: Projector, head: int) -> representations.Projection:
    lag = await view_lag(connection, projector.view.name)
    async with connection.transaction(readonly=True):
        await connection.execute(LOOK_AT_VIEW, projector.view.name)
        aside = await connection.fetch(ALL_SET_ASIDE, SET_ASIDE_SHOWN_MAX)
    return {
        "view": lag.view,
        "position": lag.position,
        "head": max(head, lag.position),
        "lag_events": lag.events,
        "lag_seconds": lag.seconds,
        "is_outdated": projector.is_outdated,
        "set_aside": [
            {"order_no": order_no, "since_version": version, "position": at, "reason": reason}
            for order_no, version, at, reason in aside
        ],
    }
