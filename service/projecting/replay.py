"""Replay: rebuild views from the log, on demand or because their definition has changed."""

import asyncio
from collections.abc import Sequence
from typing import Final

import asyncpg
import structlog

from projections.postgres import Connection
from projections.view import View
from service.database.connections import DedicatedConnection, as_unavailable, connect, connected
from service.event_log.follow import Log, Place, has_place
from service.projecting.projector import OutdatedViewError, view_state
from service.projecting.rebuild import OnProgress, RebuildRunningError, RebuiltView, rebuild
from service.projecting.unpark import Unparked, unpark_order

# How often an outdated view is checked while another process rebuilds it.
CHECK_SECONDS: Final = 2.0

logger = structlog.get_logger()


async def rebuild_views(
    dsn: str, views: Sequence[View], log: Log, progress: OnProgress, *, verify: bool = False
) -> list[RebuiltView]:
    """Rebuild views of a database; see ``service.projecting.rebuild``.

    Raises:
        StorageUnavailableError: the connection was lost.
        RebuildRunningError: another rebuild or a backup is running.
        OutdatedViewError: a view to verify is outdated.
    """

    async def connect_to(search_path: str) -> Connection:
        # A view's connection may wait in its transaction while another view is written.
        return await connect(dsn, search_path=search_path, idle_in_transaction_session_timeout="0")

    with as_unavailable():
        return await rebuild(views, connect_to, log, progress, verify=verify)


async def unpark_order_in_views(dsn: str, views: Sequence[View], log: Log, order_no: str) -> list[Unparked]:
    """Apply the waiting events of a parked order to each of these views; see ``service.projecting.unpark``.

    Raises:
        StorageUnavailableError: the connection was lost.
        OutdatedViewError: a view is outdated.
    """
    results = []
    with as_unavailable():
        for view in views:
            async with connected(dsn, search_path=view.name) as connection:
                results.append(await unpark_order(connection, view, order_no, log.read_order))
    return results


class Rebuilder:
    """Rebuilds outdated views at the start of the service, all of them together.

    Args:
        dsn: the database.
        views: every view.
        connections: a connection for each view, by name, with the view's search path.
        log: the log.
    """

    def __init__(
        self, dsn: str, views: Sequence[View], connections: dict[str, DedicatedConnection], log: Log
    ) -> None:
        self._dsn = dsn
        self._views = views
        self._connections = connections
        self._log = log
        self._turn = asyncio.Lock()
        # The views that have had this release's definition since the start of this process.
        self._were_current: set[str] = set()

    async def is_outdated(self, view: View) -> bool:
        """Return whether the view in the database must be rebuilt before this release can use it."""
        return await self._definition(view) != view.definition

    async def rebuild_if_outdated(self, view: View) -> None:
        """Rebuild a view, and all other outdated views with it.

        If the view was up to date once and then another release rebuilt it with its own definition, leave it to
        that release: otherwise the two would rebuild it in turns.
        """
        if await self._needs_rebuild(view):
            async with self._turn:
                await self._rebuild()
        self._were_current.add(view.name)

    async def _rebuild(self) -> None:
        logged: list[str] = []
        while outdated := [view for view in self._views if await self._needs_rebuild(view)]:
            names = [view.name for view in outdated]
            if names != logged:
                logged = names
                logger.info("rebuilding outdated views", views=names)
            try:
                await rebuild_views(self._dsn, outdated, self._log, lambda _done, _total: None)
            except RebuildRunningError:
                await asyncio.sleep(CHECK_SECONDS)

    async def _needs_rebuild(self, view: View) -> bool:
        definition = await self._definition(view)
        return definition is None or (definition != view.definition and view.name not in self._were_current)

    async def _definition(self, view: View) -> str | None:
        """Return the definition of the view in the database.

        None stands for a view that has lost its position, that has events that the log has lost, or that an
        import has cleared.
        """
        try:
            async with self._connections[view.name].connection() as connection:
                state = await view_state(connection)
                is_there = await has_place(connection, Place(state.position, None))
        except OutdatedViewError:
            return None
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            return "other tables"
        is_ahead = state.definition == view.definition and not is_there
        return None if is_ahead else state.definition or None
