"""The cost of the provable history: of the follower, of webhooks beside it, of proofs and of the check.

Both services have the other features, so that proofs are the only difference.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import psutil  # type: ignore[import-untyped]  # it brings no types

from domain.order import NEW_ORDER, Order, decide, evolve
from service.database.connections import DedicatedConnection, connect, connected
from service.database.schema import prepare_database
from service.event_log import store
from service.event_log.follow import Memory
from service.features import DEFAULT
from service.features.proofs import storage
from service.features.proofs import verify as verifier
from service.features.proofs.bundles import make_bundle
from service.features.proofs.check import check_history
from service.features.proofs.follower import BATCH_LEAVES_MAX, Follower
from service.features.proofs.signer import Signer
from tests.benchmarks import load
from tests.benchmarks.report import Row, figure, ratio
from tests.benchmarks.serving import ROUNDS, WARM_SECONDS, Contest
from tests.support.reports import report

T = TypeVar("T")

WITH: Final = "with"
WITHOUT: Final = "without"
OTHERS: Final = ",".join(DEFAULT)
# Events that are added from the log, and those that are added from memory.
LOGGED: Final = 200_000
REMEMBERED: Final = 50_000
EVENTS_OF_AN_ORDER: Final = 10
APPENDED: Final = 1_000
FOLLOWER_MICROSECONDS_MAX: Final = 6.0
# The differences are smaller than the noise of a round, and two processes of one program differ as much.
STARTS: Final = 4
PAIRS: Final = 2
RATE_SECONDS: Final = 10
RATE: Final = 1_000
SIZES: Final = """
    SELECT pg_total_relation_size('history_tiles') + pg_total_relation_size('history_salts')
