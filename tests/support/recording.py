"""Recording reports without HTTP: recorders, services inside the test process, and what their log holds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from domain.order import Order, Report
from projections.postgres import Connection
from projections.views import VIEWS
from service.app import Service
from service.database.connections import DedicatedConnection, connect
from service.event_log import store
from service.event_log.codec import decode_event
from service.event_log.follow import Log
from service.features.settings import Settings
from service.ingest.recorder import Recorder
from service.projecting.locks import TRY_REBUILD_LOCK
from service.projecting.rebuild import RebuiltView
from service.projecting.replay import rebuild_views
from tests.support.waiting import PATIENCE_SECONDS, until_async

# The result of a verification that finds every view equal.
EQUAL: Final = [RebuiltView(view.name, 0, 0) for view in VIEWS]


@asynccontextmanager
async def running(settings: Settings, dsn: str, owner_dsn: str | None = None) -> AsyncIterator[Service]:
    """Run a service without HTTP until the block ends."""
    service = Service(settings, dsn, owner_dsn)
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


async def record(service: Service, *reports: Report) -> int:
    """Record reports, wait until the views include them, and return the last position."""
    receipts = await asyncio.gather(*(service.core.recorder.record(one) for one in reports))
    position = max(receipt["position"] or 0 for receipt in receipts)
    await caught_up(service, position)
    return position


async def caught_up(service: Service, position: int) -> None:
    for view in service.core.positions.values():
        assert await view.reach.wait_for(position, PATIENCE_SECONDS)


@asynccontextmanager
async def dedicated_connection(dsn: str) -> AsyncIterator[DedicatedConnection]:
    held = DedicatedConnection(lambda: connect(dsn))
    try:
        yield held
    finally:
        await held.close()


async def rebuilt(
    dsn: str, *, verify: bool = False, views: Any = VIEWS, waits: bool = True
) -> list[RebuiltView]:
    """Rebuild views, or compare them with a replay. By default, wait for a rebuild that has not quite ended."""
    async with dedicated_connection(dsn) as held:
        if waits:
            async with held.connection() as connection:
                lock = TRY_REBUILD_LOCK.replace("pg_try_advisory_lock", "pg_try_advisory_xact_lock")
                await until_async(partial(connection.fetchval, lock))
        return await rebuild_views(dsn, views, Log(held), lambda _done, _total: None, verify=verify)


def make_recorder(held: DedicatedConnection, **limits: Any) -> Recorder:
    return Recorder(
        held,
        limits.pop("on_commit", lambda _events, _positions: None),
        **{"queue_reports_max": 1_000, "seconds_max": PATIENCE_SECONDS, **limits},
    )


async def logged_events(connection: Connection) -> list[tuple[int, Order.StatusReported]]:
    entries = await store.read_log(connection, 0, 1_000_000)
    return [(entry.position, decode_event(*entry[1:5])) for entry in entries]


@asynccontextmanager
async def locked_log(dsn: str) -> AsyncIterator[Connection]:
    """Hold the append lock for the length of the block."""
    holder = await connect(dsn)
    try:
        async with holder.transaction():
            await holder.execute("SELECT pg_advisory_xact_lock($1)", store.APPEND_LOCK)
            yield holder
    finally:
        await holder.close()
