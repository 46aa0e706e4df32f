"""The ports of a service: it responds with 503 until the service is ready, and then serves it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from math import inf
from typing import Final, cast

import structlog

from service.api.starting import Starting
from service.app import Service
from service.background import BackgroundTasks
from service.database.connections import (
    RECONNECT_PAUSE_SECONDS,
    StorageUnavailableError,
    UnsupportedServerError,
)
from service.database.schema import prepare_database
from service.dsn import LOCAL_SOCKET, read_hosts
from service.http.addresses import LOOPBACK
from service.http.budgets import Budgets
from service.http.connections import LIMITS, Limits
from service.http.server import HttpServer
from service.settings import CoreSettings

# A service that inherits its port leaves its clients waiting for so long before it responds with 503.
SILENT_SECONDS_MAX: Final = 4.0

logger = structlog.get_logger()


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
        settings: CoreSettings,
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
        self.waiting = Starting(database, settings.request_seconds_max)
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
            service.core.refusals.counts.update(self.waiting.refused)
            self.waiting.end(self._server.handle)
            await self._listen()
            yield cast("int", self.port)
            self._server.stop_listening()
            # Otherwise they would never end. Their readers reconnect.
            await service.core.tail.end()
            if self._inherited or self._settings.reuse_port:
                # Another process serves what these clients send next.
                await self._server.drain()
            # Accepted reports are answered first. The service does not wait for the rest of an incomplete body.
            await service.core.recorder.drain()


@contextmanager
def _naming_address(host: str, port: int | None, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = f"choose another with {setting} or ORDER_TRACKING_HOST"
        raise PortError(f"cannot listen on {host} port {port}: {error.strerror or error}; {advice}") from error


@asynccontextmanager
async def listening(
    settings: CoreSettings,
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
    settings: CoreSettings, dsn: str, owner_dsn: str | None = None, limits: Limits = LIMITS
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
