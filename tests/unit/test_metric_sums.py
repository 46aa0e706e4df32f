"""The metrics of several processes are shown as those of one, also after some have ended."""

import json

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.api.metric_sums import MetricSums, PlainMetric, to_metrics, to_plain


def reported(count: float, size: float, at: float, seconds: float) -> list[PlainMetric]:
    """Return a process's metrics as they arrive over a channel."""
    counter = CounterMetricFamily("reports", "Reports.", labels=["outcome"])
    counter.add_metric(["late"], count)
    registry = CollectorRegistry()
    Histogram("took", "Durations.", buckets=(1.0, 2.0), registry=registry).observe(seconds)
    families: list[Metric] = [
        counter,
        GaugeMetricFamily("size", "Size.", size),
        GaugeMetricFamily("webhook_last_received_timestamp_seconds", "Arrival.", at),
        GaugeMetricFamily("process_start_time_seconds", "Start.", at),
        *registry.collect(),
    ]
    plain: list[PlainMetric] = json.loads(json.dumps(to_plain(families)))
    return plain


def values(sums: MetricSums) -> dict[tuple[str, str], float]:
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in to_metrics(sums.families())
        for sample in family.samples
    }


def test_counters_last_and_gauges_end_with_their_process() -> None:
    """Counters and histograms of an ended process stay in the sums; of its gauges, nothing stays."""
    sums = MetricSums()
    sums.report(1, reported(2, 10, 100, 0.5))
    sums.report(2, reported(3, 20, 200, 1.5))
    sums.report(1, reported(4, 11, 101, 0.5))
    both = values(sums)
    assert both["reports_total", "late"] == 7
    assert both["size", ""] == 31
    assert both["webhook_last_received_timestamp_seconds", ""] == 200
    assert both["process_start_time_seconds", ""] == 101
    assert [both["took_bucket", le] for le in ("1.0", "2.0", "+Inf")] == [1, 2, 2]
    created = both["took_created", ""]
    sums.end(2)
    sums.end(3)
    one = values(sums)
    assert (one["reports_total", "late"], one["size", ""], one["took_count", ""]) == (7, 11, 2)
    assert one["took_created", ""] == created
    sums.end(1)
    none = values(sums)
    assert none["reports_total", "late"] == 7
    assert ("size", "") not in none


def test_the_sums_are_written_like_the_metrics_of_one_process() -> None:
    """The text for Prometheus of one report is that of the metrics themselves."""
    registry = CollectorRegistry()
    Histogram("took", "Durations.", ["route"], registry=registry).labels("/orders").observe(0.2)
    sums = MetricSums()
    sums.report(1, to_plain(registry.collect()))

    class Collected:
        def collect(self) -> list[Metric]:
            return to_metrics(sums.families())

    assert generate_latest(Collected()) == generate_latest(registry)
