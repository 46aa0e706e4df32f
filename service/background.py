"""Background tasks, supervised so that none ends unnoticed."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import Final, NoReturn

import structlog

from projections.postgres import Connection

# The pause before a failed task is restarted.
RESTART_PAUSE_SECONDS: Final = 1.0
# A task that ran for this long before it failed was healthy, so the same failure is logged again.
HEALTHY_SECONDS: Final = 60.0
# How often the listening connection is checked. Otherwise it would never notice that the server is gone.
LISTEN_CHECK_SECONDS: Final = 5.0

IS_ALIVE: Final = "SELECT 1"

logger = structlog.get_logger()


async def supervise(
    name: str, work: Callable[[], Awaitable[object]], *, restart_pause_seconds: float = RESTART_PAUSE_SECONDS
) -> NoReturn:
    """Run work until cancelled: restart it whenever it ends or fails.

    A failure is logged. The same failure again is logged only if the task had been healthy for a while.

    Args:
        name: the task's name, for the log.
        work: the work.
        restart_pause_seconds: the pause before each restart.
    """
    last_failure = ""
    while True:
        began = monotonic()
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - no failure may end a background task for good
            if repr(error) != last_failure or monotonic() - began > HEALTHY_SECONDS:
                last_failure = repr(error)
                logger.warning("background task failed and is restarted", task=name, error=repr(error))
        await asyncio.sleep(restart_pause_seconds)


async def wait_for_event(event: asyncio.Event, seconds_max: float) -> None:
    """Wait until an event is set, or until the time is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds_max):
            await event.wait()


async def listen(connect: Callable[[], Awaitable[Connection]], channel: str, wake: Callable[..., None]) -> None:
    """Call ``wake`` for every notification on a channel, until the connection is lost.

    Notifications are only hints. Everything that follows the log also polls it.

    Args:
        connect: opens the connection.
        channel: the channel of LISTEN.
        wake: called with asyncpg's arguments, and once without any when the connection begins to listen.
    """
    connection = await connect()
    try:
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _connection: ended.set())
        await connection.add_listener(channel, wake)
        # First listen, then wake: whatever was appended before is read now.
        wake()
        while True:
            await wait_for_event(ended, LISTEN_CHECK_SECONDS)
            if ended.is_set():
                return
            async with asyncio.timeout(LISTEN_CHECK_SECONDS):
                await connection.execute(IS_ALIVE)
    finally:
        connection.terminate()


class BackgroundTasks:
    """The supervised tasks of one service."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[NoReturn]] = []

    def start(
        self,
        name: str,
        work: Callable[[], Awaitable[object]],
        *,
        restart_pause_seconds: float = RESTART_PAUSE_SECONDS,
    ) -> asyncio.Task[NoReturn]:
        """Start a supervised task; see ``supervise``. It inherits no context from its caller."""
        task = asyncio.get_running_loop().create_task(
            supervise(name, work, restart_pause_seconds=restart_pause_seconds), name=name, context=Context()
        )
        self._tasks.append(task)
        return task

    async def stop(self) -> None:
        """Cancel every task and wait until all have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
