"""The report factory for tests that record reports."""

import json
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

from domain.order import Arrival, Report

NOW: Final = datetime(2026, 1, 31, 8, 30, tzinfo=UTC)


def report(
    order_no: str = "KOM1",
    status: str = "Dikirim",
    cnote: str | None = None,
    received_at: datetime = NOW,
    remote: str | None = None,
    **fields: Any,
) -> Report:
    """Make a report with a unique report_id and body."""
    report_id = str(uuid4())
    body = json.dumps({"order_no": order_no, "cnote": cnote, "status": status, "mark": report_id})
    return Report(Arrival(report_id, received_at, remote), order_no, status, cnote, body, **fields)
