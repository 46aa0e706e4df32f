"""The composition root: every part is made and wired here, and ended in the opposite order."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Final

import asyncpg
import structlog
from aiohttp import web

from domain.order import Order
from projections.engine import OutdatedViewError, Projector, View, view_state
from projections.rebuild import Progress, RebuildRunningError, RebuiltView, rebuild
from service.api.events import Streams
from service.api.metrics import Metrics
from service.api.openapi import OpenApi
from service.api.operations import OperationsApi
from service.api.orders import ReadApi
from service.api.quarantine import QuarantineApi
from service.database.connections import (
    HOT_SETTINGS,
    POOL_STATEMENT_TIMEOUT,
    RECONNECT_PAUSE_SECONDS,
    Connection,
    HeldConnection,
    StorageUnavailableError,
    connect,
    is_connection_lost,
    open_pool,
)
from service.database.schema import VIEWS, apply_schema, service_dsn
from service.event_log.feed import LogReader
from service.event_log.store import EventStore
from service.http.access import Access
from service.http.endpoints import routes_of
from service.http.request_ids import route_of
from service.http.server import HttpServer
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Recorder
from service.ingest.webhook import Webhook
from service.ingest.webhook_auth import Sender
from service.pages.handlers import Pages
from service.settings import Settings

# How long an unreachable database is waited for at start, such as one that starts at the same time.
START_SECONDS_MAX: Final = 30.0
# New objects between two collections; the default of some hundreds takes a twentieth of the time under load.
GC_OBJECTS: Final = 50_000
# After a background task failed, before it is begun again.
RESTART_PAUSE_SECONDS: Final = 1.0
LASTED_SECONDS: Final = 60.0
# How often the connection that listens is asked whether it is still one; it would never notice by itself.
LISTEN_LOOK_SECONDS: Final = 5.0
IS_ALIVE: Final = "SELECT 1"
# While another process rebuilds an outdated view.
REBUILD_LOOK_SECONDS: Final = 2.0

CHANNEL: Final = "order_events"

log = structlog.get_logger()


async def prepare_database(dsn: str) -> str:
    """Bring the schema up to date, waiting for a database that is not up yet; return the service's own DSN.

    Raises:
        StorageUnavailableError: it cannot be reached within START_SECONDS_MAX.
        SchemaError: its schema is not one for this release.
    """
    due = asyncio.get_running_loop().time() + START_SECONDS_MAX
    is_waiting = False
    while True:
        try:
            connection = await connect(dsn)
            break
        except StorageUnavailableError as error:
            if asyncio.get_running_loop().time() > due:
                raise
            if not is_waiting:
                is_waiting = True
                log.warning("waiting for the database", error=str(error))
            await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
    try:
        await apply_schema(connection)
    finally:
        await connection.close()
    return await service_dsn(dsn)


class Service:
    """The running parts of one process."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        self._dsn = dsn
        self.pool = open_pool(dsn)
        connect_hot = partial(connect, dsn, **HOT_SETTINGS)
        self._reading_log = HeldConnection(connect_hot)
        self._reading_orders = HeldConnection(connect_hot)
        # What must not wait for readers, who may have all of the pool: to keep a body, to look at keys.
        connect_plainly = partial(connect, dsn, statement_timeout=POOL_STATEMENT_TIMEOUT)
        self._quarantining, self._looking = HeldConnection(connect_plainly), HeldConnection(connect_plainly)
        self._writing = HeldConnection(partial(connect_hot, idle_in_transaction_session_timeout="5s"))
        self._projecting = {
            view.name: HeldConnection(partial(connect_hot, search_path=view.name)) for view in VIEWS
        }
        self.log_reader = LogReader(self._reading_log, partial(connect, dsn))
        self.projectors = {
            view.name: Projector(view, self._projecting[view.name].transaction, self.log_reader.read_log)
            for view in VIEWS
        }
        self.recorder = Recorder(
            EventStore(self._writing),
            self._on_commit,
            queue_reports_max=settings.queue_reports_max,
            seconds_max=settings.request_seconds_max,
            on_batch=self._on_batch,
        )
        seconds_max = settings.request_seconds_max
        quarantine = Quarantine(self._quarantining, seconds_max, settings.quarantine_hourly_max)
        self.metrics = Metrics(
            self.pool, [*self.projectors.values()], quarantine, lambda: self.recorder.waiting
        )
        self.access = Access(self._looking, seconds_max, is_open_without_keys=settings.is_local)
        sender = make_sender(settings)
        self.webhook = Webhook(sender, self.recorder, quarantine)
        self.streams = Streams(self.pool, self.access, seconds_max)
        self.apis = (
            ReadApi(self.pool, self._reading_orders, self.projectors, seconds_max),
            self.streams,
            QuarantineApi(self.pool, self.recorder, seconds_max),
            OperationsApi(self.pool, self._looking, [*self.projectors.values()], seconds_max),
            self.metrics,
        )
        self.openapi = OpenApi(self.apis, sender.path)
        self.pages = Pages(self.pool, self.access, self.projectors, seconds_max, self.openapi.document)
        self._logs_requests = settings.log_requests
        self._rebuilding = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the pool and begin to follow the log."""
        await self.pool
        for view in VIEWS:
            self.projectors[view.name].is_outdated = await self._is_outdated(view)
        for view in VIEWS:
            self.supervise(f"project {view.name}", partial(self._project, view))
        self.supervise("listen", self._listen)

    async def stop(self) -> None:
        """Answer what waits, then end everything."""
        await self.recorder.finish()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in (
            *(self._writing, self._quarantining, self._looking, self._reading_orders, self._reading_log),
            *self._projecting.values(),
        ):
            await held.close()
        self.pool.terminate()

    def _on_commit(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        self.log_reader.remember(events, positions)
        self.metrics.count_commit(events)
        self._wake()

    def _on_batch(self, reports: int, seconds: float) -> None:
        self.metrics.measure_batch(reports, seconds)

    def on_answer(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Measure a request that has been answered, and log it where that is wanted."""
        self.metrics.measure_answer(request, status, seconds)
        if self._logs_requests:
            milliseconds = round(seconds * 1_000, 1)
            log.info("request", method=request.method, route=route_of(request), status=status, ms=milliseconds)

    def _wake(self, *_notification: object) -> None:
        self.streams.tail.wake()
        for projector in self.projectors.values():
            projector.wake()

    def supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run something for ever: whatever ends it is logged, and it is begun again."""

        async def run() -> None:
            last_failure = ""
            while True:
                began = monotonic()
                try:
                    await work()
                except Exception as error:  # noqa: BLE001 - no failure of a background task may end it for good
                    # The same again is said again only when it had gone well for a while.
                    if repr(error) != last_failure or monotonic() - began > LASTED_SECONDS:
                        last_failure = repr(error)
                        log.warning("background task failed; it is begun again", task=name, error=repr(error))
                await asyncio.sleep(RESTART_PAUSE_SECONDS)

        self._tasks.append(asyncio.create_task(run(), name=name))

    async def _project(self, view: View) -> None:
        if await self._is_outdated(view):
            async with self._rebuilding:
                await self._rebuild_outdated()
        await self.projectors[view.name].run()

    async def _rebuild_outdated(self) -> None:
        """Rebuild whatever is outdated, together: the log is read once. What is not goes on meanwhile."""
        said: list[str] = []
        while outdated := [view for view in VIEWS if await self._is_outdated(view)]:
            names = [view.name for view in outdated]
            if names != said:
                said = names
                log.info("views are rebuilt: their definition has changed", views=names)
            try:
                await rebuild_views(self._dsn, outdated, self.log_reader, lambda _done, _total: None)
            except RebuildRunningError:
                # Another process is at it, or makes a backup.
                await asyncio.sleep(REBUILD_LOOK_SECONDS)

    async def _is_outdated(self, view: View) -> bool:
        try:
            async with self._projecting[view.name].use() as connection:
                state = await view_state(connection)
        except (OutdatedViewError, asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
            # Its position is lost, or its tables are not what they were: it is made anew.
            return True
        return state.definition != view.definition

    async def _listen(self) -> None:
        """Hear of what other processes append. Only a hint: beneath it, every projector polls."""
        connection = await connect(self._dsn)
        try:
            ended = asyncio.Event()
            connection.add_termination_listener(lambda _connection: ended.set())
            await connection.add_listener(CHANNEL, self._wake)
            # Listening comes first, and then the reading of what was appended before it.
            self._wake()
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LISTEN_LOOK_SECONDS):
                        await ended.wait()
                        return
                async with asyncio.timeout(LISTEN_LOOK_SECONDS):
                    await connection.execute(IS_ALIVE)
        finally:
            connection.terminate()


async def rebuild_views(
    dsn: str, views: Sequence[View], log_reader: LogReader, progress: Progress, *, verify: bool = False
) -> list[RebuiltView]:
    """Rebuild views of a database; see ``projections.rebuild``."""

    async def connect_with(search_path: str) -> Connection:
        # One waits in its transaction while another works.
        return await connect(dsn, search_path=search_path, idle_in_transaction_session_timeout="0")

    try:
        return await rebuild(views, connect_with, log_reader, progress, verify=verify)
    except Exception as error:
        if is_connection_lost(error):
            raise StorageUnavailableError(str(error) or type(error).__name__) from error
        raise


def calm_garbage_collector() -> None:
    """Let it look less often: what lives as long as the process is set apart, and requests leave few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_OBJECTS)


