"""Several processes on one port and one database, against one: webhooks, and the processor time of each."""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psutil  # type: ignore[import-untyped]
import psycopg

from service.database.schema import prepare_database
from tests.benchmarks import load
from tests.benchmarks.report import Row, ratio
from tests.benchmarks.serving import (
    POLL_SECONDS,
    ROUNDS,
    START_SECONDS_MAX,
    WARM_SECONDS,
    Process,
    running,
)

# The numbers of processes.
COUNTS: Final = (1, 2, 3)
# The target: never slower than one process, from two cores on.
LEAST: Final = 1.0

POSTMASTER: Final = "SELECT pg_read_file('postmaster.pid')"
COUNT_EVENTS: Final = "SELECT count(*) FROM order_events"


class _Loaded(NamedTuple):
    """A load on some processes, and the processor time of each webhook: the service's and the database's."""

    done: load.Load
    service_us: float
    database_us: float


def _cpu_seconds(pid: int) -> dict[int, float]:
    """Return the processor time of a process and of its descendants, by process id."""
    seconds = {}
    root = psutil.Process(pid)
    for one in (root, *root.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[one.pid] = times.user + times.system
    return seconds


def _ready_processes(service: Process) -> int:
    try:
        body, _ = service.ask("GET", "/readyz")
    except RuntimeError:
        # None is ready yet.
        return 0
    ready: int = json.loads(body)["ready_processes"]
    return ready


def wait_for_processes(service: Process, count: int) -> None:
    """Wait until all processes are ready: connections that are opened earlier stay with the first ones."""
    due = time.monotonic() + START_SECONDS_MAX
    while _ready_processes(service) < count:
        if time.monotonic() > due:
            raise RuntimeError(f"fewer than {count} processes are ready after {START_SECONDS_MAX} s")
        time.sleep(POLL_SECONDS)


def measure_processes(dsn: str, folder: Path, seconds: int) -> Iterator[Row]:
    """Measure webhooks at the same load with one, two and three processes, in turns on one database."""
    asyncio.run(prepare_database(dsn))
    with psycopg.connect(dsn, autocommit=True) as connection:
        (postmaster,) = connection.execute(POSTMASTER).fetchone() or ("0",)
        database_pid = int(postmaster.split("\n", 1)[0])
        runs = iter(range(1, 10_000))

        def measure(count: int) -> _Loaded:
            settings = {"ORDER_TRACKING_DATABASE_URL": dsn, "ORDER_TRACKING_WEBHOOK_TOKENS": load.WEBHOOK_TOKEN}
            with running(folder, "service", "serve", "--processes", str(count), **settings) as service:
                wait_for_processes(service, count)
                load.run(load.Reports(next(runs)), service.port, WARM_SECONDS, folder)
                connection.execute("CHECKPOINT")
                before = _cpu_seconds(service.pid), _cpu_seconds(database_pid)
                done = load.run(load.Reports(next(runs)), service.port, seconds, folder)
                after = _cpu_seconds(service.pid), _cpu_seconds(database_pid)
            service_us, database_us = (
                sum(now[pid] - was.get(pid, 0.0) for pid in now) / max(1, done.answered) * 1e6
                for was, now in zip(before, after, strict=True)
            )
            return _Loaded(done, service_us, database_us)

        found: dict[int, list[_Loaded]] = {count: [] for count in COUNTS}
        for _ in range(ROUNDS):
            for count, loads in found.items():
                loads.append(measure(count))
    for count in COUNTS[1:]:
        ours, one = ([run.done for run in found[number]] for number in (count, 1))
        failed = sum(done.failed for done in (*ours, *one))
        yield ratio(
            f"durable webhooks/s of {count} processes, as a share of one",
            load.median_ratio(ours, one),
            f"{_describe(found[count])} against {_describe(found[1])}; by round {load.by_round(ours, one)}",
            least=LEAST,
        ).unless(f"{failed} webhooks were not answered with 200" if failed else None)


def _describe(loads: list[_Loaded]) -> str:
    per_second = statistics.median(one.done.per_second for one in loads)
    service_us = statistics.median(one.service_us for one in loads)
    database_us = statistics.median(one.database_us for one in loads)
    return f"{per_second:,.0f}/s ({service_us:.0f} us of the service, {database_us:.0f} of the database)"
