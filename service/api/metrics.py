"""Metrics for Prometheus. No label ever has an order number, a token or a path."""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import accumulate
from typing import Any, Final, Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.utils import floatToGoString

from domain.order import Order
from domain.transitions import VERDICTS
from projections.engine import Projector
from projections.postgres_errors import Connection
from service.api.freshness import Lag, read_lag
from service.build import build_info
from service.database.connections import ConnectionPool, StorageUnavailableError
from service.http.auth_refusals import AuthRefusals
from service.http.budgets import Budgets
from service.http.endpoints import TEXT, Endpoint, Tag
from service.http.parameters import Query
from service.http.request_ids import route_pattern
from service.http.responses import response
from service.ingest.quarantine import Quarantine, count_entries
from service.ingest.recorder import Recorder
from service.ingest.refusals import Refusals
from service.ingest.volume import Volume

# If the database does not answer a scrape within this time, the gauges that need it are missing.
SCRAPE_SECONDS_MAX: Final = 2.0
HTTP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_REPORTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

HTTP_BUCKETS: Final = (*map(floatToGoString, HTTP_SECONDS), "+Inf")
HTTP_LABELS: Final = ("http_request_method", "http_route", "http_response_status_code")
# All other methods share one label, since a client may invent any number of them.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})

_by_state: Final = partial(GaugeMetricFamily, labels=["state"])
_by_budget: Final = partial(GaugeMetricFamily, labels=["budget"])
_by_view: Final = partial(GaugeMetricFamily, labels=["view"])
_by_subscription: Final = partial(GaugeMetricFamily, labels=["subscription"])


class ErasesByAge(Protocol):
    """What erases old bodies."""

    erased_orders: int
    last_pass_at: float


class HistorySizes(Protocol):
    """The state of the history."""

    @property
    def entries(self) -> int:
        """The number of its entries."""
        ...

    @property
    def signed(self) -> int:
        """The number of those that are signed."""
        ...

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest event that is not signed."""
        ...

    @property
    def halted(self) -> str | None:
        """Why it is not signed any more."""
        ...


class _Collected:
    """Metrics that were collected, in the form that prometheus_client writes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class Durations:
    """The durations of the requests of one route, in plain numbers: a Histogram took 2 us for each response.

    Attributes:
        counts: how many ended in each bucket alone.
        seconds: their sum.
    """

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * len(HTTP_BUCKETS)
        self.seconds = 0.0


