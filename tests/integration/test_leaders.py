"""Of several processes, one leads each view; the others follow it, and take its place if it stops."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import connected
from service.features.settings import Settings
from service.projecting.locks import TRY_LEAD
from service.projecting.projector import OutdatedViewError
from tests.support.databases import wait_for_locked
from tests.support.processes import running_service
from tests.support.recording import EQUAL, caught_up, rebuilt
from tests.support.reports import report
from tests.support.waiting import until_async

# Each view's leader: the process id of the backend that holds its lock.
LEADERS = """
    SELECT pid FROM unnest($1::text[]) AS view (name)
    JOIN pg_locks ON locktype = 'advisory' AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (classid::bigint << 32 | objid::bigint)
            = hashtextextended('order_tracking projector ' || name, 0)
    ORDER BY name
"""


async def leaders(connection: Connection) -> list[int]:
    return [pid for (pid,) in await connection.fetch(LEADERS, [view.name for view in VIEWS])]


async def started(dsn: str, stack: AsyncExitStack) -> Service:
    service = Service(Settings(), dsn)
    await service.start()
    stack.push_async_callback(service.stop)
    return service


async def all_led(connection: Connection) -> list[int]:
    async def are_led() -> list[int]:
        found = await leaders(connection)
        return found if len(found) == len(VIEWS) else []

    return await until_async(are_led)


async def test_one_process_projects_each_view(dsn: str, connection: Connection) -> None:
    """Two processes append, one of them projects, and readers of both see every report."""
    async with AsyncExitStack() as stack:
        first = await started(dsn, stack)
        led = await all_led(connection)
        second = await started(dsn, stack)
        for number in range(20):
            service = (first, second)[number % 2]
            receipt = await service.core.recorder.record(report(f"KOM{number}"))
            await caught_up(first, receipt["position"] or 0)
            await caught_up(second, receipt["position"] or 0)
        assert await leaders(connection) == led
        assert await rebuilt(dsn, verify=True) == EQUAL


async def test_the_next_process_leads_when_the_leader_stops(dsn: str, connection: Connection) -> None:
    """A leader that ends, and one whose session ends, are followed by another process."""
    async with AsyncExitStack() as stack:
        second = Service(Settings(), dsn)
        async with AsyncExitStack() as inner:
            await started(dsn, inner)
            led = await all_led(connection)
            await second.start()
            stack.push_async_callback(second.stop)
        receipt = await second.core.recorder.record(report("KOM1"))
        await caught_up(second, receipt["position"] or 0)
        followed = await all_led(connection)
        assert not {*led} & {*followed}
        for pid in followed:
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
        receipt = await second.core.recorder.record(report("KOM1", "Diterima"))
        await caught_up(second, receipt["position"] or 0)
        assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_leader_that_does_nothing_is_replaced(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a session holds the lead and moves nothing, such as a suspended process, another stands in."""
    monkeypatch.setattr("service.projecting.projector.LEADER_SECONDS_MAX", 0.2)
    async with AsyncExitStack() as stack:
        idle = await stack.enter_async_context(connected(dsn))
        for view in VIEWS:
            assert await idle.fetchval(f"SELECT {TRY_LEAD.format(view=view.name)}")
        held = await leaders(connection)
        with capture_logs() as logs:
            service = await started(dsn, stack)
            for status in ("Dikirim", "Diantar", "Diterima"):
                receipt = await service.core.recorder.record(report("KOM1", status))
                await caught_up(service, receipt["position"] or 0)
        # Each view once.
        standing_in = [log["view"] for log in logs if log["event"].endswith("so this one stands in")]
        assert sorted(standing_in) == sorted(view.name for view in VIEWS)
        assert await leaders(connection) == held
        await idle.execute("SELECT pg_advisory_unlock_all()")

        async def leads() -> bool:
            found = await leaders(connection)
            return len(found) == len(VIEWS) and not {*held} & {*found}

        await until_async(leads)


async def test_a_leader_that_is_suspended_in_a_transaction_is_replaced(
    dsn: str, owner_dsn: str, connection: Connection, tmp_path: Path
) -> None:
    """The view's lock, which a suspended process holds, is free before a session that may be idle for 8 s."""
    async with AsyncExitStack() as stack:
        leader = stack.enter_context(running_service(tmp_path, DATABASE_URL=owner_dsn))
        await all_led(connection)
        follower = await started(dsn, stack)
        idle = await stack.enter_async_context(connected(dsn, idle_in_transaction_session_timeout="8s"))
        async with connection.transaction():
            await connection.execute("LOCK TABLE timeline.entries IN EXCLUSIVE MODE")
            receipt = await follower.core.recorder.record(report("KOM1"))
            await wait_for_locked(connection)
            os.kill(leader.process.pid, signal.SIGSTOP)
            stack.callback(os.kill, leader.process.pid, signal.SIGCONT)
            await idle.execute("BEGIN")
        await caught_up(follower, receipt["position"] or 0)
        assert await idle.fetchval("SELECT true")


async def test_a_stand_in_leaves_a_view_that_moves(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process stands in for a leader only until the leader moves the view again."""
    monkeypatch.setattr("service.projecting.projector.LEADER_SECONDS_MAX", 0.2)
    async with AsyncExitStack() as stack:
        leader = await started(dsn, stack)
        await all_led(connection)
        await leader.core.background.stop()
        follower = await started(dsn, stack)
        receipt = await follower.core.recorder.record(report("KOM1"))
        await caught_up(follower, receipt["position"] or 0)
        projector = leader.core.views.movers["timeline"]
        receipt = await leader.core.recorder.record(report("KOM1", "Diantar"))
        assert await asyncio.gather(projector.step(), follower.core.views.movers["timeline"].step())
        await caught_up(follower, receipt["position"] or 0)
        assert await rebuilt(dsn, verify=True) == EQUAL


async def test_an_outdated_leader_gives_up(dsn: str, connection: Connection) -> None:
    """A leader whose view was rebuilt by another release lets a process of that release lead."""
    async with AsyncExitStack() as stack:
        service = await started(dsn, stack)
        await all_led(connection)
        await connection.execute("UPDATE timeline.projection SET definition = 'of a later release'")
        service.core.positions["timeline"].wake.set()

        async def is_free() -> bool:
            return len(await leaders(connection)) == len(VIEWS) - 1

        await until_async(is_free)
        with pytest.raises(OutdatedViewError):
            await service.core.views.movers["timeline"].step()
        assert await connection.fetchval(f"SELECT {TRY_LEAD.format(view='timeline')}")
