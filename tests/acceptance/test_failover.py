"""Failover for real: Patroni replaces a primary that is killed or suspended under a running service.

A synchronous standby has every acknowledged report, so nothing is lost. An asynchronous one may lack some, and
exactly those are lost. Everything else holds in both cases: nothing is recorded twice, each order continues
from its last event in the log that is left, and the views equal a replay of it.
"""

import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from tests.faults.operator import Told
from tests.faults.patroni import Cluster, Programs, installed_programs, running_cluster
from tests.faults.standby import wait_until_applied
from tests.faults.world import Effort, Layout, SkippedError, World, in_thread, open_world
from tests.support.account import read_log, worst_outage
from tests.support.connections import UNAVAILABLE, get
from tests.support.folders import temporary_folder
from tests.support.waiting import condition, until_async

# Reports a second. Each has a number.
EFFORT: Final = Effort(times=1, per_second=150.0, is_timed=False)
SEED: Final = 1
# Reports that the asynchronous standby does not receive, at the least.
HELD_BACK_REPORTS: Final = 450
# Orders that get one report before the failover and one after it, but none while webhooks are refused. The
# service may still have their states in memory.
QUIET_ORDERS: Final = 20
LOSSES: Final = re.compile(rb"^log_losses_total (\S+)$", re.MULTILINE)
LOST: Final = "the database has lost acknowledged reports"

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """Install Patroni, and look for etcd and HAProxy."""
    with temporary_folder() as folder:
        try:
            with installed_programs(folder) as found:
                yield found
        except SkippedError as skipped:
            pytest.skip(str(skipped))


def layout_of(cluster: Cluster, programs: Programs, way: str) -> Layout:
    """Return the world's layout. A shop subscribes to all events."""
    dsn = cluster.hosts_dsn
    if way == "haproxy":
        if programs.haproxy is None:
            pytest.skip("this machine has no haproxy")
        dsn = cluster.haproxy_dsn
    return Layout(database_url=dsn, has_shop=True)


@pytest.fixture
def row(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Print the figures of a failover, which are the point of running this."""
    figures: list[str] = []
    yield figures
    with capsys.disabled():
        sys.stdout.write(f"\n{request.node.name}: {', '.join(figures)}\n")


async def until_losses(world: World, losses: int) -> None:
    """Wait until the metrics show this number of losses."""

    async def is_shown() -> bool:
        response = await world.connections.request(get("/metrics"))
        # A scrape reads the database too.
        found = LOSSES.search(response.body) if response is not None else None
        return found is not None and float(found[1]) == losses

    await until_async(is_shown)


async def settle(world: World, since: float, told: Told, row: list[str]) -> None:
    """Make the account: see ``World.settle``. It includes ``replay --verify`` and ``check``."""
    count = await world.settle(told)
    stall = worst_outage(world.acknowledged(), since)
    row += [
        *world.remarks,
        f"acknowledged {count.acknowledged:,}",
        f"lost {count.lost:,}",
        f"doubled {count.doubled:,}",
        f"503 {count.refused:,}",
        f"stall {stall:.1f} s",
    ]
    assert world.violations.lines == []
    assert (count.lost, count.doubled, count.wrong) == (len(world.missing), 0, 0)


@asynccontextmanager
async def open_cluster(
    programs: Programs, way: str, *, is_synchronous: bool
) -> AsyncIterator[tuple[Cluster, World]]:
    """Start a cluster, and a service that works on it."""
    with (
        temporary_folder() as folder,
        running_cluster(folder, programs, is_synchronous=is_synchronous) as cluster,
    ):
        async with open_world(layout_of(cluster, programs, way), EFFORT, SEED) as world:
            yield cluster, world


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
async def test_a_synchronous_failover_loses_nothing(programs: Programs, way: str, row: list[str]) -> None:
    """Nothing is lost or doubled, and the old primary comes back as the standby of the new one.

    The test takes about 80 s: Patroni waits for its ttl of 20 s before it replaces a silent primary.
    """
    async with open_cluster(programs, way, is_synchronous=True) as (cluster, world):
        since = time.monotonic()
        await in_thread(cluster.primary.kill)
        await world.load.recovered()
        assert not cluster.standby.is_standby()
        await in_thread(cluster.primary.start)
        await in_thread(cluster.wait_for_standby, cluster.standby, cluster.primary)
        await world.load.recovered()
        await until_losses(world, 0)
        assert world.connections.answers[UNAVAILABLE] > 0
        await settle(world, since, Told(), row)


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
async def test_a_frozen_primary_holds_nothing_up(programs: Programs, way: str, row: list[str]) -> None:
    """Patroni replaces a primary that is suspended and stays so. Deliveries and proofs go on without it, too.

    The test takes about 80 s, as above.
    """
    async with open_cluster(programs, way, is_synchronous=True) as (cluster, world):
        since = time.monotonic()
        await in_thread(cluster.primary.suspend)
        # The harness has no time limit of its own for the suspended server.
        world.database_url = cluster.standby.dsn
        await world.load.recovered()
        assert not cluster.standby.is_standby()
        await settle(world, since, Told(), row)


async def report_quiet_orders(world: World, status: str) -> None:
    """Send one report for each of the quiet orders, all of which must be acknowledged."""
    load = world.new_load(f"QUIET-{status}")
    numbers = range(QUIET_ORDERS)
    bodies = (json.dumps({"order_no": f"QUIET{number}", "status": status}) for number in numbers)
    await load.attempt_all(bodies, callers=1)
    assert len(load.acknowledged) == QUIET_ORDERS


@pytest.mark.parametrize("way", ["hosts", "haproxy"])
async def test_an_asynchronous_failover_loses_what_the_standby_never_had(
    programs: Programs, way: str, row: list[str]
) -> None:
    """Exactly the reports that the standby lacks are lost. The service logs and counts the loss.

    The test takes about 80 s, as above.
    """
    async with open_cluster(programs, way, is_synchronous=False) as (cluster, world):
        since = time.monotonic()
        await in_thread(cluster.primary.hold_back)
        await world.load.recovered(HELD_BACK_REPORTS)
        await report_quiet_orders(world, "Diajukan")
        await in_thread(cluster.primary.kill)
        await wait_until_applied(cluster.standby.dsn)
        kept = {event.report_id for _, event in await read_log(cluster.standby.dsn)}
        # Until it is promoted, it gets no other reports.
        assert cluster.standby.is_standby()
        world.missing = {one.receipt["report_id"] for one in world.acknowledged()} - kept
        world.may_be_gone = True
        assert len(world.missing) >= HELD_BACK_REPORTS
        await world.load.recovered()
        assert not cluster.standby.is_standby()
        await report_quiet_orders(world, "Dikirim")
        await until_losses(world, 1)
        await until_async(condition(lambda: world.tail.times_gone > 0))
        await settle(world, since, Told(logged=(LOST,)), row)
