"""The measurements over HTTP: a real ``serve`` process and the baselines, in turns.

PostgreSQL, the load generator and other programs share the machine. Therefore every round measures each
contender once, and the result is the median of the ratios within the rounds.
"""

import asyncio
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Final, NamedTuple, Self

import psycopg

from service.database.api_keys import create_key
from service.database.connections import connected
from service.database.schema import prepare_database
from tests.benchmarks import load
from tests.benchmarks.rebuilds import SampleLog
from tests.benchmarks.report import Row, out, ratio, resident_mb

ROOT: Final = Path(__file__).resolve().parents[2]
ROUNDS: Final = 3
WARM_SECONDS: Final = 2
# A load at a fixed rate, which leaves time between the requests.
FIXED_SECONDS: Final = 20
FIXED_PER_SECOND: Final = 1_000
# The seconds of webhooks that create the orders to read.
SEED_SECONDS: Final = 4
START_SECONDS_MAX: Final = 30.0
STOP_SECONDS_MAX: Final = 20.0
CATCH_UP_SECONDS_MAX: Final = 60.0
POLL_SECONDS: Final = 0.02

# A history longer than that of any real order, and the number of reports recorded into it and into a short one.
LONG_HISTORY_EVENTS: Final = 10_000
HISTORY_REPORTS: Final = 400
HISTORY_RATIO_MAX: Final = 1.1

MEMORY_MB_MAX: Final = 200

# The reads that are measured: the rest of their paths after the order's number, and the share of a handler that
# does nothing to reach.
READ_PATHS: Final = {"": 0.70, "/timeline": 0.40}

IS_BEHIND: Final = """
    SELECT EXISTS (
        SELECT FROM order_events
        WHERE notification_id > least(
            (SELECT position FROM current_status.projection), (SELECT position FROM timeline.projection)))
"""
# Each report is sent once, so a body that is recorded twice was doubled.
COUNT_EVENTS: Final = """
    SELECT count(*), count(*) - count(DISTINCT md5(convert_from(state, 'UTF8')::json ->> 'body'))
    FROM order_events
"""


class Process(NamedTuple):
    """A server process under load."""

    pid: int
    port: int

    def ask(
        self, method: str, path: str, body: bytes | None = None, key: str = ""
    ) -> tuple[str, dict[str, str]]:
        """Return the body of a response, and the headers that the handler set.

        Raises:
            RuntimeError: the request did not succeed.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS_MAX)
        connection.request(method, path, body, {"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise RuntimeError(f"{method} {path} was answered with {answer.status}: {text}")
        names = ("Content-Type", "Server", "ETag")
        return text, {name: value for name in names if (value := answer.getheader(name)) is not None}


@contextmanager
def running(folder: Path, module: str, *arguments: str, **settings: str) -> Iterator[Process]:
    """Run a module that listens on the port in its arguments or in ORDER_TRACKING_PORT."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDER_TRACKING_")}
    # A folder of its own: the service keeps the key of its history there.
    own = {"ORDER_TRACKING_PORT": str(port), "ORDER_TRACKING_STATE_DIR": str(folder / f"state-{port}")}
    environment = {**inherited, "PYTHONPATH": str(ROOT), **own, **settings}
    words = [str(port) if argument == "PORT" else argument for argument in arguments]
    errors = folder / f"{module}-{port}.log"
    # Run it outside the project, which may contain a .env file.
    with errors.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        due = time.monotonic() + START_SECONDS_MAX
        while not _listens(port):
            if child.poll() is not None or time.monotonic() > due:
                raise RuntimeError(f"{module} does not listen: {errors.read_text(encoding='utf-8')[-2_000:]}")
            time.sleep(POLL_SECONDS)
        yield Process(child.pid, port)
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


