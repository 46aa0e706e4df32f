"""A program that records reports. Its arguments are a DSN, the number of reports, and the order numbers.

It prints the order, the version and the report_id of each receipt as JSON.
"""

import asyncio
import json
import random
import sys

from domain.statuses import STATUSES
from service.database.connections import DedicatedConnection, connect
from service.ingest.recorder import Receipt, Recorder
from tests.support.reports import report
from tests.support.waiting import PATIENCE_SECONDS

CALLERS = 16


async def record(dsn: str, reports: int, order_nos: list[str]) -> None:
    held = DedicatedConnection(lambda: connect(dsn))
    recorder = Recorder(
        held,
        lambda _events, _positions: None,
        queue_reports_max=1_000,
        seconds_max=PATIENCE_SECONDS,
    )
    left = iter(range(reports))
    receipts: list[Receipt] = []

    async def call() -> None:
        for _ in left:
            one = report(random.choice(order_nos), random.choice(STATUSES))
            receipts.append(await recorder.record(one))

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    await held.close()
    versions = [(receipt["order_no"], receipt["version"], receipt["report_id"]) for receipt in receipts]
    sys.stdout.write(json.dumps(versions))


if __name__ == "__main__":
    asyncio.run(record(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
