"""Two primaries: the writer is still connected to the old one while a view's projector is on the new one.

Both are open for a moment after a failover without fencing. Each has events at the same positions.
"""

from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import pytest

from projections import current_status
from projections.views import VIEWS
from service.database.connections import HOT_SETTINGS, DedicatedConnection, connect
from service.database.schema import SERVICE_ROLE, as_role
from service.event_log.follow import Log
from service.ingest.recorder import Recorder
from service.projecting.position import ViewPosition
from service.projecting.projector import Projector
from tests.support.databases import TestServer
from tests.support.recording import dedicated_connection, make_recorder, rebuilt
from tests.support.reports import report

(VIEW,) = (view for view in VIEWS if view.name == current_status.VIEW.name)


class Split(NamedTuple):
    """The parts of one process.

    Attributes:
        writer: records into the old primary, and passes its commits to the feed.
        projector: the projector of one view on the new primary.
        new_dsn: the new primary.
        reads_old_log: whether the feed's connection is on the old primary, too.
    """

    writer: Recorder
    projector: Projector
    new_dsn: str
    reads_old_log: bool


@pytest.fixture(params=["new", "old"])
async def split(request: pytest.FixtureRequest, server: TestServer, dsn: str) -> AsyncIterator[Split]:
    """Record one report, copy the database, and connect the projector to the copy."""
    async with dedicated_connection(dsn) as old:
        await make_recorder(old).record(report("KOM1", "Diajukan"))
    await rebuilt(dsn)
    with server.database(server.copy(dsn)) as copied:
        new_dsn = as_role(copied, SERVICE_ROLE)
        on_new = partial(connect, new_dsn, **HOT_SETTINGS, search_path=VIEW.name)
        reads_old_log = request.param == "old"
        async with (
            dedicated_connection(dsn) as appending,
            dedicated_connection(dsn if reads_old_log else new_dsn) as reading,
        ):
            log = Log(reading)
            projecting = DedicatedConnection(on_new, on_open=log.memory.forget)
            writer = make_recorder(appending, on_commit=log.memory.remember)
            projector = Projector(ViewPosition(VIEW, log.head, is_observed=False), projecting.transaction, log)
            yield Split(writer, projector, new_dsn, reads_old_log)
            await projecting.close()


@pytest.mark.parametrize("order_no", ["KOM1", "KEPT1"])
async def test_a_view_gets_only_events_of_its_own_log(split: Split, order_no: str) -> None:
    """No event that only the old primary has reaches the view, not even one with the place of another."""
    await split.projector.step()
    lost = await split.writer.record(report(order_no, "Dikirim"))
    async with dedicated_connection(split.new_dsn) as held:
        kept = await make_recorder(held).record(report("KEPT1", "Dipacking"))
    assert lost["position"] == kept["position"]
    # It may refuse the first batch. Then it opens another connection, which clears the feed's memory.
    for _ in range(2):
        with suppress(ConnectionError):
            await split.projector.step()
    connection = await connect(split.new_dsn)
    try:
        found = await current_status.find_orders(connection, ["KOM1", "KEPT1"])
        at = await connection.fetchval("SELECT position FROM current_status.projection")
    finally:
        await connection.close()
    statuses = [one.order["status"] if one.order else None for one in found]
    allowed: list[tuple[int, list[str | None]]] = [(2, ["submitted", "packed"])]
    if split.reads_old_log:
        allowed.append((1, ["submitted", None]))
    assert (at, statuses) in allowed
