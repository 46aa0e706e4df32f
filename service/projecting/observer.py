"""The observer of a view that other processes write: all that a process on a replica knows of it."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Final, TypeAlias

import asyncpg
import structlog

from projections.postgres import Connection
from service.database.replica import read_replica
from service.event_log import store
from service.event_log.follow import CHECK_SECONDS
from service.projecting.position import ViewPosition
from service.projecting.projector import STEP_SECONDS_MAX, OutdatedViewError, view_state

# Lends a connection whose search path begins with the view's schema.
Lend: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

# How often a view is observed while no reader waits for it. A reader that waits has it observed every
# CHECK_SECONDS.
OBSERVE_SECONDS: Final = 0.25

logger = structlog.get_logger()


class Observer:
    """Follows the position of one view without writing it.

    Args:
        position: where the position and the age are noted.
        lend: lends a connection whose search path is the view's schema, and then the log's.
        on_move: called when the view has moved.
    """

    def __init__(self, position: ViewPosition, lend: Lend, on_move: Callable[[], object]) -> None:
        self.position = position
        self._lend = lend
        self._on_move = on_move

    async def step(self) -> int:
        """Read the view's position and age. Return 0, since no event was applied.

        A view with another definition is outdated until its writer, or this release, has been replaced.
        """
        # Any number of waiting readers causes one observation in this time.
        await asyncio.sleep(max(0.0, CHECK_SECONDS - self.position.seconds_since_observed))
        async with asyncio.timeout(STEP_SECONDS_MAX), self._lend() as connection:
            began = monotonic()
            try:
                state = await view_state(connection)
            except (OutdatedViewError, asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
                # The replica has not replayed the view's creation, or the view belongs to another release.
                self._note_outdated(is_outdated=True)
                return 0
            age_seconds = await _read_age(connection, state.position)
        self.position.note_age(age_seconds, began)
        self._note_outdated(is_outdated=state.definition != self.position.view.definition)
        if state.position != self.position.reach.position:
            self.position.reach.move(state.position)
            self._on_move()
        return 0

    def forget(self) -> None:
        """Believe no position until the next step."""
        self.position.forget()

    def _note_outdated(self, *, is_outdated: bool) -> None:
        if is_outdated and not self.position.is_outdated:
            name = self.position.view.name
            logger.warning("another release has rebuilt the view, so reads of it get 503", view=name)
        self.position.is_outdated = is_outdated


async def _read_age(connection: Connection, position: int) -> float:
    """Return for how many seconds a view at a position may have missed reports; infinite if that is unknown."""
    replica = await read_replica(connection)
    return max(replica.age_seconds, await store.read_lag_seconds(connection, position))