def make_sender(settings: Settings) -> Sender:
    """Return what is asked of whoever sends a webhook."""
    return Sender(
        [token.get_secret_value().encode() for token in settings.webhook_tokens],
        settings.webhook_hmac_secret.get_secret_value().encode(),
        settings.webhook_hmac_header,
        settings.trusted_proxies,
    )


def make_app(service: Service, settings: Settings) -> web.Application:
    """Return the HTTP application of a service."""
    app = web.Application(client_max_size=settings.body_bytes_max)
    app.add_routes(service.webhook.routes())
    app.add_routes(service.pages.routes())
    for api in (*service.apis, service.openapi):
        app.add_routes(routes_of(api, service.access))
    return app


@asynccontextmanager
async def serving(settings: Settings, dsn: str) -> AsyncIterator[tuple[int, bool]]:
    """Serve for the length of the block; yield the port, and whether no API key was ever made.

    Raises:
        OSError: the address cannot be listened on.
    """
    async with AsyncExitStack() as stack:
        service = Service(settings, dsn)
        stack.push_async_callback(service.stop)
        await service.start()
        server = HttpServer(
            make_app(service, settings),
            settings.host,
            settings.port,
            reuse_port=settings.reuse_port,
            on_answer=service.on_answer,
        )
        stack.push_async_callback(server.stop)
        port = await server.start()
        service.supervise("close slow connections", server.close_slow_connections)
        yield port, await service.access.is_without_keys()
        server.stop_listening()
        await service.streams.tail.end()
        # What was taken is answered first; a body that is only half here is not waited for.
        await service.recorder.finish()
