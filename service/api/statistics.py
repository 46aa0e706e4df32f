"""Statistics over HTTP: counters over all orders."""

from datetime import UTC, datetime
from typing import Annotated
from zoneinfo import ZoneInfo

from aiohttp import web
from pydantic import Field

from domain.statuses import Recognise
from projections import statistics, timeline
from projections.statistics import Statistics
from service.api.freshness import wait_for
from service.database.connections import ConnectionPool
from service.http.endpoints import Endpoint, Tag
from service.http.parameters import ViewQuery
from service.http.responses import json_response
from service.projecting.position import ViewPositions


class StatisticsQuery(ViewQuery):
    """The days to count reports for."""

    days: Annotated[int, Field(ge=1, le=366, description="days to look back, today included")] = 30


class StatisticsApi:
    """Serves the statistics.

    Args:
        pool: the connections to read with.
        positions: how far each view has come.
        recognise: the present vocabulary.
        zone: the time zone of the days.
    """

    tag = Tag("statistics", "Counters over all orders.")

    def __init__(
        self, pool: ConnectionPool, positions: ViewPositions, recognise: Recognise, zone: ZoneInfo
    ) -> None:
        self._pool = pool
        self._positions = positions
        self._recognise = recognise
        self._zone = zone

    @Endpoint("GET", "/statistics", Statistics, query=StatisticsQuery)
    async def get_statistics(self, _request: web.Request, query: StatisticsQuery) -> web.Response:
        """Get statistics of all orders: orders by status, moves with their durations, reports by day."""
        await wait_for(self._positions, query.after_position, statistics.VIEW.name, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            counters = await statistics.read_statistics(
                connection, self._zone, datetime.now(UTC), query.days, self._recognise
            )
        return json_response(counters)
