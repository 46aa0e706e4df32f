"""What a large log costs: rebuilds, filtered lists, webhooks and reads, against a small or an empty log."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psycopg

from service.database.schema import SERVICE_ROLE, as_role
from tests.benchmarks import load
from tests.benchmarks.lists import measure_lists
from tests.benchmarks.report import Row, out, ratio
from tests.benchmarks.serving import READ_PATHS, ROUNDS, SEED_SECONDS, WARM_SECONDS, Contest
from tests.support.filler import fill_log
from tests.support.recording import rebuilt

# An order of the filled log has a little fewer than six events.
EVENTS_BY_ORDER: Final = 5.8
# The rebuild of the large log is compared with that of a log of this part of its size.
SMALL_PART: Final = 20
REBUILD_RATIO_MIN: Final = 0.9
LOAD_RATIO_MIN: Final = 0.95


class _Filled(NamedTuple):
    """A filled log with all of its views."""

    orders: int
    events: int
    rebuilt_per_second: float


def measure_growth(dsns: tuple[str, str, str], folder: Path, events: int, seconds: int) -> Iterator[Row]:
    """Fill a small and a large log, and compare the large one with the small one and with an empty one.

    Args:
        dsns: the DSNs of three empty databases with the schema.
        folder: the folder for scripts and logs.
        events: the events of the large log.
        seconds: the duration of each load.
    """
    empty_dsn, small_dsn, large_dsn = dsns
    small, large = _fill(small_dsn, events // SMALL_PART), _fill(large_dsn, events)
    yield ratio(
        f"events/s of a rebuild of {large.events:,} events, as a share of {small.events:,}",
        large.rebuilt_per_second / small.rebuilt_per_second,
        f"{large.rebuilt_per_second:,.0f}/s against {small.rebuilt_per_second:,.0f}/s, all three views",
        least=REBUILD_RATIO_MIN,
    )
    yield from measure_lists(large_dsn, folder)
    yield from _measure_loads(empty_dsn, large_dsn, folder, large, seconds)


def _fill(dsn: str, events: int) -> _Filled:
    orders = int(events / EVENTS_BY_ORDER)
    began = time.monotonic()
    written = fill_log(dsn, orders)
    took = time.monotonic() - began
    out.print(f"{written:,} events written in {took:.0f} s ({written / took:,.0f}/s)", markup=False)
    began = time.monotonic()
    asyncio.run(rebuilt(as_role(dsn, SERVICE_ROLE)))
    took = time.monotonic() - began
    out.print(f"views rebuilt in {took:.0f} s ({written / took:,.0f}/s)", markup=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    return _Filled(orders, written, written / took)


def _measure_loads(
    empty_dsn: str, large_dsn: str, folder: Path, filled: _Filled, seconds: int
) -> Iterator[Row]:
    with Contest(empty_dsn, folder, seconds) as empty, Contest(large_dsn, folder, seconds) as large:

        def send(contest: Contest, for_seconds: int) -> load.Load:
            done, _ = contest.send_reports(contest.ours, for_seconds)
            return done

        # Each service needs some orders of its own to read.
        seeded, reports = empty.send_reports(empty.ours, SEED_SECONDS)
        send(large, SEED_SECONDS)
        pairs = [(send(large, seconds), send(empty, seconds)) for _ in range(ROUNDS)]
        yield _compare("durable webhooks/s", pairs, filled)
        orders = seeded.answered // len(load.STATUSES) - load.ORDERS_INTERLEAVED
        for suffix in READ_PATHS:
            few = load.Reads(load.order_prefix(reports.run), load.ORDER_DIGITS, orders, empty.key, suffix)
            many = load.Reads("KOM", 1, filled.orders, large.key, suffix)
            for number in range(ROUNDS + 1):
                for_seconds = seconds if number else WARM_SECONDS
                pair = (
                    load.run(many, large.ours.port, for_seconds, folder),
                    load.run(few, empty.ours.port, for_seconds, folder),
                )
                pairs = [*pairs, pair] if number else []
            yield _compare(f"GET /orders/{{order_no}}{suffix} of random orders per second", pairs, filled)


def _compare(what: str, pairs: list[tuple[load.Load, load.Load]], filled: _Filled) -> Row:
    large, empty = zip(*pairs, strict=True)
    failed = sum(one.failed for one in (*large, *empty))
    return ratio(
        f"{what} with {filled.events:,} events of {filled.orders:,} orders, as a share of an empty log",
        load.median_ratio(large, empty),
        load.compared(large, empty),
        least=LOAD_RATIO_MIN,
    ).unless(f"{failed} requests had another status" if failed else None)