async def _create_key(dsn: str) -> str:
    # The service, which starts later, finds the schema already made.
    await prepare_database(dsn)
    async with connected(dsn) as connection:
        return await create_key(connection, "benchmarks", "admin", None)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class Contest:
    """The service on its own database, and its baselines.

    Args:
        dsn: the DSN of an empty database.
        folder: the folder for scripts and logs.
        seconds: the duration of each load.
        settings: further settings of the service, with their prefix.
    """

    _runs = itertools.count(1)

    def __init__(
        self,
        dsn: str,
        folder: Path,
        seconds: int,
        **settings: str,
    ) -> None:
        self._dsn = dsn
        self._settings = settings
        self.key = ""
        self._folder = folder
        self._seconds = seconds
        self._stack = ExitStack()
        self.answered = self.failed = self.loads = 0
        self.catch_up_seconds = 0.0

    def __enter__(self) -> Self:
        # With a webhook token, every reader needs a key.
        self.key = asyncio.run(_create_key(self._dsn))
        try:
            self.ours = self.start(
                *("service", "serve"),
                ORDER_TRACKING_DATABASE_URL=self._dsn,
                ORDER_TRACKING_WEBHOOK_TOKENS=load.WEBHOOK_TOKEN,
                **self._settings,
            )
            self._database = self._stack.enter_context(psycopg.connect(self._dsn, autocommit=True))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, module: str, *arguments: str, **settings: str) -> Process:
        """Start another process until the contest ends; see ``running``."""
        return self._stack.enter_context(running(self._folder, module, *arguments, **settings))

    def start_nothing(self) -> Process:
        """Start the handler that does nothing, with responses of the same size as the service's."""
        bodies = [load.report(0, 0, status) for status in load.STATUSES]
        receipts = [self.ours.ask("PUT", load.WEBHOOK_PATH, body) for body in bodies]
        self.answered += len(bodies)
        self.wait_for_views()
        path = f"/orders/{load.order_number(0, 0)}"
        answers = {
            "receipt": receipts[-1],
            "order": self.ours.ask("GET", path, key=self.key),
            "timeline": self.ours.ask("GET", f"{path}/timeline", key=self.key),
        }
        return self.start("tests.benchmarks.baselines", "nothing", "PORT", json.dumps(answers))

    def start_library(self, dsn: str) -> Process:
        """Start the library's own application on a separate database."""
        return self.start("tests.benchmarks.baselines", "library", "PORT", dsn)

    def send_reports(
        self, target: Process, seconds: int, per_second: int = 0
    ) -> tuple[load.Load, load.Reports]:
        """Load a contender with webhooks, as many as it can answer, or so many a second.

        If it is the service, wait for its views afterwards.
        """
        self._database.execute("CHECKPOINT")
        reports = load.Reports(next(self._runs))
        if per_second:
            done = load.run_at(reports, target.port, seconds, per_second)
        else:
            done = load.run(reports, target.port, seconds, self._folder)
        if target is self.ours:
            self.answered += done.answered
            self.failed += done.failed
            self.loads += 1
            self.catch_up_seconds = max(self.catch_up_seconds, self.wait_for_views())
        return done, reports

    def rounds(self, *targets: Process) -> list[list[load.Load]]:
        """Load every contender with webhooks, in turns, and return the results of each."""
        for target in targets:
            self.send_reports(target, WARM_SECONDS)
        results: list[list[load.Load]] = [[] for _ in targets]
        for _ in range(ROUNDS):
            for target, found in zip(targets, results, strict=True):
                found.append(self.send_reports(target, self._seconds)[0])
        return results

    def wait_for_views(self) -> float:
        """Wait until both views have the whole log, and return the duration in seconds."""
        began = time.monotonic()
        while self._database.execute(IS_BEHIND).fetchone() == (True,):
            if time.monotonic() > began + CATCH_UP_SECONDS_MAX:
                raise RuntimeError(f"the views are still behind after {CATCH_UP_SECONDS_MAX} s")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - began

    def fault(self) -> str | None:
        """Compare the log with the responses after all loads, and return the first fault or None."""
        events, doubled = self._database.execute(COUNT_EVENTS).fetchone() or (0, 0)
        # Requests in flight when the generator stopped are recorded, but their responses were not read.
        unseen_max = self.loads * load.CONNECTIONS
        if self.failed:
            return f"{self.failed} webhooks were not answered with 200"
        if doubled:
            return f"{doubled} reports are in the log twice"
        if not self.answered <= events <= self.answered + unseen_max:
            return f"{self.answered} webhooks were answered, but {events} events are there"
        return None


