"""Faults of the service that are made on purpose: the harness must find each, or it proves nothing.

Run as a program, this is a service that acknowledges before it commits; the one place where code of the
service is replaced, since here the harness is under test.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Final

from domain.order import Order
from service.cli.main import cli
from service.event_log import store as event_store
from service.event_log.store import EventStore
from tests.faults.faults import Fault, kill_service, stop_immediately
from tests.faults.world import Layout, World

COMMITTED_AFTER_SECONDS: Final = 0.5


class EarlyStore:
    """Answers an append at once, with the positions that it will have, and commits it a moment later."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._position: int | None = None
        self._commits: set[asyncio.Task[None]] = set()

    async def append(self, store: EventStore, events: Sequence[Order.StatusReported]) -> list[int]:
        """In place of ``EventStore.append``."""
        if self._position is None:
            async with store.locked() as connection:
                self._position = await event_store.head_position(connection)
        first = self._position + 1
        self._position += len(events)
        task = asyncio.create_task(self._commit(store, events))
        self._commits.add(task)
        task.add_done_callback(self._commits.discard)
        return list(range(first, first + len(events)))

    async def _commit(self, store: EventStore, events: Sequence[Order.StatusReported]) -> None:
        await asyncio.sleep(COMMITTED_AFTER_SECONDS)
        # In the order of the acknowledgements: who waits longest is next.
        async with self._turn, store.locked() as connection:
            await event_store.append(connection, events)


async def stop_before_the_log_is_written(world: World) -> int:
    """Stop the server in the seconds in which acknowledged commits are in its memory alone."""
    connection = await world.connect()
    # Everything up to here is on disk.
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
    """Let every event store of this process answer before it commits."""
    early = EarlyStore()

    async def append(store: EventStore, events: Sequence[Order.StatusReported]) -> list[int]:
        return await early.append(store, events)

    EventStore.append = append  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    acknowledge_early()
    cli()
