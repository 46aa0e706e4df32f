"""Metrics for Prometheus. No label ever has an order number, a token or a path."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from projections.postgres import Connection
from service.api.freshness import read_lag
from service.database.connections import ConnectionPool, StorageUnavailableError
from service.http.endpoints import TEXT, Endpoint, Tag
from service.http.parameters import Query
from service.http.responses import response
from service.ingest.quarantine import count_entries
from service.projecting.position import ViewPosition
from service.version import build_info

# If the database does not answer a scrape within this time, the gauges that need it are missing.
SCRAPE_SECONDS_MAX: Final = 2.0

_by_state: Final = partial(GaugeMetricFamily, labels=["state"])
_by_view: Final = partial(GaugeMetricFamily, labels=["view"])

# Reads metrics from the database, which all processes share.
Read = Callable[[Connection], Awaitable[Iterable[Metric]]]


# Returns metrics of this process.
Measure = Callable[[], Iterable[Metric]]


class _Collected:
    """Metrics that were collected, in the form that prometheus_client writes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Metrics:
    """Serves the metrics of this process and of the database.

    Args:
        pool: the connections to read with; the pool itself is measured too.
        positions: how far each view has come.
        measures: what else is measured in this process.
        reads: what else is read at a scrape.
    """

    tag = Tag("metrics", "Metrics for Prometheus.")

    def __init__(
        self,
        pool: ConnectionPool,
        positions: Sequence[ViewPosition],
        measures: Sequence[Measure],
        reads: Sequence[Read] = (),
    ) -> None:
        self._pool = pool
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self._measures = (self._process.collect, *measures)
        # Separate reads, so that a slow one does not hide the others' gauges.
        self._reads: Sequence[Read] = (partial(_read_views, positions=positions), _read_quarantine, *reads)

    @Endpoint("GET", "/metrics", str, media=TEXT)
    async def get_metrics(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the service's metrics, in the text format of Prometheus."""
        families = [*self._collect()]
        for measure in self._measures:
            families += measure()
        for read in self._reads:
            with suppress(StorageUnavailableError):
                async with self._pool.connection(SCRAPE_SECONDS_MAX) as connection:
                    families += await read(connection)
        return response(generate_latest(_Collected(families)), CONTENT_TYPE_LATEST)

    def _collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "order_tracking_build_info", "1, with the running version and commit.", labels=[*build_info()]
        )
        build.add_metric([*build_info().values()], 1)
        yield build
        pool = _by_state("db_client_connections", "Connections of the pool.")
        pool.add_metric(["idle"], self._pool.idle)
        pool.add_metric(["used"], self._pool.used)
        yield pool
        yield GaugeMetricFamily("asyncio_tasks", "Tasks of the event loop.", len(asyncio.all_tasks()))


async def _read_quarantine(connection: Connection) -> list[Metric]:
    entries = _by_state("quarantine_entries", "Quarantined bodies.")
    for state, count in (await count_entries(connection)).items():
        entries.add_metric([state], count)
    return [entries]


async def _read_views(connection: Connection, positions: Sequence[ViewPosition]) -> list[Metric]:
    events = _by_view("projection_lag_events", "Events that a view has not applied yet.")
    seconds = _by_view("projection_lag_seconds", "Age of the oldest of these events.")
    parked = _by_view("projection_parked_orders", "Parked orders.")
    for position in positions:
        lag = await read_lag(connection, position)
        events.add_metric([lag["view"]], lag["events"])
        seconds.add_metric([lag["view"]], lag["seconds"])
        parked.add_metric([lag["view"]], lag["parked"])
    return [events, seconds, parked]
