"""The metrics of several processes as those of one.

Counters and histograms are sums that include the processes that have ended, so they never fall. Gauges are
those of the running processes.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from prometheus_client.core import Metric

# The last values of such families stay in the sums when a process ends.
LASTING: Final = frozenset({"counter", "histogram"})
# Gauges that are not summed.
HIGHEST: Final = frozenset(
    {
        "order_tracking_build_info",
        "webhook_last_received_timestamp_seconds",
        "retention_last_pass_timestamp_seconds",
    }
)
LOWEST: Final = frozenset({"process_start_time_seconds"})
# When a counter began, beside the counter.
CREATED: Final = "_created"

# A sample: its name, its labels and its value.
PlainSample: TypeAlias = tuple[str, dict[str, str], float]


class PlainMetric(NamedTuple):
    """A family of metrics that can be sent as JSON, as an array."""

    name: str
    documentation: str
    kind: str
    samples: Sequence[PlainSample]


def to_plain(families: Iterable[Metric]) -> list[PlainMetric]:
    """Return families of metrics as plain values."""
    return [
        PlainMetric(
            family.name,
            family.documentation,
            family.type,
            [(one.name, dict(one.labels), float(one.value)) for one in family.samples],
        )
        for family in families
    ]


def to_metrics(families: Iterable[Sequence[object]]) -> list[Metric]:
    """Return plain families, or the arrays that JSON made of them, as metrics."""
    metrics = []
    for name, documentation, kind, samples in map(PlainMetric._make, families):
        metric = Metric(name, documentation, kind)
        for sample_name, labels, value in samples:
            metric.add_sample(sample_name, labels, value)
        metrics.append(metric)
    return metrics


class MetricSums:
    """Sums the last reports of processes."""

    def __init__(self) -> None:
        self._ended: list[PlainMetric] = []
        self._last: dict[int, list[PlainMetric]] = {}

    def report(self, process: int, families: Iterable[Sequence[object]]) -> None:
        """Replace a process's last report. It must not be older than the last one."""
        self._last[process] = [PlainMetric._make(family) for family in families]

    def end(self, process: int) -> None:
        """Keep the counters of a process that has ended, and drop its gauges."""
        last = self._last.pop(process, [])
        self._ended = _add([self._ended, [family for family in last if family.kind in LASTING]])

    def families(self) -> list[PlainMetric]:
        """Return the sums."""
        return _add([self._ended, *self._last.values()])


def _add(reports: Iterable[Iterable[PlainMetric]]) -> list[PlainMetric]:
    families: dict[str, PlainMetric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for report in reports:
        for family in report:
            families.setdefault(family.name, family)
            sums = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(labels.items()))
                sums[key] = _join(name, sums[key], value) if key in sums else value
    return [
        family._replace(
            samples=[(sample, dict(labels), value) for (sample, labels), value in values[name].items()]
        )
        for name, family in families.items()
    ]


def _join(name: str, one: float, other: float) -> float:
    if name in HIGHEST:
        return max(one, other)
    if name in LOWEST or name.endswith(CREATED):
        return min(one, other)
    return one + other
