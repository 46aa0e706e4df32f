"""The filtered lists over HTTP, on a log that is many times larger than a page."""

import http.client
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from tests.benchmarks.report import Row
from tests.benchmarks.serving import running
from tests.support.filler import NO_CNOTE

SECONDS_MAX: Final = 0.050
# For each filter: so many pages, each read once to warm the cache, and then so often.
PAGES: Final = 3
ROUNDS: Final = 5
FILTERS_OF_EACH_LIST: Final = 150
READ_SECONDS_MAX: Final = 30.0


class Answer(NamedTuple):
    """A page, and how long it took."""

    seconds: float
    next: str | None
    status: int


def _filters(now: datetime) -> dict[str, list[dict[str, str]]]:
    """Return every combination of filters of each list."""
    moments = [(now - timedelta(days=days)).isoformat() for days in (1, 30, 90, 350, 600)]
    ranges = [("", ""), *((moment, "") for moment in moments), *(("", moment) for moment in moments)]
    ranges += [(moments[2], moments[1]), (moments[4], moments[3])]
    audit = [
        {
            "verdict": verdict,
            "order_no": order_no,
            "from": before,
            "to": reported,
            "since": since,
            "until": until,
        }
        for verdict, order_no, before, reported, (since, until) in itertools.product(
            ("", "advanced", "refused", "unrecognised"),
            ("", "KOM30"),
            ("", "submitted", "completed"),
            ("", "in_transit", "cancelled"),
            ranges,
        )
    ]
    orders = [
        {
            "status": status,
            "cnote": cnote,
            "verdict": verdict,
            "updated_after": after,
            "updated_before": before,
            "unmoved_for": unmoved,
            "sort": sort,
        }
        for status, cnote, verdict, (after, before), unmoved, sort in itertools.product(
            ("", "completed", "in_transit", "lost"),
            ("", NO_CNOTE, "AWB77"),
            ("", "refused"),
            ranges,
            ("", "P7D", "P300D"),
            ("first", "updated"),
        )
    ]
    return {"/audit/transitions": audit, "/orders": orders}


def measure_lists(dsn: str, folder: Path) -> Iterator[Row]:
    """Read pages with many combinations of filters from a large log, whose views are up to date."""
    with running(folder, "service", "serve", ORDER_TRACKING_DATABASE_URL=dsn) as service:
        for path, filters in _filters(datetime.now(UTC)).items():
            yield _measure(service.port, path, filters)


def _measure(port: int, path: str, filters: list[dict[str, str]]) -> Row:
    chosen = random.Random(1).sample(filters, min(len(filters), FILTERS_OF_EACH_LIST))
    taken: list[tuple[float, str]] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READ_SECONDS_MAX)
    failed = 0
    for filter_ in chosen:
        url: str | None = f"{path}?{urlencode({name: value for name, value in filter_.items() if value})}"
        for _ in range(PAGES):
            if url is None:
                break
            answers = [_read(connection, url) for _ in range(ROUNDS + 1)][1:]
            failed += sum(answer.status != http.client.OK for answer in answers)
            taken += [(answer.seconds, url) for answer in answers]
            url = answers[-1].next
    connection.close()
    seconds = sorted(one for one, _ in taken)
    p99 = statistics.quantiles(seconds, n=100)[98]
    slowest, where = max(taken)
    return Row(
        f"{path}, {len(chosen)} combinations of filters, p99",
        f"{p99 * 1e3:.0f} ms",
        f"<= {SECONDS_MAX * 1e3:.0f} ms",
        p99 <= SECONDS_MAX and not failed,
        f"p50 {statistics.median(seconds) * 1e3:.1f} ms, slowest {slowest * 1e3:.0f} ms ({where}); "
        f"{failed} failed",
    )


def _read(connection: http.client.HTTPConnection, url: str) -> Answer:
    began = time.monotonic()
    connection.request("GET", url)
    answer = connection.getresponse()
    body: Any = json.loads(answer.read())
    return Answer(time.monotonic() - began, body.get("next"), answer.status)
