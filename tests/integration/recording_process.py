"""A process of its own that records reports; its arguments are a DSN, how many, and the orders.

It writes a line of JSON: the versions that its receipts named, and the longest that one report took in seconds.
"""

import asyncio
import json
import random
import sys
import time
from datetime import UTC, datetime
from uuid import uuid4

from domain.order import Report
from domain.statuses import STATUSES
from service.database import HeldConnection, connect
from service.event_store import EventStore
from service.recorder import Receipt, Recorder

CALLERS = 16
SECONDS_MAX = 15.0


async def record(dsn: str, reports: int, order_nos: list[str]) -> None:
    held = HeldConnection(lambda: connect(dsn))
    recorder = Recorder(
        EventStore(held), lambda _events, _positions: None, queue_reports_max=1_000, seconds_max=SECONDS_MAX
    )
    left = iter(range(reports))
    receipts: list[Receipt] = []
    slowest = 0.0

    async def call() -> None:
        nonlocal slowest
        for _ in left:
            report = Report(
                str(uuid4()), random.choice(order_nos), random.choice(STATUSES), None, "{}", None, None, None
            )
            began = time.monotonic()
            receipts.append(await recorder.record(report, datetime.now(UTC)))
            slowest = max(slowest, time.monotonic() - began)

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    await held.close()
    versions = [(receipt.order_no, receipt.version, receipt.report_id) for receipt in receipts]
    sys.stdout.write(json.dumps({"versions": versions, "slowest": slowest}))


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
