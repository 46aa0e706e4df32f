"""A world to break: a real service, a real PostgreSQL, senders, a reader at the tail, and their account."""

import asyncio
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import asyncpg

from projections.postgres import Connection
from service.database.embedded_postgres import NAME, EmbeddedPostgres, running_dsn
from service.features import SWITCHED
from tests.faults import shop
from tests.faults.history import Checkpoints
from tests.faults.namespaces import NETWORK, PRIMARY_ADDRESS, SERVICE_ADDRESS, Link, linked
from tests.faults.operator import Operator, Told
from tests.faults.proxy import Proxy
from tests.faults.resources import Resources, children
from tests.faults.shop import Shop
from tests.faults.standby import PORT, SYNCHRONOUS, free_address, make_standby, socket_of
from tests.support import account
from tests.support.account import Count, Exempt, Violations
from tests.support.connections import Connections
from tests.support.folders import make_folder
from tests.support.load import Acknowledged, Journal, Load, Tail
from tests.support.processes import COMMAND, RunningService, run_command_for
from tests.support.receiver import receiving
from tests.support.waiting import PATIENCE_SECONDS, until

# The pool opens its 8 connections on demand and keeps them; the rest are a few log files.
DESCRIPTORS_SLACK: Final = 12
# Four threads of libuv for names and files, and those that restart PostgreSQL.
THREADS_SLACK: Final = 10
# The cache of 100,000 order states may fill (50 MB), and the log's tail for the views (8 MB and more).
MEMORY_SLACK_MB: Final = 100.0

Value = TypeVar("Value")