def measure_webhooks(dsn: str, library_dsn: str | None, folder: Path, seconds: int) -> Iterator[Row]:
    """Measure throughput, p99 and memory under full load with webhooks.

    If ``library_dsn`` is given, the library's application is a further baseline.
    """
    with Contest(dsn, folder, seconds) as contest:
        targets = [contest.start_nothing(), contest.ours]
        if library_dsn is not None:
            targets.append(contest.start_library(library_dsn))
        # Nothing was recorded before: the server's folder and the service are new.
        fresh = _compare_at_rate(contest, targets[0], "of a fresh folder")
        nothing, ours, *library = contest.rounds(*targets)
        warm = _compare_at_rate(contest, targets[0], "after the loads")
        fault = contest.fault()
        memory = resident_mb(contest.ours.pid)
        others_failed = sum(done.failed for done in itertools.chain(nothing, *library))
        if others_failed:
            fault = f"{others_failed} requests to the baselines failed"
        out.print(
            f"webhooks: {contest.answered} answered with 200, {fault or 'each in the log, once'}; "
            f"the views had the whole log {contest.catch_up_seconds:.2f} s after a load at the latest"
        )
        yield ratio(
            "durable webhooks/s, as a share of a handler that parses and does nothing",
            load.median_ratio(ours, nothing),
            f"{load.median(ours):,.0f}/s against {load.median(nothing):,.0f}/s; "
            f"by round {load.by_round(ours, nothing)}",
            least=0.60,
        ).unless(fault)
        p99 = [one.p99_ms / other.p99_ms for one, other in zip(ours, nothing, strict=True)]
        yield ratio(
            "p99 of a webhook at that load, as a multiple of that handler's",
            statistics.median(p99),
            f"{statistics.median(one.p99_ms for one in ours):.1f} ms against "
            f"{statistics.median(one.p99_ms for one in nothing):.1f} ms",
            most=3,
        ).unless(fault)
        yield fresh.unless(fault)
        yield warm.unless(fault)
        if library:
            yield ratio(
                "durable webhooks/s, against the library's own application and recorder",
                load.median_ratio(ours, library[0]),
                f"{load.median(ours):,.0f}/s against {load.median(library[0]):,.0f}/s",
                least=15,
            ).unless(fault)
        yield Row(
            "memory of the service after that load",
            f"{memory.now:.0f} MB",
            f"< {MEMORY_MB_MAX} MB",
            memory.most < MEMORY_MB_MAX,
            f"at its most {memory.most:.0f} MB, {contest.answered:,} webhooks",
        )


def _compare_at_rate(contest: Contest, nothing: Process, when: str) -> Row:
    """Compare the 99th percentiles of the service and of the handler that does nothing at a fixed rate."""
    (theirs, _), (ours, _) = (
        contest.send_reports(target, FIXED_SECONDS, FIXED_PER_SECOND) for target in (nothing, contest.ours)
    )
    return ratio(
        f"p99 of a webhook at {FIXED_PER_SECOND:,}/s {when}, as a multiple of that handler's",
        ours.p99_ms / theirs.p99_ms,
        f"{ours.p99_ms:.1f} ms against {theirs.p99_ms:.1f} ms, by a generator of our own",
        most=3,
    )


