"""The supervisor: it runs several processes that serve one port together, and shows them as one.

It binds the port's sockets, one for each process, and keeps them open (see ``service.http.sockets``). It starts
the processes (``worker.py``), restarts those that end, replaces them one after the other when it is hung up,
and sums their metrics. It serves no request itself.
"""

import asyncio
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Final, Literal, TypeAlias

import structlog
import typer
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from service.api.metric_sums import MetricSums, PlainMetric, to_plain
from service.background import BackgroundTasks
from service.channel import Channel
from service.cli.console import EXIT_FAILURE, tune_gc
from service.cli.startup import greet
from service.http.server import DRAIN_SECONDS_MAX
from service.http.sockets import bound_sockets
from service.settings import Settings, SettingsError, read_settings

COMMAND: Final = (sys.executable, "-m", "service.cli.worker")
# The pause before a process is started again. It doubles until a process has lived for HEALTHY_SECONDS.
PAUSE_SECONDS_MIN: Final = 0.1
PAUSE_SECONDS_MAX: Final = 10.0
HEALTHY_SECONDS: Final = 10.0
# How often each process reports its metrics. If it is killed, the counts since its last report are lost.
REPORT_SECONDS: Final = 1.0
# A scrape waits for the reports of all processes for this long.
COLLECT_SECONDS_MAX: Final = 1.0
# A process that does not report for this long is not ready, and another one accepts its connections too.
SILENT_SECONDS: Final = 3.0
# A process that is to end is killed after this time.
STOP_SECONDS_MAX: Final = 10.0
# The key of the supervisor's own metrics. Those of a process have its process id.
OWN_REPORT: Final = 0
# A process's connections to the embedded PostgreSQL. A rolling restart runs one process more.
CONNECTIONS_PER_PROCESS: Final = 20
# Those of the commands, of some psql sessions and of the server itself.
CONNECTIONS_OF_OTHERS: Final = 44
# Settings that only the supervisor reads, at its start.
FIXED: Final = (
    *("host", "port", "reuse_port", "processes", "database_url", "read_only", "state_dir", "pg_bindir"),
)

RestartCause: TypeAlias = Literal["ended", "reload"]

logger = structlog.get_logger()


def embedded_settings(processes: int) -> Mapping[str, str]:
    """Return the settings that the embedded PostgreSQL needs for more than one process."""
    if processes == 1:
        return {}
    return {"max_connections": str(CONNECTIONS_PER_PROCESS * (processes + 1) + CONNECTIONS_OF_OTHERS)}


async def supervise(settings: Settings, dsn: str, stopped: asyncio.Event, hung_up: asyncio.Event) -> None:
    """Run the processes of the settings until the service is stopped; replace them when it is hung up.

    Raises:
        OSError: the address cannot be bound.
        typer.Exit: a process ended before all were ready, with the same exit code.
    """
    with bound_sockets(
        settings.host, settings.port, settings.processes, reuse_port=settings.reuse_port
    ) as bound:
        port, sockets = bound
        supervisor = Supervisor(settings, dsn, port, sockets)
        try:
            await supervisor.run(stopped, hung_up)
        finally:
            await supervisor.stop()


