"""The running views: each with a connection and a projector, or an observer if the process only reads."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, TypeAlias

from projections.view import View
from projections.views import VIEWS
from service.background import BackgroundTasks
from service.database.connections import DedicatedConnection, as_unavailable
from service.event_log.follow import Log, follow, rest_unless_full
from service.projecting.observer import OBSERVE_SECONDS, Observer
from service.projecting.position import ViewPosition, ViewPositions
from service.projecting.projector import LEADER_SECONDS_MAX, Projector
from service.projecting.replay import Rebuilder

# How long a projection may overlook an event whose notification is lost.
POLL_SECONDS: Final = 1.0
# The pause after a projection failed, such as while the database is unreachable.
RETRY_PAUSE_SECONDS: Final = 0.2

# What moves a view's position in this process.
Mover: TypeAlias = Projector | Observer


class RunningViews:
    """The views of a service.

    Args:
        dsn: the database.
        make_connection: returns a dedicated connection with some of PostgreSQL's settings.
        log: the log.
        is_reader: whether this process only reads, so that it observes the views.
        on_move: called when an observed view has moved.

    Attributes:
        connections: the connections, by the names of their views.
        positions: how far each view has come, by the same.
        movers: what moves them, by the same.
    """

    def __init__(
        self,
        dsn: str,
        make_connection: Callable[..., DedicatedConnection],
        log: Log,
        *,
        is_reader: bool,
        on_move: Callable[[], object],
    ) -> None:
        self.connections = {
            view.name: make_connection(
                # An observer also reads the log.
                search_path=f"{view.name}, public" if is_reader else view.name,
                # A process that is suspended in a transaction must not keep the view from its stand-in.
                idle_in_transaction_session_timeout=f"{LEADER_SECONDS_MAX:g}s",
            )
            for view in VIEWS
        }
        self._log = log
        self._is_reader = is_reader
        self._on_move = on_move
        self.positions: ViewPositions = {
            view.name: ViewPosition(view, log.head, is_observed=is_reader) for view in VIEWS
        }
        self.movers: Mapping[str, Mover] = {
            name: self._make_mover(position) for name, position in self.positions.items()
        }
        self.rebuilder = Rebuilder(dsn, VIEWS, self.connections, log)

    def _make_mover(self, position: ViewPosition) -> Mover:
        dedicated = self.connections[position.view.name]
        if self._is_reader:
            return Observer(position, dedicated.connection, self._on_move)
        return Projector(position, dedicated.transaction, self._log)

    async def start(self, background: BackgroundTasks) -> None:
        """Begin to project or to observe every view."""
        if self._is_reader:
            with as_unavailable():
                await asyncio.gather(*(mover.step() for mover in self.movers.values()))
        else:
            for view in VIEWS:
                self.positions[view.name].is_outdated = await self.rebuilder.is_outdated(view)
        for view in VIEWS:
            run, verb = (self._observe, "observe") if self._is_reader else (self._project, "project")
            background.start(
                f"{verb} {view.name}", partial(run, view), restart_pause_seconds=RETRY_PAUSE_SECONDS
            )

    async def _observe(self, view: View) -> None:
        """Follow the position of a view that other processes write."""
        await self._follow(view, OBSERVE_SECONDS)

    async def _project(self, view: View) -> None:
        await self.rebuilder.rebuild_if_outdated(view)
        await self._follow(view, POLL_SECONDS)

    async def _follow(self, view: View, poll_seconds: float) -> None:
        await follow(
            self.movers[view.name].step,
            self.positions[view.name].wake,
            poll_seconds=poll_seconds,
            rest=rest_unless_full(view.batch_events_max, view.idle_seconds),
        )

    def forget(self) -> None:
        """Believe no position until the next step, because commits may have been lost."""
        for mover in self.movers.values():
            mover.forget()