"""


def measure_proofs(dsn: str, database: Callable[[str], str], folder: Path, seconds: int) -> Iterator[Row]:
    """Measure the follower by itself, and webhooks with it and without it.

    Args:
        dsn: a database with the schema.
        database: makes an empty database of a name, and returns its DSN.
        folder: the folder for keys, scripts and logs.
        seconds: the duration of each load.
    """
    yield from asyncio.run(_measure_follower(dsn, folder))
    costs: tuple[list[float], list[float]] = ([], [])
    loads: tuple[list[load.Load], list[load.Load]] = ([], [])
    fault = None
    for start in range(STARTS):
        dsns = [database(f"{name}_history_{start}") for name in (WITH, WITHOUT)]
        with (
            Contest(dsns[0], folder, seconds, ORDER_TRACKING_FEATURES=f"{OTHERS},proofs") as with_it,
            Contest(dsns[1], folder, seconds, ORDER_TRACKING_FEATURES=OTHERS) as without,
        ):
            both = (with_it, without)
            for contest in both:
                contest.send_reports(contest.ours, WARM_SECONDS)
            # One after the other: after a full load, the views still have work to do.
            _in_turns(both, costs, _cpu_at_rate)
            _in_turns(both, loads, lambda contest: contest.send_reports(contest.ours, seconds)[0])
            fault = fault or with_it.fault() or without.fault()
    differences = [one - other for one, other in zip(*costs, strict=True)]
    yield Row(
        f"CPU of the service for a webhook at {RATE:,}/s, with the history more than without",
        f"{statistics.median(differences):.1f} us",
        f"<= {FOLLOWER_MICROSECONDS_MAX:.0f} us",
        statistics.median(differences) <= FOLLOWER_MICROSECONDS_MAX,
        f"{statistics.median(costs[0]):.0f} us against {statistics.median(costs[1]):.0f} us; by round "
        f"{' '.join(f'{one:.0f}' for one in differences)}",
    ).unless(fault)
    yield ratio(
        "durable webhooks/s with the history, as a share of those without it",
        load.median_ratio(*loads),
        f"{load.median(loads[0]):,.0f}/s against {load.median(loads[1]):,.0f}/s; "
        f"by round {load.by_round(*loads)}",
        least=0.97,
    ).unless(fault)


def _in_turns(
    contests: tuple[Contest, Contest], found: tuple[list[T], list[T]], measure: Callable[[Contest], T]
) -> None:
    """Measure two contests in turns, so that each is the first in every second round; add the results."""
    for number in range(PAIRS):
        turns = [*zip(contests, found, strict=True)]
        for contest, results in reversed(turns) if number % 2 else turns:
            results.append(measure(contest))


def _cpu_at_rate(contest: Contest) -> float:
    """Return the CPU time of the service for a webhook at a fixed rate, its projections included, in us."""
    process = psutil.Process(contest.ours.pid)
    before = sum(process.cpu_times()[:2])
    done, _ = contest.send_reports(contest.ours, RATE_SECONDS, RATE)
    # The last batch of the history is added after its pause.
    time.sleep(2 * WARM_SECONDS)
    return float((sum(process.cpu_times()[:2]) - before) / done.answered * 1e6)


async def _measure_follower(dsn: str, folder: Path) -> list[Row]:
    own = await prepare_database(dsn)
    reading, writing = DedicatedConnection(partial(connect, own)), DedicatedConnection(partial(connect, own))
    memory, signer = Memory(reading), Signer(folder / "proofs.key")
    follower = Follower(writing, memory, signer)
    try:
        async with connected(own) as connection:
            for start in range(0, LOGGED, APPENDED):
                await store.append(connection, _events("KOM", start, APPENDED))
            began, cpu = time.perf_counter(), time.process_time()
            added = 0
            while leaves := await follower.step():
                added += leaves
            seconds, logged_cpu = time.perf_counter() - began, (time.process_time() - cpu) / added * 1e6
            remembered_cpu = 0.0
            for start in range(0, REMEMBERED, BATCH_LEAVES_MAX):
                events = _events("MEM", start, BATCH_LEAVES_MAX)
                memory.remember(events, (await store.append(connection, events)).positions)
                cpu = time.process_time()
                await follower.step()
                remembered_cpu += (time.process_time() - cpu) / REMEMBERED * 1e6
            while await follower.step():
                pass
            tree = await storage.read_tree(connection)
            assert tree is not None
            size_bytes: int = await connection.fetchval(SIZES)
            rows = [
                Row(
                    "CPU of the follower for an event from memory",
                    f"{remembered_cpu:.1f} us",
                    f"<= {FOLLOWER_MICROSECONDS_MAX:.0f} us",
                    remembered_cpu <= FOLLOWER_MICROSECONDS_MAX,
                    f"from the log {logged_cpu:.1f} us; {added / seconds:,.0f}/s at the first start; "
                    f"{size_bytes / tree.size:.0f} bytes for an event",
                )
            ]
            took = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                bundle = await make_bundle(connection, signer, "KOM0000007", with_bodies=False)
                took.append(time.perf_counter() - began)
            text, keys = json.dumps(bundle), [*verifier.read_keys(str(signer.read_keys()[0].verifier))]
            began = time.perf_counter()
            verifier.join([verifier.verify(text, keys)])
            verified = time.perf_counter() - began
            began = time.perf_counter()
            checked = await check_history(connection, signer, whole=True)
            check_us = (time.perf_counter() - began) / checked.compared * 1e6
    finally:
        await reading.close()
        await writing.close()
    differ = f"{checked.differing} differ" if checked.differing else "none differs"
    rows.append(
        figure(
            f"proof of an order of {len(bundle['events'])} events, in a log of {tree.size:,}",
            f"{statistics.median(took) * 1e3:.1f} ms",
            f"{len(text) / 1e3:.0f} KB; verified in {verified * 1e3:.0f} ms; check --history {check_us:.0f} us "
            f"an entry, {differ}",
        )
    )
    return rows


def _events(prefix: str, start: int, number: int) -> list[Order.StatusReported]:
    """Return new events of ten reports of each order, which lie far apart."""
    events = []
    orders = LOGGED // EVENTS_OF_AN_ORDER
    for index in range(start, start + number):
        version, order = divmod(index, orders)
        order_no = f"{prefix}{order:07d}"
        state = NEW_ORDER._replace(version=version)
        event = decide(state, report(order_no, load.STATUSES[min(version, len(load.STATUSES) - 1)]))
        assert evolve(state, event).version == version + 1
        events.append(event)
    return events
