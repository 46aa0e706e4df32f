"""The append lock: how many events a second all processes together can append, whatever their number."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Final

import uvloop

from domain.order import NEW_ORDER, Arrival, decide
from projections.postgres import Connection
from service.database.connections import connect
from service.event_log import store
from service.event_log.codec import encode_event
from service.ingest.parser import parse
from tests.benchmarks import load
from tests.benchmarks.rebuilds import FIRST_RECEIVED_AT
from tests.benchmarks.report import Row, figure

# The numbers of events in a commit.
BATCHES: Final = (1, 16, 32, 128, 512)
WRITERS: Final = 4


def measure_append_lock(dsn: str, seconds: int) -> Iterator[Row]:
    """Append with several writers, which do nothing else, in commits of different sizes."""
    found = uvloop.run(_measure(dsn, seconds))
    most = max(found.values())
    by_size = ", ".join(f"{size}: {per_second:,.0f}/s" for size, per_second in found.items())
    yield figure(
        "events/s that one log can append, by any number of processes",
        f"{most:,.0f}/s",
        f"{WRITERS} writers; by events in a commit {by_size}",
    )


async def _measure(dsn: str, seconds: int) -> dict[int, float]:
    writers = [await connect(dsn) for _ in range(WRITERS)]
    try:
        return {size: await _append(writers, size, seconds) for size in BATCHES}
    finally:
        for writer in writers:
            await writer.close()


async def _append(writers: list[Connection], size: int, seconds: int) -> float:
    """Append events of new orders, and return how many were committed in a second."""
    report = parse(load.report(0, 0, load.STATUSES[0]), Arrival("report", FIRST_RECEIVED_AT, "127.0.0.1"))
    event = decide(NEW_ORDER, report)
    columns = [1] * size, [event.TOPIC] * size, [encode_event(event)] * size, store.APPEND_LOCK
    numbers = itertools.count()
    began = time.monotonic()

    async def write(connection: Connection) -> int:
        written = 0
        while time.monotonic() < began + seconds:
            order_nos = [f"{size}-{next(numbers)}" for _ in range(size)]
            written += len(await connection.fetch(store.APPEND, order_nos, *columns))
        return written

    written = await asyncio.gather(*(write(writer) for writer in writers))
    return sum(written) / (time.monotonic() - began)