class Metrics:
    """Counts and measures. The hot path only adds to plain numbers.

    Args:
        pool: the connections to read gauges with; the pool itself is measured too.
        projectors: the views' projectors.
        quarantine: the quarantine, which counts its own bodies.
        volume: counts the bytes of bodies.
        refusals: the webhooks that got 503.
        auth_refusals: the requests that were not admitted.
        budgets: what readers and strangers hold.
        retention: erases old bodies; None if it is off.
        recorder: returns the recorder, which is made after the metrics that it reports to.
        deliveries: the attempts to deliver, by subscription and outcome.
        list_subscriptions: returns the subscriptions with their lags.
        read_history: returns the history's size, signed size, and why it is halted.
    """

    tag = Tag("metrics", "Metrics for Prometheus.")

    def __init__(  # noqa: PLR0913, PLR0917 - everything that is measured
        self,
        pool: ConnectionPool,
        projectors: Sequence[Projector],
        quarantine: Quarantine,
        volume: Volume,
        refusals: Refusals,
        auth_refusals: AuthRefusals,
        budgets: Budgets,
        retention: ErasesByAge | None,
        recorder: Callable[[], Recorder],
        *,
        deliveries: Mapping[Any, int],
        list_subscriptions: Callable[[Connection], Awaitable[Sequence[Mapping[str, Any]]]],
        read_history: Callable[[Connection], Awaitable[HistorySizes]],
    ) -> None:
        self._pool = pool
        self._projectors = projectors
        self._quarantine = quarantine
        self._volume = volume
        self._refusals = refusals
        self._auth_refusals = auth_refusals
        self._budgets = budgets
        self._retention = retention
        self._recorder = recorder
        self._deliveries = deliveries
        self._list_subscriptions = list_subscriptions
        self._read_history = read_history
        self._outcomes: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        self._last_received = 0.0
        self._registry = CollectorRegistry()
        histogram = partial(Histogram, registry=self._registry)
        self._http: dict[tuple[str, str, int], Durations] = {}
        self._commits = histogram(
            "webhook_commit_seconds",
            "Duration of a batch of reports, from its beginning to its commit.",
            buckets=COMMIT_SECONDS,
        )
        self._batches = histogram(
            "webhook_batch_reports", "Reports that shared a commit.", buckets=BATCH_REPORTS
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def start_from(self, received_at: datetime) -> None:
        """Begin with the last arrival before the start, so that a silence does not end with a restart."""
        self._last_received = received_at.timestamp()

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

    def measure_response(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Measure a request by its route's pattern, never by its path."""
        route = route_pattern(request)
        method = request.method if request.method in METHODS else "_OTHER"
        key = (method, route, status)
        durations = self._http.get(key)
        if durations is None:
            durations = self._http[key] = Durations()
        durations.counts[bisect_left(HTTP_SECONDS, seconds)] += 1
        durations.seconds += seconds

    @Endpoint("GET", "/metrics", str, media=TEXT)
    async def get_metrics(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the service's metrics, in the text format of Prometheus."""
        lags: list[Lag] = []
        entries: dict[str, int] = {}
        subscriptions: Sequence[Mapping[str, Any]] = ()
        # Separate reads, so that a slow one does not hide the others' gauges.
        with suppress(StorageUnavailableError):
            async with self._pool.connection(SCRAPE_SECONDS_MAX) as connection:
                lags = [await read_lag(connection, projector) for projector in self._projectors]
        with suppress(StorageUnavailableError):
            async with self._pool.connection(SCRAPE_SECONDS_MAX) as connection:
                entries = await count_entries(connection)
        with suppress(StorageUnavailableError):
            async with self._pool.connection(SCRAPE_SECONDS_MAX) as connection:
                subscriptions = await self._list_subscriptions(connection)
        history: HistorySizes | None = None
        with suppress(StorageUnavailableError):
            async with self._pool.connection(SCRAPE_SECONDS_MAX) as connection:
                history = await self._read_history(connection)
        families = [
            *(*self._registry.collect(), *_collect_database(lags, entries)),
            *(*_collect_subscriptions(subscriptions), *_collect_history(history)),
        ]
        return response(generate_latest(_Collected(families)), CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Metric]:
        """Yield the counters and gauges that are read at scrape time."""
        build = GaugeMetricFamily(
            "order_tracking_build_info", "1, with the running version and commit.", labels=[*build_info()]
        )
        build.add_metric([*build_info().values()], 1)
        yield build
        requests = HistogramMetricFamily(
            "http_server_request_duration_seconds",
            "Duration of requests, from their head to their response.",
            labels=HTTP_LABELS,
        )
        for (method, route, status), durations in self._http.items():
            # Each count includes those of the smaller buckets.
            buckets = [*zip(HTTP_BUCKETS, accumulate(durations.counts), strict=True)]
            requests.add_metric([method, route, str(status)], buckets, durations.seconds)
        yield requests
        reports = CounterMetricFamily("webhook_reports", "Reports by outcome.", labels=["outcome"])
        for outcome, count in (*self._outcomes.items(), ("quarantined", self._quarantine.kept)):
            reports.add_metric([outcome], count)
        yield reports
        yield CounterMetricFamily(
            "quarantine_turned_away", "Bodies over the hourly cap, answered 503.", self._quarantine.refused
        )
        refusals = CounterMetricFamily("webhook_refusals", "Webhooks that got 503, by cause.", labels=["cause"])
        for cause, count in self._refusals.counts.items():
            refusals.add_metric([cause], count)
        yield refusals
        yield CounterMetricFamily(
            "webhook_body_bytes", "Bytes of webhook bodies, decompressed.", self._volume.bytes_total
        )
        unadmitted = CounterMetricFamily("auth_refusals", "Requests that were not admitted.", labels=["cause"])
        for auth_cause, count in self._auth_refusals.counts.items():
            unadmitted.add_metric([auth_cause], count)
        yield unadmitted
        held = _by_budget("budget_held", "Amount in use, by budget.")
        maximum = _by_budget("budget_max", "Limit, by budget.")
        beyond = CounterMetricFamily("budget_refusals", "Attempts to hold more.", labels=["budget"])
        for budget in self._budgets:
            held.add_metric([budget.name], budget.held)
            maximum.add_metric([budget.name], budget.maximum)
            beyond.add_metric([budget.name], budget.refusals)
        yield from (held, maximum, beyond)
        excesses = CounterMetricFamily(
            "connection_excesses", "Connections closed because they exceeded a limit.", labels=["limit"]
        )
        for limit, count in self._budgets.excesses.counts.items():
            excesses.add_metric([limit], count)
        yield excesses
        yield GaugeMetricFamily(
            "webhook_queue_reports", "Reports that wait for their commit.", self._recorder().waiting
        )
        yield CounterMetricFamily(
            "log_losses",
            "How often this process's last commit was missing when the database came back. Several processes "
            "count the same loss, so do not add them up.",
            self._recorder().losses,
        )
        last = max(self._last_received, self._quarantine.last_kept)
        if last:
            yield GaugeMetricFamily(
                "webhook_last_received_timestamp_seconds", "Arrival of the last report.", last
            )
        if self._retention is not None:
            yield CounterMetricFamily(
                "retention_erased_orders",
                "Orders whose bodies were erased by age.",
                self._retention.erased_orders,
            )
            yield GaugeMetricFamily(
                "retention_last_pass_timestamp_seconds",
                "End of the last pass over the orders; 0 if none has ended.",
                self._retention.last_pass_at,
            )
        attempts = CounterMetricFamily(
            "subscription_deliveries", "Attempts to deliver, by outcome.", labels=["subscription", "outcome"]
        )
        for (subscription, delivery_outcome), count in self._deliveries.items():
            attempts.add_metric([str(subscription), delivery_outcome], count)
        yield attempts
        pool = _by_state("db_client_connections", "Connections of the pool.")
        pool.add_metric(["idle"], self._pool.idle)
        pool.add_metric(["used"], self._pool.used)
        yield pool
        yield GaugeMetricFamily("asyncio_tasks", "Tasks of the event loop.", len(asyncio.all_tasks()))


def _collect_database(lags: Iterable[Lag], counts: dict[str, int]) -> Iterator[Metric]:
    """Yield the gauges of the database, which all processes share."""
    entries = _by_state("quarantine_entries", "Quarantined bodies.")
    for state, count in counts.items():
        entries.add_metric([state], count)
    yield entries
    events = _by_view("projection_lag_events", "Events that a view has not applied yet.")
    seconds = _by_view("projection_lag_seconds", "Age of the oldest of these events.")
    parked = _by_view("projection_parked_orders", "Parked orders.")
    for lag in lags:
        events.add_metric([lag["view"]], lag["events"])
        seconds.add_metric([lag["view"]], lag["seconds"])
        parked.add_metric([lag["view"]], lag["parked"])
    yield from (events, seconds, parked)


def _collect_history(history: HistorySizes | None) -> Iterator[Metric]:
    """Yield the gauges of the history, which all processes share."""
    if history is not None:
        yield GaugeMetricFamily("history_entries", "Entries of the history.", history.entries)
        yield GaugeMetricFamily("history_signed_entries", "Entries that are signed.", history.signed)
        yield GaugeMetricFamily(
            "history_lag_seconds", "Age of the oldest event that is not signed.", history.lag_seconds
        )
        yield GaugeMetricFamily(
            "history_halted",
            "1 if the history does not continue its last signed checkpoint.",
            history.halted is not None,
        )


def _collect_subscriptions(subscriptions: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield the gauges of the subscriptions, which all processes share."""
    events = _by_subscription("subscription_lag_events", "Events above a subscription's position.")
    seconds = _by_subscription("subscription_lag_seconds", "Age of the oldest of these events.")
    held = _by_subscription("subscription_held_orders", "Orders with an undelivered event.")
    stopped = _by_subscription("subscription_stopped", "1 if a subscription ended without an operator.")
    for one in subscriptions:
        labels = [str(one["subscription_id"])]
        events.add_metric(labels, one["lag_events"])
        seconds.add_metric(labels, one["lag_seconds"])
        held.add_metric(labels, one["held_orders"])
        stopped.add_metric(labels, one["state"] != "active" and one["reason"] != "operator")
    yield from (events, seconds, held, stopped)
