"""The metrics of requests, and of what clients hold. The hot path only adds to plain numbers."""

from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Final

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from service.http.auth_refusals import AuthRefusals
from service.http.budgets import Budgets
from service.http.request_ids import route_pattern

HTTP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
HTTP_BUCKETS: Final = (*map(floatToGoString, HTTP_SECONDS), "+Inf")
HTTP_LABELS: Final = ("http_request_method", "http_route", "http_response_status_code")
# All other methods share one label, since a client may invent any number of them.
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})

_by_budget: Final = partial(GaugeMetricFamily, labels=["budget"])


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


class HttpMetrics:
    """Measures responses.

    Args:
        auth_refusals: the requests that were not admitted.
        budgets: what readers and strangers hold.
    """

    def __init__(self, auth_refusals: AuthRefusals, budgets: Budgets) -> None:
        self._auth_refusals = auth_refusals
        self._budgets = budgets
        self._http: dict[tuple[str, str, int], Durations] = {}

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

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
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
