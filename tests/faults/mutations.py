"""Deliberate faults of the service, which the harness must find to prove that it works.

Run as a program, this module is a service that acknowledges reports before it commits them. It is the only
place that replaces code of the service, because it tests the harness.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Final

from domain.order import Order, Report
from service.cli.main import cli
from service.event_log import store
from service.ingest.recorder import Receipt, Recorder, _decide_all, _receipt
from tests.faults.fault import Fault
from tests.faults.processes import kill_service, stop_immediately
from tests.faults.world import Layout, World

COMMITTED_AFTER_SECONDS: Final = 0.5


class EarlyRecorder:
    """Acknowledges reports at once, with their future positions, and commits them a moment later."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._position: int | None = None
        self._commits: set[asyncio.Task[None]] = set()

    async def record(self, recorder: Recorder, reports: list[Report]) -> list[Receipt]:
        """Replace ``Recorder._record_together``."""
        order_nos = {report.order_no for report in reports}
        events = _decide_all(reports, await recorder._known_states(order_nos))  # noqa: SLF001
        if self._position is None:
            async with recorder._locked() as connection:  # noqa: SLF001
                self._position = await store.head_position(connection)
        first = self._position + 1
        self._position += len(events)
        recorder._states.learn(events)  # noqa: SLF001
        task = asyncio.create_task(self._commit(recorder, events))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return [_receipt(event, position) for position, event in enumerate(events, first)]

    async def _commit(self, recorder: Recorder, events: Sequence[Order.StatusReported]) -> None:
        await asyncio.sleep(COMMITTED_AFTER_SECONDS)
        # The lock is fair, so the commits follow the order of the acknowledgements.
        async with self._turn, recorder._locked() as connection:  # noqa: SLF001
            await store.append(connection, events)


async def stop_before_the_log_is_written(world: World) -> int:
    """Stop the server while acknowledged commits are only in its memory."""
    connection = await world.connect()
    # Everything up to this point is on disk.
    await connection.execute("CHECKPOINT")
    await connection.close()
    await world.load.recovered()
    return await stop_immediately(world)


MUTATIONS: Final = (
    Fault(
        "asynchronous-commit",
        "synchronous_commit=off and an immediate stop",
        Layout(given_postgres=True, server_settings={"synchronous_commit": "off", "wal_writer_delay": "10s"}),
        stop_before_the_log_is_written,
    ),
    Fault(
        "early-acknowledgement",
        "an acknowledgement before the commit, and kill -9",
        Layout(given_postgres=True, command=(sys.executable, "-m", __name__)),
        kill_service,
    ),
)


def acknowledge_early() -> None:
    """Make every recorder of this process acknowledge before it commits."""
    early = EarlyRecorder()

    async def record(recorder: Recorder, reports: list[Report]) -> Sequence[Receipt]:
        return await early.record(recorder, reports)

    Recorder._record_together = record  # type: ignore[method-assign, assignment]  # noqa: SLF001


if __name__ == "__main__":
    acknowledge_early()
    cli()
