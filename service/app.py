"""The composition root: every part is created and connected here, and stopped in reverse order."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from math import inf
from typing import Final, cast

import structlog
from aiohttp import web

from domain.order import Order
from projections import timeline
from projections.engine import LEADER_SECONDS_MAX, Projector, View
from projections.observer import OBSERVE_SECONDS, Observer
from projections.postgres_errors import Connection
from service.api.audit import AuditApi
from service.api.contradictions import ContradictionsApi
from service.api.events import EventsApi
from service.api.freshness import add_freshness, read_age, wait_for
from service.api.metrics import Metrics
from service.api.openapi import OpenApi
from service.api.operations import OperationsApi
from service.api.orders import OrdersApi
from service.api.quarantine import QuarantineApi
from service.api.shares import SharesApi
from service.api.statistics import StatisticsApi
from service.api.waiting import Waiting
from service.background import BackgroundTasks, follow, listen
from service.database.connections import (
    HOT_SETTINGS,
    POOL_SETTINGS,
    RECONNECT_PAUSE_SECONDS,
    ConnectionPool,
    DedicatedConnection,
    StorageUnavailableError,
    UnsupportedServerError,
    as_unavailable,
    connect,
    end_abandoned,
)
from service.database.durability import read_durability
from service.database.log_identity import LogIdentity
from service.database.schema import VIEWS, prepare_database
from service.dsn import LOCAL_SOCKET, as_reader, read_hosts
from service.event_log import times
from service.event_log.feed import Feed
from service.event_log.store import CHANNEL, last_arrival
from service.history.api import HistoryApi
from service.history.follower import Follower
from service.history.signer import make_signer
from service.history.status import read_status
from service.http.access import Access
from service.http.addresses import LOOPBACK
from service.http.auth_refusals import AuthRefusals
from service.http.budgets import Budgets
from service.http.connections import LIMITS, Limits
from service.http.endpoints import Api, make_routes
from service.http.request_ids import TRACE_HEADER, caller_trace, route_pattern
from service.http.server import HttpServer
from service.http.share_links import ShareLinks
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Recorder
from service.ingest.refusals import Refusals
from service.ingest.signatures import make_scheme
from service.ingest.volume import Volume
from service.ingest.webhook import RefusedWebhook, Webhook
from service.ingest.webhook_auth import WebhookAuth
from service.maintenance.replay import Rebuilder
from service.maintenance.retention import PASS_SECONDS, Retention
from service.pages.deliveries import DeliveryPages
from service.pages.handlers import Pages
from service.pages.proof import ProofPages
from service.pages.render import IS_READER, ZONE
from service.pages.share import SharePages
from service.settings import Settings
from service.subscriptions.api import SubscriptionsApi
from service.subscriptions.dispatcher import Dispatcher
from service.subscriptions.log_reader import LogReader, place_of
from service.subscriptions.progress import Progress
from service.subscriptions.sending import REQUESTS, Sender
from service.subscriptions.subscription import list_subscriptions

# How long a projection may overlook an event whose notification is lost.
POLL_SECONDS: Final = 1.0
# A service that inherits its port leaves its clients waiting for so long before it responds with 503.
SILENT_SECONDS_MAX: Final = 4.0
# The paths that are also served at ORDER_TRACKING_METRICS_PORT, since a shared port has one process respond.
MONITORING_PATHS: Final = frozenset({"/metrics", "/livez", "/readyz"})
# The pause after a projection failed, such as while the database is unreachable.
RETRY_PAUSE_SECONDS: Final = 0.2

logger = structlog.get_logger()


class Service:
    """The running parts of one process.

    Args:
        settings: the settings.
        dsn: the database's DSN, with the service's own role.
        owner_dsn: the configured DSN, whose role may erase; None for the same.
        budgets: the budgets of the process; None for new ones.
    """

    def __init__(  # noqa: PLR0915 - every part is made here
        self,
        settings: Settings,
        dsn: str,
        owner_dsn: str | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        seconds_max = settings.request_seconds_max
        self.is_reader = settings.read_only
        # Whatever this process runs, PostgreSQL refuses its writes.
        dsn = as_reader(dsn) if self.is_reader else dsn
        self.vocabulary = settings.vocabulary
        self.budgets = budgets or Budgets()
        self.log = LogIdentity()
        self.pool = ConnectionPool(dsn, seconds_max, self.log.read)
        connect_hot = partial(connect, dsn, self.log.read, **HOT_SETTINGS)
        connect_timely = partial(connect, dsn, **POOL_SETTINGS)
        self.log_connection = DedicatedConnection(connect_hot)
        self.orders_connection = DedicatedConnection(connect_hot)
        self.timelines_connection = DedicatedConnection(connect_hot)

        async def prepare_append(connection: Connection) -> None:
            await self.log.read(connection)
            await end_abandoned(connection, seconds_max)

        self.append_connection = DedicatedConnection(
            partial(connect, dsn, prepare_append, **HOT_SETTINGS, idle_in_transaction_session_timeout="5s"),
            on_open=self._forget,
        )
        # Slow reads may use the whole pool. Quarantining a body and checking an API key must not wait for them.
        self.quarantine_connection = DedicatedConnection(connect_timely, seconds_max)
        self.auth_connection = DedicatedConnection(connect_timely, seconds_max)
        self.projection_connections = {
            view.name: DedicatedConnection(
                partial(
                    connect_hot,
                    # An observer also reads the log.
                    search_path=f"{view.name}, public" if self.is_reader else view.name,
                    # A process that is suspended in a transaction must not keep the view from its stand-in.
                    idle_in_transaction_session_timeout=f"{LEADER_SECONDS_MAX:g}s",
                ),
                on_open=self._forget,
            )
            for view in VIEWS
        }
        self.feed = Feed(self.log_connection, partial(connect, dsn))
        self.projectors = {view.name: self._make_projector(view) for view in VIEWS}
        self.rebuilder = Rebuilder(dsn, VIEWS, self.projection_connections, self.feed)
        quarantine = Quarantine(self.quarantine_connection, settings.quarantine_hourly_max)
        projectors = [*self.projectors.values()]
        volume = Volume(settings.webhook_bytes_hourly_max)
        auth_refusals = AuthRefusals(settings.trusted_proxies)
        self.refusals = Refusals(self.auth_connection, lambda keyed: self.recorder.trouble(keyed=keyed))
        # A position that is lost in a crash of the server costs repeats, so no save waits for the disk.
        self.subscriptions_connection = DedicatedConnection(partial(connect_hot, synchronous_commit="off"))
        self.deliveries_connection = DedicatedConnection(connect_hot)
        self.sender = Sender(settings.subscription_networks, self.log, budgets=self.budgets)
        self.dispatcher = Dispatcher(
            Progress(self.subscriptions_connection),
            LogReader(self.feed, self.deliveries_connection),
            self.sender,
            settings.subscription_retry_seconds,
            count_losses=lambda: self.events.tail.losses,
        )
        self.signer = make_signer(settings)
        # An entry that is signed must survive a crash of the server.
        self.history_connection = DedicatedConnection(partial(connect_hot, synchronous_commit="on"))
        self.history = Follower(self.history_connection, self.feed, self.signer)
        self.retention: Retention | None = None
        if settings.body_retention_days:
            self.retention = Retention(self.pool, owner_dsn or dsn, dsn, settings.body_retention_days)
        self.metrics = Metrics(
            self.pool,
            projectors,
            quarantine,
            volume,
            self.refusals,
            auth_refusals,
            self.budgets,
            self.retention,
            lambda: self.recorder,
            deliveries=self.dispatcher.outcomes,
            list_subscriptions=list_subscriptions,
            read_history=partial(read_status, self.signer),
        )
        self.recorder = Recorder(
            self.append_connection,
            self._on_commit,
            on_loss=self._forget,
            queue_reports_max=settings.queue_reports_max,
            seconds_max=seconds_max,
            recognise=self.vocabulary.recognise,
            on_batch=self.metrics.measure_batch,
        )
        self.access = Access(
            self.auth_connection,
            seconds_max,
            auth_refusals,
            is_open=settings.is_open,
            is_reader=self.is_reader,
        )
        self.webhook_auth = make_webhook_auth(settings, auth_refusals)
        self.webhook = (
            RefusedWebhook(self.webhook_auth, self.refusals)
            if self.is_reader
            else Webhook(self.webhook_auth, self.recorder, quarantine, volume, self.refusals, log=self.log)
        )
        self.events = EventsApi(self.pool, self.access, self.budgets.streams, self.projectors, self.log)
        share_secret = settings.share_secret.get_secret_value()
        links = ShareLinks(share_secret) if share_secret else None
        self.pages = Pages(
            self.pool,
            self.access,
            self.projectors,
            self.recorder,
            self.refusals,
            self.vocabulary,
            links=links,
            deliveries=DeliveryPages(self.pool, self.dispatcher, self.sender),
            proofs=ProofPages(self.pool, self.signer),
        )
        self.share_pages = SharePages(
            self.pool,
            self.projectors,
            links,
            budget=self.budgets.shares,
            proxies=settings.trusted_proxies,
            refusals=auth_refusals,
            is_open=settings.is_open,
        )
        self.apis: list[Api] = [
            OrdersApi(
                *(self.pool, self.orders_connection, self.timelines_connection),
                *(self.projectors, self.budgets, self.log),
            ),
            StatisticsApi(self.pool, self.projectors, self.vocabulary.recognise, settings.zone),
            self.events,
            AuditApi(self.pool, self.projectors, self.vocabulary),
            ContradictionsApi(self.pool, self.projectors),
            QuarantineApi(self.pool, self.recorder),
            SharesApi(self.pool, links, is_reader=self.is_reader),
            SubscriptionsApi(self.pool, self.dispatcher, self.sender),
            HistoryApi(
                *(self.pool, self.signer, self.history.reach, self._wait_for_timelines),
                is_public=settings.history_public,
            ),
            OperationsApi(
                self.pool,
                self.auth_connection,
                projectors,
                self.refusals,
                replica_age_seconds_max=settings.replica_age_seconds_max if self.is_reader else None,
            ),
            self.metrics,
        ]
        self.openapi = OpenApi(self.apis, REQUESTS)
        self.apis.append(self.openapi)
        self.background = BackgroundTasks()
        self._connect = partial(connect, dsn)
        self._logs_requests = settings.log_requests
        self._zone = settings.zone

    async def start(self) -> None:
        """Open the pool and begin to follow the log."""
        await self.pool.open()
        if self.is_reader:
            await self._observe_views()
            return
        async with self.pool.connection() as connection:
            self.metrics.start_from(await last_arrival(connection))
            for setting, is_safe in (await read_durability(connection)).items():
                if not is_safe:
                    logger.warning("a crash of the server can lose acknowledged reports", setting=setting)
        for view in VIEWS:
            self.projectors[view.name].is_outdated = await self.rebuilder.is_outdated(view)
        for view in VIEWS:
            project = partial(self._project, view)
            self.background.start(f"project {view.name}", project, restart_pause_seconds=RETRY_PAUSE_SECONDS)
        if self.retention is not None:
            self.background.start("erase old bodies", self.retention.run, restart_pause_seconds=PASS_SECONDS)
        self.background.start("deliver", self.dispatcher.run)
        self.background.start("add to the history", self.history.run)
        sum_up = partial(
            follow,
            # This connection is open anyway, and mostly at rest.
            partial(times.add_blocks, self.history_connection),
            # Nothing wakes it: a block takes a while to fill.
            asyncio.Event(),
            batch_events_max=2,
            poll_seconds=times.POLL_SECONDS,
            idle_seconds=times.PAUSE_SECONDS,
        )
        self.background.start("sum up times", sum_up)
        self.background.start("listen", partial(listen, self._connect, CHANNEL, self._wake))

    async def stop(self) -> None:
        """Answer the waiting reports, then stop everything."""
        await self.recorder.drain()
        await self.dispatcher.stop()
        await self.background.stop()
        for dedicated in (
            *(self.append_connection, self.quarantine_connection, self.auth_connection),
            *(self.orders_connection, self.timelines_connection, self.log_connection),
            *(self.subscriptions_connection, self.deliveries_connection, self.history_connection),
            *self.projection_connections.values(),
        ):
            await dedicated.close()
        self.pool.close()

    def make_app(self, body_bytes_max: int) -> web.Application:
        """Return the HTTP application.

        Args:
            body_bytes_max: the size limit of request bodies.
        """
        app = web.Application(client_max_size=body_bytes_max)
        app[ZONE] = self._zone
        app[IS_READER] = self.is_reader
        if self.is_reader:
            app.on_response_prepare.append(add_freshness)
        app.add_routes(self.webhook.routes())
        app.add_routes(self.pages.routes())
        app.add_routes(self.share_pages.routes())
        for api in self.apis:
            app.add_routes(make_routes(api, self.access, self.log))
        return app

    def make_monitoring_app(self, body_bytes_max: int) -> web.Application:
        """Return the HTTP application with the state of this one process, for its own address."""
        app = web.Application(client_max_size=body_bytes_max)
        routes = (route for api in self.apis for route in make_routes(api, self.access, self.log))
        app.add_routes(route for route in routes if route.path in MONITORING_PATHS)
        return app

    def on_response(self, request: web.BaseRequest, status: int, seconds: float) -> None:
        """Measure a response, and log it if requests are logged."""
        self.metrics.measure_response(request, status, seconds)
        if self._logs_requests:
            route, milliseconds = route_pattern(request), round(seconds * 1_000, 1)
            trace = caller_trace(request)
            more = {} if trace is None else {TRACE_HEADER: trace}
            logger.info("request", method=request.method, route=route, status=status, ms=milliseconds, **more)

    def _make_projector(self, view: View) -> Projector:
        dedicated = self.projection_connections[view.name]
        if self.is_reader:
            return Observer(view, dedicated.connection, self.feed.head, read_age, self._wake_streams)
        return Projector(view, dedicated.transaction, self.feed.read_log, self.feed.head)

    async def _observe_views(self) -> None:
        """Follow the positions of the views, which other processes write."""
        with as_unavailable():
            await asyncio.gather(*(projector.step() for projector in self.projectors.values()))
        for name, projector in self.projectors.items():
            observe = partial(
                follow,
                projector.step,
                projector.wake,
                batch_events_max=1,
                poll_seconds=OBSERVE_SECONDS,
                idle_seconds=0.0,
            )
            self.background.start(f"observe {name}", observe, restart_pause_seconds=RETRY_PAUSE_SECONDS)

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

    async def _wait_for_timelines(self, position: int) -> None:
        await wait_for(self.projectors, position, timeline.VIEW.name)

    def _forget(self) -> None:
        self.recorder.forget()
        self.feed.forget()
        for projector in self.projectors.values():
            projector.forget()

    def _wake_streams(self) -> None:
        # A standby sends no notifications. A view that has moved shows that the log has grown.
        self.events.tail.wake.set()

    def _on_commit(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        self.dispatcher.observe_commit(place_of(positions[-1], events[-1]), self.recorder.losses)
        self.feed.remember(events, positions)
        self.metrics.count_commit(events)
        self.dispatcher.pace.observe_commit(len(events))
        self.history.notice(positions[-1])
        self._wake()

    def _wake(self, *_notification: object) -> None:
        self.events.tail.wake.set()
        self.dispatcher.wake()
        self.history.wake.set()
        for projector in self.projectors.values():
            projector.wake.set()


def make_webhook_auth(settings: Settings, refusals: AuthRefusals) -> WebhookAuth:
    """Return the authentication of the webhook's sender."""
    return WebhookAuth(
        settings.tokens,
        make_scheme(settings.webhook_hmac_secret.get_secret_value(), settings.webhook_hmac_header),
        settings.trusted_proxies,
        refusals,
        is_open=settings.is_open,
    )