class Worker:
    """One process, as the supervisor sees it.

    Args:
        slot: which of the port's sockets are its own, from 0 on.
        process: the process.
        channel: the channel to it.

    Attributes:
        is_ready: whether it has become ready.
        is_silent: whether it does not report.
        is_leaving: whether it takes leave of its clients, because another process has replaced it.
        has_ended: set when it has ended.
        is_decided: set when it is ready or has ended.
    """

    def __init__(self, slot: int, process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        self.slot = slot
        self.channel = channel
        self.process = process
        self.began = monotonic()
        self.is_ready = False
        self.is_silent = False
        self.is_leaving = False
        self.has_ended = asyncio.Event()
        self.is_decided = asyncio.Event()
        self._state: object = None
        # The reports that were requested, by their numbers, with the time of the request.
        self._requested: dict[int, tuple[float, asyncio.Future[None]]] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def silent_seconds(self) -> float:
        """How long the oldest requested report has been missing; 0 if none is."""
        return max((monotonic() - since for since, _ in self._requested.values()), default=0.0)

    def request_report(self, number: int) -> "asyncio.Future[None]":
        """Request a report; the result is done when it has arrived."""
        # Requests would pile up in the channel of a process that reads none.
        if self.is_silent and self._requested:
            return next(iter(self._requested.values()))[1]
        future = asyncio.get_running_loop().create_future()
        self._requested[number] = (monotonic(), future)
        self.channel.send("report", number=number)
        return future

    def receive_report(self, number: int) -> None:
        """Note that a requested report has arrived."""
        _, future = self._requested.pop(number, (0.0, None))
        if future is not None and not future.done():
            future.set_result(None)

    def send_state(self, slots: Sequence[int], ready: int) -> None:
        """Send the slots that the process has to listen on, and the number of ready processes, if changed."""
        if self._state != (slots, ready):
            self._state = (slots, ready)
            self.channel.send("state", slots=slots, ready=ready)

    def end(self) -> None:
        """Note that the process has ended."""
        for _, future in self._requested.values():
            if not future.done():
                future.set_result(None)
        self._requested.clear()
        self.has_ended.set()
        self.is_decided.set()


class Supervisor:
    """Runs the processes.

    Args:
        settings: the settings.
        dsn: the database's DSN.
        port: the port.
        sockets: the bound sockets of each slot.
    """

    def __init__(
        self, settings: Settings, dsn: str, port: int, sockets: Sequence[Sequence[socket.socket]]
    ) -> None:
        self._settings = settings
        self._dsn = dsn
        self._port = port
        self._sockets = sockets
        # The process of each slot.
        self._current: dict[int, Worker] = {}
        # All that run, with those that are starting or leaving.
        self._workers: set[Worker] = set()
        self._locks = [asyncio.Lock() for _ in sockets]
        self._sums = MetricSums()
        self._restarts: Counter[RestartCause] = Counter({"ended": 0, "reload": 0})
        self._unanswered = 0
        self._numbers = count(1)
        self._background = BackgroundTasks()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

    async def run(self, stopped: asyncio.Event, hung_up: asyncio.Event) -> None:
        """Start the processes, and supervise them until the service is stopped."""
        serving = asyncio.create_task(self._serve(hung_up))
        stopping = asyncio.create_task(stopped.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            logger.info("stopping")
        finally:
            self._is_stopping = True
            for task in (serving, stopping):
                task.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)

    async def stop(self) -> None:
        """End all processes, and kill those that take too long."""
        self._is_stopping = True
        await self._background.stop()
        for worker in self._workers:
            worker.process.terminate()
        await self._await_end([*self._workers])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, hung_up: asyncio.Event) -> None:
        await self._start_all()
        greet(self._settings, self._port)
        tune_gc()
        self._background.start("collect reports", self._collect_regularly)
        for slot in self._current:
            self._background.start(f"keep process {slot}", lambda slot=slot: self._keep(slot))  # type: ignore[misc]
        while True:
            await hung_up.wait()
            hung_up.clear()
            await self._replace_all()

    async def _start_all(self) -> None:
        # The first one prepares the database, and reports what it waits for.
        for slots in ([0], range(1, len(self._sockets))):
            started = [await self._launch(slot) for slot in slots]
            for worker in started:
                self._current[worker.slot] = worker
            self._assign()
            for worker in started:
                await worker.is_decided.wait()
            for worker in started:
                if not worker.is_ready or worker.has_ended.is_set():
                    raise typer.Exit(max(worker.process.returncode or 0, EXIT_FAILURE))

    async def _launch(self, slot: int) -> Worker:
        """Start a process, which is not in its slot yet.

        Raises:
            OSError: the system cannot start it.
        """
        ours, theirs = socket.socketpair()
        files = [[one.fileno() for one in group] for group in self._sockets]
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: ASYNC220, S603 - it takes milliseconds; our own command
                    (*COMMAND, str(theirs.fileno())),
                    pass_fds=(theirs.fileno(), *(file for group in files for file in group)),
                    stdin=subprocess.DEVNULL,
                    # Ctrl-C reaches the supervisor alone.
                    process_group=0,
                )
        except OSError:
            ours.close()
            raise
        worker = Worker(slot, process, await Channel.open(ours))
        self._workers.add(worker)
        worker.channel.send(
            "start",
            dsn=self._dsn,
            slot=slot,
            port=self._port,
            files=files,
            settings=self._settings.model_dump(
                mode="json", include={"processes", "host", "database_url", "read_only"}
            ),
        )
        task = asyncio.create_task(self._follow(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return worker

    async def _follow(self, worker: Worker) -> None:
        """Receive the messages of a process until it has ended."""
        while (message := await worker.channel.receive()) is not None:
            match message["type"]:
                case "ready":
                    worker.is_ready = True
                    worker.is_decided.set()
                    self._assign()
                case "report":
                    self._sums.report(worker.pid, message["families"])
                    worker.receive_report(message["number"])
                case "collect":
                    task = asyncio.create_task(self._send_sums(worker, message["number"]))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case kind:
                    logger.warning("unknown message of a process", kind=kind, pid=worker.pid)
        await worker.channel.close()
        # The channel closes when the process ends, so this takes a moment at most.
        await asyncio.to_thread(worker.process.wait)
        self._workers.discard(worker)
        self._sums.end(worker.pid)
        worker.end()
        self._assign()

    def _assign(self) -> None:
        """Let each process that responds listen on its own sockets, and on those of the others."""
        running = {slot: one for slot, one in self._current.items() if not one.has_ended.is_set()}
        serving = {slot: one for slot, one in running.items() if one.is_ready and not one.is_silent}
        # Before any is ready, one responds with the reason, unless other services may serve the requests.
        takers = serving or ({} if self._settings.reuse_port else running)
        slots: dict[int, list[int]] = {}
        for slot in range(len(self._sockets)):
            if takers:
                taker = slot if slot in takers else [*takers][slot % len(takers)]
                slots.setdefault(taker, []).append(slot)
        for worker in self._workers:
            is_current = self._current.get(worker.slot) is worker
            worker.send_state(slots.get(worker.slot, []) if is_current else [], len(serving))

    async def _keep(self, slot: int) -> None:
        """Start the process of a slot again whenever it ends, after a pause that grows."""
        pause, last_status = 0.0, None
        while True:
            worker = self._current[slot]
            await worker.has_ended.wait()
            async with self._locks[slot]:
                if self._current[slot] is not worker or self._is_stopping:
                    continue
                status = worker.process.returncode
                is_healthy = worker.is_ready and monotonic() - worker.began > HEALTHY_SECONDS
                pause = (
                    PAUSE_SECONDS_MIN
                    if is_healthy
                    else max(PAUSE_SECONDS_MIN, min(2 * pause, PAUSE_SECONDS_MAX))
                )
                # A process that fails at each start is logged once.
                if worker.is_ready or status != last_status:
                    logger.error("a process ended and is restarted", slot=slot, pid=worker.pid, status=status)
                last_status = status
                await asyncio.sleep(pause)
                try:
                    self._current[slot] = await self._launch(slot)
                except OSError as error:
                    if str(error) != last_status:
                        logger.error("a process cannot be started", slot=slot, error=str(error))  # noqa: TRY400
                    last_status = str(error)
                    continue
                self._restarts["ended"] += 1
                self._assign()

    async def _replace_all(self) -> None:
        """Replace the processes one after the other, with the present settings and code."""
        try:
            settings = read_settings()
        except SettingsError as error:
            logger.error("the processes stay as they were", error=str(error))  # noqa: TRY400 - the message is enough
            return
        # The option may have set the number of processes.
        settings = settings.model_copy(update={"processes": self._settings.processes})
        if changed := [name for name in FIXED if getattr(settings, name) != getattr(self._settings, name)]:
            names = [f"ORDER_TRACKING_{name}".upper() for name in changed]
            logger.warning("restart the service to change these settings", settings=names)
        for worker in self._workers:
            # A leaked token is refused at once, not only when the last process is replaced.
            worker.channel.send("tokens")
        logger.info(
            "the settings were read again, and the processes are replaced one after the other",
            processes=len(self._sockets),
            tokens=len(settings.tokens),
        )
        for slot in range(len(self._sockets)):
            async with self._locks[slot]:
                if not await self._replace(slot):
                    return
        logger.info("all processes were replaced")

    async def _replace(self, slot: int) -> bool:
        """Replace the process of a slot; return whether the new one became ready."""
        old = self._current[slot]
        try:
            new = await self._launch(slot)
        except OSError as error:
            logger.error("the other processes stay as they were", error=str(error))  # noqa: TRY400
            return False
        await new.is_decided.wait()
        if not new.is_ready:
            status = new.process.returncode
            logger.error(
                "a new process ended, so the other processes stay as they were", slot=slot, status=status
            )
            return False
        self._current[slot] = new
        self._restarts["reload"] += 1
        old.is_leaving = True
        self._assign()
        old.channel.send("drain")
        await self._await_end([old], DRAIN_SECONDS_MAX)
        return True

    async def _await_end(self, workers: Sequence[Worker], more_seconds: float = 0.0) -> None:
        """Wait until processes have ended, and kill those that take too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS_MAX + more_seconds):
                await asyncio.gather(*(worker.has_ended.wait() for worker in workers))
        for worker in workers:
            if not worker.has_ended.is_set():
                logger.error("a process did not end in time and is killed", slot=worker.slot, pid=worker.pid)
                worker.process.kill()
                await worker.has_ended.wait()

    async def _collect_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._collect()
            for worker in [*self._workers]:
                is_silent = worker.silent_seconds > SILENT_SECONDS
                if is_silent != worker.is_silent:
                    worker.is_silent = is_silent
                    message = "a process does not respond" if is_silent else "a process responds again"
                    logger.warning(message, slot=worker.slot, pid=worker.pid)
                    self._assign()

    async def _collect(self) -> int:
        """Let all processes report; return how many did not do so in time."""
        number = next(self._numbers)
        # The others have served nothing yet.
        requested = [worker.request_report(number) for worker in self._workers if worker.is_ready]
        if not requested:
            return 0
        _, missing = await asyncio.wait(requested, timeout=COLLECT_SECONDS_MAX)
        return len(missing)

    async def _send_sums(self, worker: Worker, number: int) -> None:
        unanswered = await self._collect()
        self._sums.report(OWN_REPORT, self._own_metrics(unanswered))
        worker.channel.send("sums", number=number, families=self._sums.families())

    def _own_metrics(self, unanswered: int) -> list[PlainMetric]:
        ready = sum(
            one.is_ready and not one.is_silent for one in self._current.values() if not one.has_ended.is_set()
        )
        workers = GaugeMetricFamily(
            "workers",
            "Processes that serve the port together; of unanswered ones, the last known counts are summed.",
            labels=["state"],
        )
        for state, number in (
            ("configured", len(self._sockets)),
            ("ready", ready),
            ("unanswered", unanswered),
        ):
            workers.add_metric([state], number)
        restarts = CounterMetricFamily(
            "worker_restarts", "Processes started again, by cause.", labels=["cause"]
        )
        for cause, total in self._restarts.items():
            restarts.add_metric([cause], total)
        return to_plain([*self._registry.collect(), workers, restarts])
