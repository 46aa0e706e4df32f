"""The position of a view that other processes write: all that a process on a replica knows of it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Final, TypeAlias

import asyncpg
import structlog

from projections.engine import STEP_SECONDS_MAX, Log, OutdatedViewError, Projector, view_state
from projections.position import CHECK_SECONDS
from projections.postgres import Connection
from projections.view import View

# Lends a connection whose search path begins with the view's schema.
Lend: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]
# Called with a connection and a view's position. Returns for how many seconds the view may have missed reports.
ReadAge: TypeAlias = Callable[[Connection, int], Awaitable[float]]

# How often a view is observed while no reader waits for it. A reader that waits has it observed every
# CHECK_SECONDS.
OBSERVE_SECONDS: Final = 0.25

logger = structlog.get_logger()


class Observer(Projector):
    """Follows the position of one view without writing it. Readers wait for it as for a projector.

    Args:
        view: the view.
        lend: lends a connection whose search path is the view's schema, and then the log's.
        log: the log that this database has, of which only the head is read.
        read_age: returns a view's age.
        on_move: called when the view has moved.
    """

    def __init__(
        self, view: View, lend: Lend, log: Log, read_age: ReadAge, on_move: Callable[[], object]
    ) -> None:
        super().__init__(view, lambda _begin: lend(), log)
        self._lend = lend
        self._read_age = read_age
        self._on_move = on_move
        self._age_seconds = 0.0
        self._observed_at = monotonic()

    @property
    def age_seconds(self) -> float:
        """For how many seconds the view may have missed reports; infinite if that is unknown."""
        return self._age_seconds + monotonic() - self._observed_at

    async def step(self) -> int:
        """Read the view's position and age. Return 0, since no event was applied.

        A view with another definition is outdated until its writer, or this release, has been replaced.
        """
        # Any number of waiting readers causes one observation in this time.
        await asyncio.sleep(max(0.0, CHECK_SECONDS - (monotonic() - self._observed_at)))
        async with asyncio.timeout(STEP_SECONDS_MAX), self._lend() as connection:
            began = monotonic()
            try:
                state = await view_state(connection)
            except (OutdatedViewError, asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
                # The replica has not replayed the view's creation, or the view belongs to another release.
                self._note_outdated(is_outdated=True)
                return 0
            age_seconds = await self._read_age(connection, state.position)
        self._age_seconds, self._observed_at = age_seconds, began
        self._note_outdated(is_outdated=state.definition != self.view.definition)
        if state.position != self.reach.position:
            self.reach.move(state.position)
            self._on_move()
        return 0

    def _note_outdated(self, *, is_outdated: bool) -> None:
        if is_outdated and not self.is_outdated:
            logger.warning("another release has rebuilt the view, so reads of it get 503", view=self.view.name)
        self.is_outdated = is_outdated
