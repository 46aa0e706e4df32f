"""The metrics of the history."""

from prometheus_client.core import GaugeMetricFamily, Metric

from projections.postgres import Connection
from service.features.proofs.signer import Signer
from service.features.proofs.status import read_status


async def read_metrics(connection: Connection, signer: Signer) -> list[Metric]:
    """Return the gauges of the history, which all processes share."""
    status = await read_status(signer, connection)
    return [
        GaugeMetricFamily("history_entries", "Entries of the history.", status.entries),
        GaugeMetricFamily("history_signed_entries", "Entries that are signed.", status.signed),
        GaugeMetricFamily(
            "history_lag_seconds", "Age of the oldest event that is not signed.", status.lag_seconds
        ),
        GaugeMetricFamily(
            "history_halted",
            "1 if the history does not continue its last signed checkpoint.",
            status.halted is not None,
        ),
    ]
