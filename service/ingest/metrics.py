"""The metrics of ingest. The hot path only adds to plain numbers."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from domain.order import Order
from domain.transitions import VERDICTS
from service.ingest.hourly_bytes import HourlyBytes
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Recorder
from service.ingest.refusals import Refusals

COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_REPORTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class IngestMetrics:
    """Counts and measures reports.

    Args:
        quarantine: the quarantine, which counts its own bodies.
        volume: counts the bytes of bodies.
        refusals: the webhooks that got 503.
        recorder: returns the recorder, which is made after the metrics that it reports to.
    """

    def __init__(
        self, quarantine: Quarantine, volume: HourlyBytes, refusals: Refusals, recorder: Callable[[], Recorder]
    ) -> None:
        self._quarantine = quarantine
        self._volume = volume
        self._refusals = refusals
        self._recorder = recorder
        self._outcomes: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        self._last_received = 0.0
        self._registry = CollectorRegistry()
        histogram = partial(Histogram, registry=self._registry)
        self._commits = histogram(
            "webhook_commit_seconds",
            "Duration of a batch of reports, from its beginning to its commit.",
            buckets=COMMIT_SECONDS,
        )
        self._batches = histogram(
            "webhook_batch_reports", "Reports that shared a commit.", buckets=BATCH_REPORTS
        )

    def start_from(self, received_at: datetime) -> None:
        """Begin with the last arrival before the start, so that a silence does not end with a restart."""
        self._last_received = received_at.timestamp()

    def count_commit(self, events: Sequence[Order.StatusReported], _positions: Sequence[int]) -> None:
        """Count the verdicts of a commit."""
        outcomes = self._outcomes
        for event in events:
            outcomes[event.verdict] += 1
        self._last_received = time.time()

    def measure_batch(self, reports: int, seconds: float) -> None:
        """Measure a batch of the recorder."""
        self._commits.observe(seconds)
        self._batches.observe(reports)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._registry.collect()
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
        recorder = self._recorder()
        yield GaugeMetricFamily(
            "webhook_queue_reports", "Reports that wait for their commit.", recorder.waiting
        )
        yield CounterMetricFamily(
            "log_losses",
            "How often this process's last commit was missing when the database came back. Several processes "
            "count the same loss, so do not add them up.",
            recorder.losses,
        )
        last = max(self._last_received, self._quarantine.last_kept)
        if last:
            yield GaugeMetricFamily(
                "webhook_last_received_timestamp_seconds", "Arrival of the last report.", last
            )
