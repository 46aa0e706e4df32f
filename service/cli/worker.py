"""One of several processes that serve a port together: ``python -m service.cli.worker FILE``.

The supervisor starts it. FILE is the number of the open file that is its end of the channel.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Final

import structlog
import typer
import uvloop
from prometheus_client.core import Metric

from service.api.metric_sums import to_metrics, to_plain
from service.app import Listener, Service
from service.channel import Channel, Message
from service.cli.console import EXIT_FAILURE, completes, friendly_errors, stop_event, tune_gc
from service.cli.startup import configure_logs, log_vocabulary, note_wait, record_opened, warn
from service.http.problems import unavailable
from service.http.server import raise_open_files_limit
from service.settings import Settings, SettingsError, read_settings

# The supervisor waits for one second for the reports of all processes.
SUMS_SECONDS_MAX: Final = 3.0

logger = structlog.get_logger()


class Siblings:
    """The processes that serve the port together, as the supervisor shows them to one of them.

    Args:
        channel: the channel to the supervisor.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = count(1)
        self._requested: dict[int, asyncio.Future[list[Metric]]] = {}
        self._ready = 0

    @property
    def ready(self) -> int:
        """The number of ready processes."""
        return self._ready

    def set_ready(self, ready: int) -> None:
        """Note the number of ready processes."""
        self._ready = ready

    async def sum_metrics(self) -> Iterable[Metric]:
        """Return the metrics of all processes, as those of one.

        Raises:
            ProblemError: the supervisor does not respond. This process's own counters are less than the sums.
        """
        number = next(self._numbers)
        future: asyncio.Future[list[Metric]] = asyncio.get_running_loop().create_future()
        self._requested[number] = future
        self._channel.send("collect", number=number)
        try:
            async with asyncio.timeout(SUMS_SECONDS_MAX):
                return await future
        except TimeoutError:
            raise unavailable("the supervisor of the processes does not respond") from None
        finally:
            del self._requested[number]

    def receive_sums(self, message: Message) -> None:
        """Give the sums to the scrape that waits for them."""
        future = self._requested.get(message["number"])
        if future is not None and not future.done():
            future.set_result(to_metrics(message["families"]))


class Worker:
    """This process.

    Args:
        channel: the channel to the supervisor.
        start: its first message.
        settings: the settings.
        stopped: set when the process is to end.
    """

    def __init__(self, channel: Channel, start: Message, settings: Settings, stopped: asyncio.Event) -> None:
        self._channel = channel
        self._start = start
        self._settings = settings
        self._stopped = stopped
        self._siblings = Siblings(channel)
        self._listener = Listener(settings, start["dsn"], self._siblings)
        self._sockets = [[socket.socket(fileno=file) for file in group] for group in start["files"]]
        self._service: Service | None = None
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until the process is stopped."""
        # Until the supervisor gives it a slot, it listens on nothing.
        await self._listener.listen_on(self._start["port"], [])
        receiving = asyncio.create_task(self._receive())
        try:
            await self._serve()
        finally:
            await self._listener.stop()
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            for group in self._sockets:
                for one in group:
                    one.close()

    async def _serve(self) -> None:
        starting = asyncio.ensure_future(
            self._listener.start_service(partial(note_wait, self._settings, self._listener))
        )
        if not await completes(starting, self._stopped.wait()):
            return
        service = starting.result()
        async with self._listener.serving(service):
            if self._start["slot"] == 0:
                is_without_keys = await service.access.has_no_keys()
                if not self._settings.read_only:
                    await record_opened(self._settings, service)
                log_vocabulary(service.vocabulary)
                warn(self._settings, is_without_keys=is_without_keys)
            self._service = service
            self._channel.send("ready")
            tune_gc()
            await self._stopped.wait()
        # The counts since the last one.
        self._report(service, None)

    async def _receive(self) -> None:
        """Follow the supervisor, and end when it is gone."""
        while (message := await self._channel.receive()) is not None:
            match message["type"]:
                case "state":
                    self._siblings.set_ready(message["ready"])
                    if self._draining is None and not self._stopped.is_set():
                        sockets = [one for slot in message["slots"] for one in self._sockets[slot]]
                        await self._listener.listen_on(self._start["port"], sockets)
                case "report":
                    self._report(self._service, message["number"])
                case "sums":
                    self._siblings.receive_sums(message)
                case "tokens":
                    self._replace_tokens()
                case "drain":
                    self._draining = asyncio.create_task(self._drain())
                case kind:
                    logger.warning("unknown message of the supervisor", kind=kind)
        if not self._stopped.is_set():
            logger.error("the supervisor has ended, so this process ends too")
            self._stopped.set()

    def _report(self, service: Service | None, number: int | None) -> None:
        families = [] if service is None else to_plain(service.metrics.collect_all())
        self._channel.send("report", number=number, families=families)

    async def _drain(self) -> None:
        if self._service is not None:
            await self._listener.drain(self._service)
        self._stopped.set()

    def _replace_tokens(self) -> None:
        """Read the webhook's tokens again, before another process replaces this one."""
        try:
            tokens = read_settings().tokens
        except SettingsError as error:
            logger.error("the tokens stay as they were", error=str(error))  # noqa: TRY400 - the message is enough
            return
        # The process that replaces this one sets the first token, or removes the last.
        if self._service is not None and tokens and self._service.webhook_auth.has_tokens:
            self._service.webhook_auth.replace_tokens(tokens)


async def run(end: socket.socket) -> None:
    """Serve as the supervisor at the other end of the channel demands."""
    channel = await Channel.open(end)
    try:
        start = await channel.receive()
        if start is None:
            return
        settings = read_settings().model_copy(update=start["settings"])
        # Each process accepts its share, so that all together keep to the limit.
        share = settings.webhook_bytes_hourly_max // settings.processes
        settings = settings.model_copy(update={"webhook_bytes_hourly_max": share})
        configure_logs(settings, process=start["slot"])
        raise_open_files_limit()
        with stop_event(signal.SIGTERM) as stopped:
            await Worker(channel, start, settings, stopped).run()
    finally:
        await channel.close()


def main() -> None:
    """Run the process, and exit."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        with friendly_errors():
            uvloop.run(run(socket.socket(fileno=int(sys.argv[1]))))
    except typer.Exit as error:
        sys.exit(error.exit_code or EXIT_FAILURE)


if __name__ == "__main__":
    main()