def measure_reads(dsn: str, folder: Path, seconds: int) -> Iterator[Row]:
    """Measure reads of random orders and of their timelines.

    The baseline is a handler with responses of the same size and headers. Unknown orders are compared with
    known ones.
    """
    with Contest(dsn, folder, seconds) as contest:
        nothing = contest.start_nothing()
        done, reports = contest.send_reports(contest.ours, SEED_SECONDS)
        # The last block may lack reports of some orders.
        orders = done.answered // len(load.STATUSES) - load.ORDERS_INTERLEAVED

        def read(target: Process, suffix: str, for_seconds: int, *, is_known: bool = True) -> load.Load:
            run, status = (reports.run, HTTPStatus.OK) if is_known else (load.UNKNOWN_RUN, HTTPStatus.NOT_FOUND)
            prefix = load.order_prefix(run)
            reads = load.Reads(prefix, load.ORDER_DIGITS, orders, contest.key, suffix, status)
            return load.run(reads, target.port, for_seconds, folder)

        found: dict[str, list[tuple[load.Load, load.Load, load.Load]]] = {path: [] for path in READ_PATHS}
        for number in range(ROUNDS + 1):
            for_seconds = seconds if number else WARM_SECONDS
            for suffix, loads in found.items():
                baseline = read(nothing, suffix, for_seconds)
                known = read(contest.ours, suffix, for_seconds)
                unknown = read(contest.ours, suffix, for_seconds, is_known=False)
                if number:
                    loads.append((baseline, known, unknown))
    for suffix, loads in found.items():
        baselines, known_loads, unknown_loads = zip(*loads, strict=True)
        path = f"GET /orders/{{order_no}}{suffix}"
        failed = sum(one.failed for one in (*baselines, *known_loads, *unknown_loads))
        for made in (
            ratio(
                f"{path} per second, as a share of a handler that does nothing",
                load.median_ratio(known_loads, baselines),
                f"{load.compared(known_loads, baselines)}; {orders:,} orders",
                least=READ_PATHS[suffix],
            ),
            ratio(
                f"{path} of unknown orders per second, as a share of known ones",
                load.median_ratio(unknown_loads, known_loads),
                load.compared(unknown_loads, known_loads),
                least=1,
            ),
        ):
            yield made.unless(f"{failed} reads had another status" if failed else None)


def measure_history(dsn: str, folder: Path) -> Row:
    """Measure single webhooks for an order with a long history and for fresh orders, in turns."""
    with Contest(dsn, folder, 0) as contest:
        long = SampleLog(orders=1, reports=LONG_HISTORY_EVENTS)
        long.write(dsn)
        contest.wait_for_views()
        connection = http.client.HTTPConnection("127.0.0.1", contest.ours.port, timeout=START_SECONDS_MAX)

        def send(body: bytes) -> float:
            began = time.perf_counter()
            connection.request("PUT", load.WEBHOOK_PATH, body)
            answer = connection.getresponse()
            answer.read()
            took = time.perf_counter() - began
            if answer.status >= HTTPStatus.BAD_REQUEST:
                raise RuntimeError(f"a webhook was answered with {answer.status}")
            return took * 1e3

        send(load.report(0, 0, load.STATUSES[0]))
        # The process has not cached the order with the long history yet, so it is looked up like a fresh one.
        first_long = send(long.report(0))
        long_ms, fresh_ms = [], []
        for number in range(1, HISTORY_REPORTS + 1):
            fresh_ms.append(send(load.report(0, number, load.STATUSES[0])))
            long_ms.append(send(long.report(0)))
        connection.close()
    return ratio(
        "recording into an order of 10,000 events, as a multiple of fresh orders'",
        statistics.median(long_ms) / statistics.median(fresh_ms),
        f"{statistics.median(long_ms):.2f} ms against {statistics.median(fresh_ms):.2f} ms, one at a time; "
        f"the long one's first, not in memory yet, {first_long:.2f} ms",
        most=HISTORY_RATIO_MAX,
    )