async def in_thread(work: Callable[..., Value], *arguments: Any) -> Value:
    """Run a blocking function in a thread. A cancellation waits for its end, because it may start a process."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class SkippedError(Exception):
    """This machine does not permit this fault."""


class ViolatedError(Exception):
    """The service broke a promise."""

    def __init__(self, name: str, lines: list[str]) -> None:
        super().__init__("\n".join([f"{name}:", *(f"  {line}" for line in lines)]))


@dataclass(frozen=True)
class Effort:
    """The extent of a fault run.

    Args:
        times: how often each thing is broken.
        per_second: reports a second.
        is_timed: whether time limits count as promises. Tests may run on a busy machine.
    """

    times: int
    per_second: float
    is_timed: bool

    @property
    def answered_seconds_max(self) -> float:
        """Return the time limit of any response: that of the settings, plus a margin for a small machine."""
        return 3.0 + 2.0 if self.is_timed else PATIENCE_SECONDS


# ``make faults``, ``make test-long`` and ``make test``.
FULL: Final = Effort(times=3, per_second=300.0, is_timed=True)
UNTIMED: Final = Effort(times=3, per_second=300.0, is_timed=False)
SHORT: Final = Effort(times=1, per_second=100.0, is_timed=False)


@dataclass(frozen=True)
class Layout:
    """The parts of a world.

    Args:
        given_postgres: whether the harness runs PostgreSQL instead of the service.
        database_url: the DSN of a PostgreSQL that the fault itself runs; empty for none.
        through_proxy: whether a proxy is between the two; this requires given_postgres.
        standby: whether a given PostgreSQL has a standby, and how it replicates. Without a proxy, the DSN has
            both hosts.
        services: the number of services that share one port; more than one requires given_postgres.
        per_second: the rate of the reports; 0 for the effort's.
        has_load: whether reports arrive at that rate; if not, the fault sends its own.
        has_keys: whether an eighth of the load's reports have an idempotency key.
        has_shop: whether a shop subscribes to every event.
        has_link: whether the primary is in another network, whose link can be taken down; requires a standby.
        settings: further settings of the services, without their prefix.
        server_settings: the settings of a given PostgreSQL.
        disk_mb: the size of a separate disk for the state folder; 0 for none.
        command: the command that starts the service.
    """

    given_postgres: bool = False
    database_url: str = ""
    through_proxy: bool = False
    standby: Literal["", "asynchronous", "synchronous"] = ""
    services: int = 1
    per_second: float = 0.0
    has_load: bool = True
    has_keys: bool = False
    has_shop: bool = False
    has_link: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    server_settings: Mapping[str, str] = field(default_factory=dict)
    disk_mb: int = 0
    command: tuple[str, ...] = COMMAND


class World:
    """The processes, loads and findings of one fault."""

    def __init__(self, layout: Layout, effort: Effort, seed: int, stack: AsyncExitStack, folder: Path) -> None:
        self._stack = stack
        self.layout = layout
        self.effort = effort
        self.folder = folder
        self.state_dir = folder / "state"
        self.chance = random.Random(seed)
        self.violations = Violations()
        self.remarks: list[str] = []
        self.services: list[RunningService] = []
        # The server that the service must use; after a failover, the standby.
        self.server: EmbeddedPostgres | None = None
        self._standby: EmbeddedPostgres | None = None
        # The DSN of a PostgreSQL that the fault itself runs; after a failover, that of the new primary alone.
        self.database_url = layout.database_url
        self.port = _free_port()
        self.connections = Connections(self.port)
        self.journal = Journal(folder / "journal")
        stack.callback(self.journal.close)
        self.loads: list[Load] = []
        self.load = self.new_load("KOM")
        self.load.has_keys = layout.has_keys
        self.link: Link | None = None
        self._shop: Shop | None = None
        # When the database could not be reached: see account.count_recorded_refusals.
        self.outages: list[tuple[float, float]] = []
        self.tail = Tail(self.connections)
        self.operator = Operator(self.port, self._read_logs)
        self.checkpoints = Checkpoints(self.port, self.state_dir)
        # Reports that an operator's server never had or that an operator erased: see account.Exempt.
        self.missing: set[str] = set()
        # Whether readers may be at positions that the log has lost.
        self.may_be_gone = False
        self.erased: set[str] = set()
        # The time limit of each command.
        self.command_seconds_max = PATIENCE_SECONDS
        self._ended_logs: list[str] = []
        shop_settings = shop.SETTINGS if layout.has_shop else {}
        self._settings: dict[str, str] = {
            "LOG_FORMAT": "json",
            "FEATURES": ",".join(SWITCHED),
            **shop_settings,
            **layout.settings,
        }
        if layout.database_url:
            self._settings["DATABASE_URL"] = layout.database_url
        self._proxy: Proxy | None = None
        self._baseline: list[Resources] = []
        self._tail_task: asyncio.Task[None] | None = None
        self._operator_task: asyncio.Task[None] | None = None
        self._checkpoints_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start all parts, and send reports until everything is warm."""
        self.state_dir.mkdir(mode=0o755)
        if self.layout.has_link:
            try:
                self.link = self._stack.enter_context(linked())
            except OSError as error:
                raise SkippedError(f"making network namespaces is not permitted: {error}") from error
        if self.layout.disk_mb:
            await self._mount()
        self._stack.callback(self._end_orphan)
        if self.layout.given_postgres:
            await self._start_postgres()
        for _ in range(self.layout.services):
            service = RunningService(self.state_dir, PORT=str(self.port), **self._settings)
            service.command = self.layout.command
            # The log file is outside the state folder, so that a full disk there does not affect the harness.
            service.log_file = self.folder / service.log_file.name
            self._stack.push_async_callback(in_thread, service.end)
            self.services.append(service)
            await in_thread(service.start)
        self._stack.callback(self.connections.close)
        self._tail_task = self.background(self.tail.follow())
        self._operator_task = self.background(self.operator.watch())
        self._checkpoints_task = self.background(self.checkpoints.watch())
        if self.layout.has_shop:
            receiver = await self._stack.enter_async_context(receiving())
            self._shop = Shop(receiver, self.port)
            await self._shop.subscribe()
        if self.layout.has_load:
            self.background(self.load.run(self.per_second))
            await self.load.recovered()
        self._baseline = self.resources()

    async def _start_postgres(self) -> None:
        settings = {**self.layout.server_settings}
        hosts = [free_address(self.chance), free_address(self.chance)] if self.layout.standby else []
        if self.link is not None:
            hosts = [PRIMARY_ADDRESS, SERVICE_ADDRESS]
        if hosts:
            settings["listen_addresses"] = hosts[0]
        self.server = EmbeddedPostgres(self.state_dir, settings=settings)
        self._stack.push_async_callback(in_thread, self.server.stop)
        if self.link is None:
            await in_thread(self.server.start)
        else:
            await in_thread(self.link.run_beyond, self.server.start)
            await self._admit_network()
        dsn = self.server.dsn
        if hosts:
            await self._start_standby({**settings, "listen_addresses": hosts[1]})
            dsn = f"postgresql://{NAME}@{hosts[0]}:{PORT},{hosts[1]}:{PORT}/{NAME}?target_session_attrs=read-write"
        else:
            self.background(self.server.keep_running(lambda _line: None))
        if self.layout.through_proxy:
            self._proxy = Proxy(self.folder / "proxy", socket_of(self.state_dir))
            await self._proxy.start()
            self._stack.push_async_callback(self._proxy.stop)
            dsn = self._proxy.dsn
        self._settings["DATABASE_URL"] = dsn
        if self.layout.services > 1:
            self._settings["REUSE_PORT"] = "true"

    async def _admit_network(self) -> None:
        with (self.state_dir / "postgres" / "pg_hba.conf").open("a", encoding="utf-8") as file:
            file.write(f"\nhost all all {NETWORK} trust\n")
        connection = await self.connect()
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()

    async def _start_standby(self, settings: dict[str, str]) -> None:
        standby_dir = self.folder / "standby"
        self._standby = await in_thread(make_standby, self.state_dir, standby_dir, settings)
        self._stack.push_async_callback(in_thread, self._standby.stop)
        await in_thread(self._standby.start)
        if self.layout.standby == "synchronous":
            connection = await self.connect()
            for name, value in SYNCHRONOUS.items():
                await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            await connection.execute("SELECT pg_reload_conf()")
            await connection.close()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Note that no append can reach the database during the block."""
        began = time.time()
        yield
        self.outages.append((began, time.time()))

    def at_end(self, work: Callable[[], object]) -> None:
        """Call a function when the world ends, before its services and servers do."""
        self._stack.callback(work)

    def background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a coroutine concurrently, at most until the world ends."""
        task: asyncio.Task[None] = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)
        return task

    async def _mount(self) -> None:
        size = f"size={self.layout.disk_mb}m,mode=755"
        try:
            await _command("mount", "-t", "tmpfs", "-o", size, "order-tracking-faults", str(self.state_dir))
        except OSError as error:
            raise SkippedError(f"mounting a small disk is not permitted: {error}") from error
        self._stack.push_async_callback(_command, "umount", "--lazy", str(self.state_dir))

    def new_load(self, name: str) -> Load:
        """Return a further load, which is included in the account."""
        load = Load(self.connections, self.journal, self.chance, name)
        self._stack.push_async_callback(load.drop)
        self.loads.append(load)
        return load

    @property
    def per_second(self) -> float:
        """Return the rate of the reports."""
        return self.layout.per_second or self.effort.per_second

    @property
    def proxy(self) -> Proxy:
        assert self._proxy is not None
        return self._proxy

    @property
    def primary(self) -> EmbeddedPostgres:
        """The given PostgreSQL that the service began with."""
        assert self.server is not None
        return self.server

    @property
    def standby(self) -> EmbeddedPostgres:
        assert self._standby is not None
        return self._standby

    @property
    def standby_socket(self) -> Path:
        return socket_of(self.folder / "standby")

    @property
    def dsn(self) -> str:
        """Return the DSN of the database itself, without the proxy."""
        if self.database_url:
            return self.database_url
        dsn = self.server.dsn if self.server is not None else running_dsn(self.state_dir)
        assert dsn is not None
        return dsn

    async def connect(self) -> Connection:
        """Return a connection of the harness, which the caller closes."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    return await asyncpg.connect(self.dsn)
                except asyncpg.CannotConnectNowError:
                    # The server may only now notice the end of a killed process.
                    await asyncio.sleep(0.05)

    @property
    def service(self) -> RunningService:
        return self.services[0]

    @property
    def postmaster_pid(self) -> int:
        return self.service.postmaster_pid

    def acknowledged(self) -> list[Acknowledged]:
        """Return every 200 response of every load."""
        return [one for load in self.loads for one in load.acknowledged]

    def resources(self) -> list[Resources]:
        """Return the present resources of each service process."""
        return [Resources.of(service.process.pid, self.port) for service in self.services]

    async def pause(self, least: float = 0.2, most: float = 0.6) -> None:
        """Let the load continue for a random time, which the seed determines."""
        await asyncio.sleep(self.chance.uniform(least, most))

    async def start_service(self, number: int = 0) -> None:
        """Start a service process again, which has ended."""
        self._ended_logs.append(self.services[number].output)
        await in_thread(self.services[number].start)

    def _read_logs(self) -> str:
        return "".join([*self._ended_logs, *(service.output for service in self.services)])

    async def command(self, *arguments: str, **settings: str) -> tuple[int, str]:
        """Run a command of the service on this world's database, and return its exit code and output."""
        run = partial(run_command_for, self.command_seconds_max, self.state_dir)
        ended = await in_thread(partial(run, *arguments, **self._settings | settings))
        return ended.returncode, ended.stdout + ended.stderr

    def expect_in_time(self, holds: bool, line: str) -> None:  # noqa: FBT001 - read as a sentence
        """Check a time limit if this effort is timed."""
        self.violations.expect(holds or not self.effort.is_timed, line)

    async def settle(self, told: Told) -> Count:
        """Wait until all loads have ended, and make the account.

        Args:
            told: what the operator must have learned.
        """
        for load in self.loads:
            await load.finish()
            self.violations.add("orders whose report was never acknowledged", load.unanswered)
        log = await account.read_log(self.dsn)
        await self._end_tail(len(log))
        exempt = Exempt(frozenset(self.missing), frozenset(self.erased))
        # In a thread: for a long log this takes minutes, in which the server closes idle connections.
        found = await in_thread(
            partial(account.compare, exempt=exempt),
            *(log, self.journal.attempts(), self.acknowledged(), self.tail.seen, self.violations),
        )
        refusals = [one for load in self.loads for one in load.refusals]
        times = await account.read_times(self.dsn)
        recorded = account.count_recorded_refusals(log, times, refusals, self.outages, self.violations)
        if recorded:
            self.remarks.append(f"503 but recorded: {recorded} of {len(refusals):,}")
        await self._end(self._checkpoints_task)
        # If other reports are lost, the views cannot reach the head of their log.
        if found.lost <= len(self.missing):
            await account.check_views(log, self.connections, self.violations)
            if self._shop is not None:
                may_pause = bool(self.missing) or self.may_be_gone
                remark = await self._shop.account(self.dsn, log, self.violations, may_pause=may_pause)
                self.remarks.append(remark)
            may_halt = bool(self.missing) or self.may_be_gone
            await self.checkpoints.account(self.dsn, self.command, self.violations, may_halt=may_halt)
            await self._verify()
        account.check_answers(
            self.connections, self.effort.answered_seconds_max, self.violations, may_be_gone=self.may_be_gone
        )
        self.connections.close()
        refused = sum(len(load.refused) for load in self.loads)
        await self._end(self._operator_task)
        await self.operator.account(told, refused, self.violations, was_restarted=bool(self._ended_logs))
        await self._check_resources()
        return found._replace(refused=refused, wrong=self.violations.wrong)

    async def _verify(self) -> None:
        """Compare the views with a replay, and check the installation."""
        code, output = await self.command("replay", "--verify")
        if code:
            self.violations.add_wrong("replay --verify", output.strip().splitlines()[-1:])
        _, output = await self.command("check")
        self.violations.add("findings of check", [line for line in output.splitlines() if "WRONG" in line])

    async def _end_tail(self, events: int) -> None:
        due = time.monotonic() + PATIENCE_SECONDS
        while len(self.tail.seen) < events and time.monotonic() < due:  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.05)
        await self._end(self._tail_task)

    async def _end(self, task: "asyncio.Task[None] | None") -> None:
        assert task is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _check_resources(self) -> None:
        due = time.monotonic() + PATIENCE_SECONDS
        while (above := self._above_baseline()) and time.monotonic() < due:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0.2)
        self.violations.add("resources that do not come back", above)

    def _above_baseline(self) -> list[str]:
        above = []
        for before, now in zip(self._baseline, self.resources(), strict=True):
            if (
                now.memory_mb > before.memory_mb + MEMORY_SLACK_MB
                or now.descriptors > before.descriptors + DESCRIPTORS_SLACK
                or now.threads > before.threads + THREADS_SLACK
                or now.callers > 0
            ):
                above.append(f"{now}, before {before}")
        return above

    def _end_orphan(self) -> None:
        """Kill the PostgreSQL server of a killed service; its data is no longer needed."""
        with suppress(OSError, ValueError, IndexError):
            postmaster = self.postmaster_pid
            command = (Path("/proc") / str(postmaster) / "cmdline").read_bytes()
            if str(self.state_dir).encode() not in command:
                return
            for pid in [postmaster, *children(postmaster)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            until(lambda: not _is_running(postmaster))


@asynccontextmanager
async def open_world(layout: Layout, effort: Effort, seed: int) -> AsyncIterator[World]:
    """Make a world, and remove all of it at the end."""
    async with AsyncExitStack() as stack:
        folder = make_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        world = World(layout, effort, seed, stack, folder)
        await world.start()
        yield world


async def _command(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    if process.returncode != 0:
        raise OSError(said.decode(errors="replace").strip())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
