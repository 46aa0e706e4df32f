"""The running views: each with a connection and a projector, or an observer if the process only reads."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from projections.engine import LEADER_SECONDS_MAX, Projector
from projections.observer import OBSERVE_SECONDS, Observer
from projections.view import View
from projections.views import VIEWS
from service.api.freshness import read_age
from service.background import BackgroundTasks, follow
from service.database.connections import DedicatedConnection, as_unavailable
from service.event_log.feed import Feed
from service.maintenance.replay import Rebuilder

# How long a projection may overlook an event whose notification is lost.
POLL_SECONDS: Final = 1.0
# The pause after a projection failed, such as while the database is unreachable.
RETRY_PAUSE_SECONDS: Final = 0.2


class RunningViews:
    """The views of a service.

    Args:
        dsn: the database.
        make_connection: returns a dedicated connection with some of PostgreSQL's settings.
        feed: the log.
        is_reader: whether this process only reads, so that it observes the views.
        on_move: called when an observed view has moved.

    Attributes:
        connections: the connections, by the names of their views.
        projectors: the projectors or observers, by the same.
    """

    def __init__(
        self,
        dsn: str,
        make_connection: Callable[..., DedicatedConnection],
        feed: Feed,
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
        self._feed = feed
        self._is_reader = is_reader
        self._on_move = on_move
        self.projectors: Mapping[str, Projector] = {view.name: self._make_projector(view) for view in VIEWS}
        self.rebuilder = Rebuilder(dsn, VIEWS, self.connections, feed)

    def _make_projector(self, view: View) -> Projector:
        dedicated = self.connections[view.name]
        if self._is_reader:
            return Observer(view, dedicated.connection, self._feed, read_age, self._on_move)
        return Projector(view, dedicated.transaction, self._feed)

    async def start(self, background: BackgroundTasks) -> None:
        """Begin to project or to observe every view."""
        if self._is_reader:
            with as_unavailable():
                await asyncio.gather(*(projector.step() for projector in self.projectors.values()))
        else:
            for view in VIEWS:
                self.projectors[view.name].is_outdated = await self.rebuilder.is_outdated(view)
        for view in VIEWS:
            run, verb = (self._observe, "observe") if self._is_reader else (self._project, "project")
            background.start(
                f"{verb} {view.name}", partial(run, view), restart_pause_seconds=RETRY_PAUSE_SECONDS
            )

    async def _observe(self, view: View) -> None:
        """Follow the position of a view that other processes write."""
        projector = self.projectors[view.name]
        await follow(
            projector.step,
            projector.wake,
            batch_events_max=1,
            poll_seconds=OBSERVE_SECONDS,
            idle_seconds=0.0,
        )

    async def _project(self, view: View) -> None:
        await self.rebuilder.rebuild_if_outdated(view)
        projector = self.projectors[view.name]
        await follow(
            projector.step,
            projector.wake,
            batch_events_max=view.batch_events_max,
            poll_seconds=POLL_SECONDS,
            idle_seconds=view.idle_seconds,
        )

    def wake(self) -> None:
        """Let every projector look at the log at once."""
        for projector in self.projectors.values():
            projector.wake.set()

    def forget(self) -> None:
        """Believe no position until the next step, because commits may have been lost."""
        for projector in self.projectors.values():
            projector.forget()
