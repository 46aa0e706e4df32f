"""The event log behind the eventsourcing library's synchronous recorder interface.

The library's own recorder tests use it.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from threading import Thread
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    IntegrityError,
    Notification,
    StoredEvent,
    Subscription,
)

from service.database.connections import ConnectionPool
from service.event_log import store
from service.event_log.store import RecordedEvent

Result = TypeVar("Result")
EVERYTHING = 1_000_000
SECONDS_MAX = 60.0


class LogInThread:
    """Runs the log's coroutines on an event loop in a separate thread, each on a pooled connection."""

    def __init__(self, dsn: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._pool = self._wait_for(self._open(dsn))

    @staticmethod
    async def _open(dsn: str) -> ConnectionPool:
        pool = ConnectionPool(dsn, SECONDS_MAX)
        await pool.open()
        return pool

    async def _close(self) -> None:
        self._pool.close()
        # The connections close in the next iteration of the event loop.
        await asyncio.sleep(0)

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._wait_for(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def append(self, stored: Sequence[StoredEvent]) -> list[int]:
        async def work() -> list[int]:
            async with self._pool.connection() as connection:
                rows = await connection.fetch(
                    store.APPEND,
                    [str(event.originator_id) for event in stored],
                    [event.originator_version for event in stored],
                    [event.topic for event in stored],
                    [event.state for event in stored],
                    store.APPEND_LOCK,
                    *([], [], [], []),
                )
            positions = {(order_no, version): position for order_no, version, position, _ in rows}
            return [positions[str(event.originator_id), event.originator_version] for event in stored]

        try:
            return self._wait_for(work())
        except asyncpg.UniqueViolationError as error:
            raise IntegrityError(str(error)) from error

    def stream(self, order_no: str, after: int) -> list[RecordedEvent]:
        async def work() -> list[RecordedEvent]:
            async with self._pool.connection() as connection:
                return await store.read_stream(connection, order_no, after, EVERYTHING)

        return self._wait_for(work())

    def log(self, after: int) -> list[RecordedEvent]:
        async def work() -> list[RecordedEvent]:
            async with self._pool.connection() as connection:
                return await store.read_log(connection, after, EVERYTHING)

        return self._wait_for(work())

    def head(self) -> int:
        async def work() -> int:
            async with self._pool.connection() as connection:
                return await store.head_position(connection)

        return self._wait_for(work())


class AggregateFacade(AggregateRecorder):
    """A recorder whose insert returns None."""

    def __init__(self, log: LogInThread) -> None:
        self._log = log

    def insert_events(self, stored_events: Sequence[StoredEvent], **_kwargs: Any) -> Sequence[int] | None:
        self._log.append(stored_events)
        return None

    def select_events(
        self,
        originator_id: UUID | str,
        *,
        gt: int | None = None,
        lte: int | None = None,
        desc: bool = False,
        limit: int | None = None,
    ) -> Sequence[StoredEvent]:
        stream = self._log.stream(str(originator_id), -1 if gt is None else gt)
        stored = [
            StoredEvent(event.order_no, event.version, event.topic, event.state)
            for event in stream
            if lte is None or event.version <= lte
        ]
        if desc:
            stored.reverse()
        return stored[:limit]


class ApplicationFacade(AggregateFacade, ApplicationRecorder):
    """A recorder whose insert returns positions, and which also reads the log."""

    def insert_events(self, stored_events: Sequence[StoredEvent], **_kwargs: Any) -> Sequence[int] | None:
        return self._log.append(stored_events)

    def select_notifications(
        self,
        start: int | None,
        limit: int,
        stop: int | None = None,
        topics: Sequence[str] = (),
        *,
        inclusive_of_start: bool = True,
    ) -> Sequence[Notification]:
        after = 0 if start is None else start - 1 if inclusive_of_start else start
        return [
            Notification(event.order_no, event.version, event.topic, event.state, event.position)
            for event in self._log.log(after)
            if (stop is None or event.position <= stop) and (not topics or event.topic in topics)
        ][:limit]

    def max_notification_id(self) -> int | None:
        return self._log.head() or None

    def subscribe(self, gt: int | None = None, topics: Sequence[str] = ()) -> Subscription[ApplicationRecorder]:
        raise NotImplementedError
