"""What is measured, for Prometheus. No label ever holds an order number, a token or a path as it was sent."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from domain.order import Order
from domain.transitions import VERDICTS
from projections.engine import Projector
from service.api.freshness import Lag, view_lag
from service.database.connections import Pool, StorageUnavailableError, borrowed
from service.http.endpoints import Endpoint
from service.http.parameters import Query
from service.http.request_ids import route_of
from service.ingest import quarantine
from service.ingest.quarantine import Quarantine

# A scrape never waits long for the database: without it, what it would have told is left out.
SCRAPE_SECONDS_MAX: Final = 2.0
HTTP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_REPORTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

HTTP_LABELS: Final = ("http_request_method", "http_route", "http_response_status_code")
# Methods that anybody may make up are one.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Metrics:
    """Counts and measures; the hot path only adds to plain numbers.

    Args:
        pool: of the connections, which is measured as well.
        projectors: of the views.
        kept: the quarantine, which counts by itself.
        waiting: tells how many reports wait for their commit.
    """

    def __init__(
        self, pool: Pool, projectors: Sequence[Projector], kept: Quarantine, waiting: Callable[[], int]
    ) -> None:
        self._pool = pool
        self._projectors = projectors
        self._kept = kept
        self._waiting = waiting
        self._outcomes: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        self._last_received = 0.0
        self._lags: list[Lag] = []
        self._entries: dict[str, int] = {}
        self._registry = CollectorRegistry()
        self._http = Histogram(
            "http_server_request_duration_seconds",
            "How long requests took, from their head to their answer.",
            HTTP_LABELS,
            buckets=HTTP_SECONDS,
            registry=self._registry,
        )
        self._http_children: dict[tuple[str, str, int], Histogram] = {}
        self._commits = Histogram(
            "webhook_commit_seconds",
            "How long a batch of reports took, from its beginning to its commit.",
            buckets=COMMIT_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "webhook_batch_reports",
            "How many reports shared a commit.",
            buckets=BATCH_REPORTS,
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def count_commit(self, events: Sequence[Order.StatusReported]) -> None:
        """Count the verdicts of a commit."""
        outcomes = self._outcomes
        for event in events:
            outcomes[event.verdict] += 1
        self._last_received = time.time()

    def measure_batch(self, reports: int, seconds: float) -> None:
        """Measure a batch of the recorder."""
        self._commits.observe(seconds)
        self._batches.observe(reports)

    def measure_answer(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Measure a request by its route's pattern, never by its path."""
        route = route_of(request)
        method = request.method if request.method in METHODS else "_OTHER"
        key = (method, route, status)
        child = self._http_children.get(key)
        if child is None:
            child = self._http_children[key] = self._http.labels(method, route, str(status))
        child.observe(seconds)

    @Endpoint("GET", "/metrics", str, media=("text/plain",))
    async def show_metrics(self, _request: web.Request, _query: Query) -> web.Response:
        """What is measured of the service, for Prometheus."""
        # Each by itself: the one that takes too long must not silence the other.
        lags: list[Lag] = []
        entries: dict[str, int] = {}
        with suppress(StorageUnavailableError):
            async with borrowed(self._pool, SCRAPE_SECONDS_MAX) as connection:
                lags = [await view_lag(connection, projector.view.name) for projector in self._projectors]
        with suppress(StorageUnavailableError):
            async with borrowed(self._pool, SCRAPE_SECONDS_MAX) as connection:
                entries = await quarantine.count_entries(connection)
        self._lags, self._entries = lags, entries
        headers = {"Content-Type": CONTENT_TYPE_LATEST, "Server": "order-tracking"}
        return web.Response(body=generate_latest(self._registry), headers=headers)

    def collect(self) -> Iterator[Metric]:
        """What is not measured as it happens, but asked for when it is told."""
        reports = CounterMetricFamily(
            "webhook_reports", "Reports by what was made of them.", labels=["outcome"]
        )
        for outcome, count in (*self._outcomes.items(), ("quarantined", self._kept.kept)):
            reports.add_metric([outcome], count)
        yield reports
        yield CounterMetricFamily(
            "quarantine_turned_away", "Bodies over the hourly cap, answered 503.", self._kept.turned_away
        )
        yield _gauge("webhook_queue_reports", "Reports that wait for their commit.", self._waiting())
        last = max(self._last_received, self._kept.last_kept)
        if last:
            yield _gauge("webhook_last_received_timestamp_seconds", "When the last report came.", last)
        pool = GaugeMetricFamily("db_client_connection_count", "Connections of the pool.", labels=["state"])
        pool.add_metric(["idle"], self._pool.get_idle_size())
        pool.add_metric(["used"], self._pool.get_size() - self._pool.get_idle_size())
        yield pool
        yield _gauge("asyncio_tasks", "Tasks of the event loop.", len(asyncio.all_tasks()))
        entries = GaugeMetricFamily("quarantine_entries", "Entries of the quarantine.", labels=["state"])
        for state, count in self._entries.items():
            entries.add_metric([state], count)
        yield entries
        events = GaugeMetricFamily("projection_lag_events", "Events that a view has not yet.", labels=["view"])
        seconds = GaugeMetricFamily("projection_lag_seconds", "The age of the oldest of them.", labels=["view"])
        aside = GaugeMetricFamily("projection_set_aside_orders", "Orders set aside.", labels=["view"])
        for lag in self._lags:
            events.add_metric([lag.view], lag.events)
            seconds.add_metric([lag.view], lag.seconds)
            aside.add_metric([lag.view], lag.set_aside)
        yield from (events, seconds, aside)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value)