class PortError(OSError):
    """The service cannot listen. ``str()`` names the address, the reason, and the setting to change."""


class Listener:
    """The port of one process. It responds with 503 until a service is ready, and then serves that service.

    Args:
        settings: the settings.
        dsn: the configured DSN.
        inherited: the sockets to listen on, instead of the settings' host and port.
        silent_seconds_max: after this time, a process that inherits its port listens even if it is not ready.
        limits: the limits of each connection.

    Attributes:
        port: the port, None while it does not listen.
        monitoring_port: the port with this process's own metrics, None without such a port.
    """

    def __init__(
        self,
        settings: Settings,
        dsn: str,
        inherited: Sequence[socket.socket] = (),
        silent_seconds_max: float = SILENT_SECONDS_MAX,
        limits: Limits = LIMITS,
    ) -> None:
        self._settings = settings
        self._dsn = dsn
        self._inherited = inherited
        self._silent_seconds_max = silent_seconds_max
        self.budgets = Budgets()
        self._background = BackgroundTasks()
        database = ", ".join(map(str, read_hosts(dsn))) or LOCAL_SOCKET
        self.waiting = Waiting(database, settings.request_seconds_max)
        self.port: int | None = None
        self._turn = asyncio.Lock()
        self._listening_late: asyncio.Task[None] | None = None
        self.monitoring_port: int | None = None
        make_server = partial(
            HttpServer,
            self.waiting.handle,
            settings.body_bytes_max,
            settings.host,
            on_response=lambda *_: None,
            budgets=self.budgets,
            limits=limits,
            exempt=(*LOOPBACK, *settings.trusted_proxies),
        )
        self._server = make_server(settings.port, reuse_port=settings.reuse_port)
        self._monitoring: HttpServer | None = None
        if settings.metrics_port is not None:
            self._monitoring = make_server(settings.metrics_port, reuse_port=False)

    async def open(self) -> None:
        """Listen, unless other processes may serve the port until this one is ready.

        Raises:
            PortError: the service cannot listen on an address.
        """
        if self._monitoring is not None:
            port = self._settings.metrics_port
            with _naming_address(self._settings.host, port, "ORDER_TRACKING_METRICS_PORT"):
                self.monitoring_port = await self._monitoring.start()
            self._background.start("close slow scrapes", self._monitoring.close_slow_connections)
        if self._inherited:
            self._listening_late = asyncio.create_task(self._listen_late())
        elif not self._settings.reuse_port:
            await self._listen()

    async def _listen_late(self) -> None:
        await asyncio.sleep(self._silent_seconds_max)
        try:
            await self._listen()
        except PortError as error:
            # It ends the start later, when the service is ready.
            logger.error("clients wait: the service cannot listen yet", error=str(error))  # noqa: TRY400 - says all

    async def _listen(self) -> None:
        async with self._turn:
            if self.port is None:
                with _naming_address(self._settings.host, self._settings.port, "ORDER_TRACKING_PORT"):
                    self.port = await self._server.start(self._inherited)
                self._background.start("close slow connections", self._server.close_slow_connections)

    async def stop(self) -> None:
        """Close every connection."""
        self.waiting.end()
        if self._listening_late is not None:
            self._listening_late.cancel()
            await asyncio.gather(self._listening_late, return_exceptions=True)
        await self._background.stop()
        await self._server.stop()
        if self._monitoring is not None:
            await self._monitoring.stop()

    async def start_service(self, on_failure: Callable[[StorageUnavailableError], object]) -> Service:
        """Wait for the database as long as it takes, and return a started service.

        Args:
            on_failure: called for each failed attempt, after which there is another one.

        Raises:
            UnsupportedServerError: this release cannot use the server, or positions would not rise.
            SchemaError: this release cannot work with the database's schema.
        """
        while True:
            dsn = await prepare_database(self._dsn, inf, on_failure, is_reader=self._settings.read_only)
            service = Service(self._settings, dsn, self._dsn, self.budgets)
            try:
                await service.start()
            except BaseException as error:
                await service.stop()
                if not isinstance(error, StorageUnavailableError) or isinstance(error, UnsupportedServerError):
                    raise
                on_failure(error)
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
            else:
                return service

    @asynccontextmanager
    async def serving(self, service: Service) -> AsyncIterator[int]:
        """Serve a started service until the block ends; yield the port.

        Raises:
            PortError: the service cannot listen on the address.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(service.stop)
            stack.push_async_callback(self.stop)
            bytes_max = self._settings.body_bytes_max
            await self._server.replace(service.make_app(bytes_max), service.on_response)
            if self._monitoring is not None:
                await self._monitoring.replace(service.make_monitoring_app(bytes_max), service.on_response)
            service.refusals.counts.update(self.waiting.refused)
            self.waiting.end(self._server.handle)
            await self._listen()
            yield cast("int", self.port)
            self._server.stop_listening()
            # Otherwise they would never end. Their readers reconnect.
            await service.events.tail.end()
            if self._inherited or self._settings.reuse_port:
                # Another process serves what these clients send next.
                await self._server.drain()
            # Accepted reports are answered first. The service does not wait for the rest of an incomplete body.
            await service.recorder.drain()


@contextmanager
def _naming_address(host: str, port: int | None, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = f"choose another with {setting} or ORDER_TRACKING_HOST"
        raise PortError(f"cannot listen on {host} port {port}: {error.strerror or error}; {advice}") from error


@asynccontextmanager
async def listening(
    settings: Settings,
    dsn: str,
    inherited: Sequence[socket.socket] = (),
    silent_seconds_max: float = SILENT_SECONDS_MAX,
) -> AsyncIterator[Listener]:
    """Listen until the block ends.

    A process that shares its port listens only when it is ready: it would respond with 503 to requests that the
    others could serve. If it inherits the port, it may be alone, so that it does not wait for long.

    Raises:
        PortError: the service cannot listen on an address.
    """
    listener = Listener(settings, dsn, inherited, silent_seconds_max)
    try:
        await listener.open()
        yield listener
    finally:
        await listener.stop()


@asynccontextmanager
async def serving(
    settings: Settings, dsn: str, owner_dsn: str | None = None, limits: Limits = LIMITS
) -> AsyncIterator[tuple[int, Service]]:
    """Serve a prepared database until the block ends; yield the port and the running parts.

    Raises:
        PortError: the service cannot listen on the address.
    """
    listener = Listener(settings, dsn, limits=limits)
    service = Service(settings, dsn, owner_dsn, listener.budgets)
    try:
        await service.start()
    except BaseException:
        await service.stop()
        raise
    async with listener.serving(service) as port:
        yield port, service
