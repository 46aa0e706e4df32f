"""Connections to PostgreSQL with the service's settings: pooled or dedicated, with time limits.

A server that freezes, or whose host vanishes, closes no connection. So each connection has keepalives, and a
limit for each statement or, if its statements may take long, a watch.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import Context, ContextVar
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias, cast
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakValueDictionary

import asyncpg
import orjson
import structlog
from asyncpg.connect_utils import SessionAttribute

from projections.postgres import Connection, is_connection_lost
from service.dsn import LOCAL_SOCKET, READ_ONLY, Host, read_hosts, read_target

# The server that answered last, by DSN. The next connection begins there.
_last_host: Final[dict[str, Host]] = {}

Connect: TypeAlias = Callable[[], Awaitable[Connection]]
# Called with each new connection, before it is used.
OnConnect: TypeAlias = Callable[[Connection], Awaitable[None]]

# A server that does not answer a connection attempt within this time counts as unreachable.
CONNECT_SECONDS_MAX: Final = 2.0
# The pause between two attempts to reach a server.
RECONNECT_PAUSE_SECONDS: Final = 0.05
# For reads that are not batched: enough for several slow pages, and far below the server's own limit.
POOL_CONNECTIONS_MAX: Final = 8
# How many of them the reads of one API key may use, so that slow ones do not delay all others.
POOL_CONNECTIONS_PER_KEY_MAX: Final = 6
# The name of the key that the present request was admitted by; None for the service's own reads.
READER: Final[ContextVar[str | None]] = ContextVar("reader", default=None)
# At its time limit, a caller closes its connection, but the server may continue the statement for this long.
POOL_SETTINGS: Final = {
    "statement_timeout": "4s",
    # A list reads an index in order, up to the page's limit; a bitmap or a scan would read all rows that match.
    # Until the next ANALYZE, the planner takes the rows of the last hour to be few, and would prefer a bitmap.
    "enable_bitmapscan": "off",
    "enable_seqscan": "off",
    "jit": "off",
}
SERVER_VERSION_MIN: Final = 15
# A firewall between may drop an idle connection silently. After this pause it is probed before it is used, and
# replaced if it does not respond in time. The pool closes connections that are idle for as long.
IDLE_SECONDS_MAX: Final = 30.0
PROBE_SECONDS_MAX: Final = 0.3

# Spelled as the server shows them, because ``_inspect`` compares them.
SERVER_SETTINGS: Final = {
    "application_name": "order-tracking",
    # A cached plan from when the log was empty would stay in use: it took 4.6 ms instead of 0.1 ms.
    "plan_cache_mode": "force_custom_plan",
    "timezone": "UTC",
    # The database's own defaults must reach neither the append nor a rebuild, which takes as long as it takes.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "search_path": "public",
    "idle_session_timeout": "0",
    "lock_timeout": "0",
    "statement_timeout": "0",
    # A cancelled wait for a standby is only a warning.
    "client_min_messages": "notice",
    # A process that is suspended in a transaction must not keep the append lock.
    "idle_in_transaction_session_timeout": "10s",
}

# The server, too, notices that an idle connection is gone. A local socket ignores these.
KEEPALIVES: Final = {"tcp_keepalives_idle": "60", "tcp_keepalives_interval": "10", "tcp_keepalives_count": "3"}

# This side's keepalives, in seconds and a count. The last one is in milliseconds: if the server acknowledges
# nothing for so long, the system gives the connection up. By default it retransmits for a quarter of an hour.
SOCKET_OPTIONS: Final = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 15_000,
}
# A server that works ends a statement at ``statement_timeout``, and reports that. If it has not done so this
# much later, it does not respond any more.
STATEMENT_MARGIN_SECONDS: Final = 2.0
# A connection without ``statement_timeout`` is closed when its server has not responded to so many probes, one
# in each interval.
WATCH_SECONDS: Final = 10.0
WATCH_PROBES: Final = 3
# Asks whether the server has TLS. Any server responds, before it asks for a password or checks its limits.
SSL_REQUEST: Final = bytes.fromhex("00000008 04d2162f")
# A server that does not respond is logged at most once in this interval: all of its connections notice it.
SILENCE_SECONDS: Final = 60.0

# A transaction may last for this much longer than each of its statements. A process that is suspended between
# the parsing and the execution of a statement is in no state that other timeouts limit, and keeps its locks.
TRANSACTION_SECONDS_MORE: Final = 5.0
# The encoding, and the settings that were sent and are not in force. ``transaction_timeout`` cannot be sent,
# since PostgreSQL before 17 does not have it.
INSPECT: Final = """
    SELECT current_setting('server_encoding'),
        ARRAY(SELECT name FROM unnest($1::text[], $2::text[]) AS sent (name, setting)
              WHERE current_setting(name, true) IS DISTINCT FROM setting),
        CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
             THEN set_config('transaction_timeout', $3, false) END
"""
NO_POOLER: Final = "connect to PostgreSQL itself, not through a pooler such as PgBouncer"
IS_ALIVE: Final = "SELECT 1"

# For the few statements that run all the time, each on a dedicated connection: planned once, always with index
# scans, whatever the tables held at that time. Planning them again would cost more than running them.
HOT_SETTINGS: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "statement_timeout": "10s",
}


logger = structlog.get_logger()

# asyncpg's class has parameters only for type checkers.
if TYPE_CHECKING:
    _Connection = asyncpg.Connection[asyncpg.Record]
else:
    _Connection = asyncpg.Connection

# Until when the silence of a server is known, by its address (monotonic clock).
_silent_until: Final[dict[str, float]] = {}


class StorageUnavailableError(ConnectionError):
    """The database cannot be reached, or did not answer in time."""


class TooLateError(StorageUnavailableError):
    """There is no connection, and its caller has too little time left to open one."""


class UnsupportedServerError(StorageUnavailableError):
    """The database can be reached, but this service cannot use it. ``str()`` says what to do."""


# How often a server looks for the client of a running statement. One that has gone leaves a backend that waits
# for a lock, and takes a connection, until its time limit.
CLIENT_CHECK: Final = "100ms"
# A statement may wait for a lock for this much longer than the caller has time: the caller gives up first.
LOCK_SECONDS_MORE: Final = 0.5


async def end_abandoned(connection: Connection, seconds_max: float) -> None:
    """Let the server end a statement soon after its client has gone, or if it waits too long for a lock.

    Args:
        connection: the connection.
        seconds_max: the time limit of the callers.
    """
    lock_milliseconds = round((seconds_max + LOCK_SECONDS_MORE) * 1_000)
    await connection.execute(f"SET lock_timeout = {lock_milliseconds}")
    # A server on Windows refuses it.
    with suppress(asyncpg.InvalidParameterValueError):
        await connection.execute(f"SET client_connection_check_interval = '{CLIENT_CHECK}'")


class LimitedConnection(_Connection):
    """A connection that never waits for a server that does not respond.

    asyncpg would ask the server to cancel a statement whose time is over, and wait until it has. Instead, the
    end of the time, or a cancelled task, closes this connection.

    Attributes:
        server: the server's name, for the log.
        statement_seconds_max: the time limit of each statement.
        is_watched: whether it is closed when its server does not respond, instead of at a time limit.
    """

    server = ""
    statement_seconds_max: float | None = None
    is_watched = False

    def _cancel_current_command(self, *_waiters: object) -> None:
        # Later: asyncpg has not yet raised the error in the statement's caller.
        asyncio.get_running_loop().call_soon(self.terminate)

    def get_reset_query(self) -> str:
        """Return what a pool runs when it gets the connection back: RESET ALL would drop the settings."""
        return "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *"

    def watch(self) -> None:
        """Close the connection when its server does not respond any more."""
        self.is_watched = True
        watching = asyncio.get_running_loop().create_task(self._watch(), context=Context())

        def end(_connection: object) -> None:
            watching.cancel()

        self.add_termination_listener(end)

    async def _watch(self) -> None:
        address = self._addr  # type: ignore[attr-defined]
        failures = 0
        while failures < WATCH_PROBES:
            await asyncio.sleep(WATCH_SECONDS)
            failures = 0 if await _responds(address) else failures + 1
        log_silence(self.server)
        self.terminate()


async def _responds(address: str | tuple[str, int]) -> bool:
    """Return whether a server responds at an address, or the system reports an error without waiting for it."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            if isinstance(address, str):
                reader, writer = await asyncio.open_unix_connection(address)
            else:
                reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(SSL_REQUEST)
                await reader.read(1)
            finally:
                writer.transport.abort()
    except (TimeoutError, BlockingIOError):
        # A local socket whose queue of connections is full blocks.
        return False
    except OSError:
        # The keepalives notice a host that is gone.
        pass
    return True


def log_silence(server: str) -> None:
    """Log that a server does not respond, unless that was logged a moment ago."""
    now = monotonic()
    if now >= _silent_until.get(server, 0.0):
        _silent_until[server] = now + SILENCE_SECONDS
        logger.warning("the database does not respond, so its connections are closed", server=server)


async def connect(dsn: str, on_connect: OnConnect | None = None, /, **settings: str) -> Connection:
    """Open a connection with the service's settings and the given ones.

    Args:
        dsn: the database.
        on_connect: called with the connection. If it fails, so does the attempt to connect.
        settings: further settings of the server. ``statement_timeout`` also limits the wait here.

    Raises:
        StorageUnavailableError: no server of the DSN answered within CONNECT_SECONDS_MAX, was a primary, and
            accepted the connection.
        UnsupportedServerError: the server is too old, the database is not in UTF8, or a pooler drops settings.
    """
    sent = {**SERVER_SETTINGS, **settings}
    # asyncpg takes every parameter of the DSN that it does not know as a setting.
    sent |= {name: value for name, value in parse_qsl(urlsplit(dsn).query) if name in {"role", READ_ONLY}}
    failures = []
    hosts: Sequence[Host | None] = sorted(read_hosts(dsn), key=lambda host: host != _last_host.get(dsn))
    for host in hosts or [None]:
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                connection = await _open(dsn, host, sent, on_connect)
        except UnsupportedServerError:
            raise
        except asyncpg.ProtocolViolationError as error:
            # A pooler without ``ignore_startup_parameters``.
            raise UnsupportedServerError(
                f"{host or LOCAL_SOCKET} refuses a setting ({error}): {NO_POOLER}"
            ) from error
        except (OSError, asyncpg.InternalClientError, asyncpg.InterfaceError, asyncpg.PostgresError) as error:
            # Even a wrong password or an unknown database: an operator may correct it while the service waits.
            failures.append((host, error))
        else:
            if host is not None:
                _last_host[dsn] = host
            return connection
    texts = (f"{host or LOCAL_SOCKET}: {str(error) or 'no answer in time'}" for host, error in failures)
    raise StorageUnavailableError(f"cannot connect to {'; '.join(texts)}") from failures[-1][1]


async def _open(
    dsn: str, host: Host | None, sent: Mapping[str, str], on_connect: OnConnect | None
) -> Connection:
    seconds = read_seconds(sent["statement_timeout"])
    limit = seconds + STATEMENT_MARGIN_SECONDS if seconds else None
    connection = await asyncpg.connect(
        dsn,
        host=host and host.name,
        port=host and host.port,
        target_session_attrs=SessionAttribute(read_target(dsn)),
        server_settings={**KEEPALIVES, **sent},
        command_timeout=limit,
        # A statement that is parsed again may be so under a lock.
        max_cached_statement_lifetime=0,
        connection_class=LimitedConnection,
    )
    connection.server, connection.statement_seconds_max = str(host or LOCAL_SOCKET), limit
    try:
        transport: asyncio.Transport = connection._transport  # type: ignore[attr-defined]  # noqa: SLF001
        _keep_alive(transport.get_extra_info("socket"))
        if limit is None:
            connection.watch()
        await _set_json_codec(connection)
        await _inspect(connection, sent)
        if on_connect is not None:
            await on_connect(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def read_seconds(setting: str) -> float:
    """Return a duration as PostgreSQL shows it, such as 4s or 1min, in seconds."""
    seconds = setting.removesuffix("min").removesuffix("s")
    return float(seconds) * (60 if setting.endswith("min") else 1)


def _keep_alive(end: socket.socket) -> None:
    """Let the system notice that the other end of a connection is gone."""
    if end.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SOCKET_OPTIONS.items():
        # Not every system has each of them.
        if (option := getattr(socket, name, None)) is not None:
            end.setsockopt(socket.IPPROTO_TCP, option, value)


async def _inspect(connection: Connection, sent: Mapping[str, str]) -> None:
    """Refuse a server that this service cannot use.

    Raises:
        UnsupportedServerError: see ``connect``.
    """
    version = connection.get_server_version().major
    if version < SERVER_VERSION_MIN:
        raise UnsupportedServerError(
            f"PostgreSQL {version} is too old: {SERVER_VERSION_MIN} or newer is required"
        )
    seconds = read_seconds(sent["statement_timeout"])
    transaction_timeout = f"{seconds + TRANSACTION_SECONDS_MORE:g}s" if seconds else "0"
    values = list(sent), list(sent.values()), transaction_timeout
    ((encoding, dropped, _),) = await connection.fetch(INSPECT, *values)
    if encoding != "UTF8":
        raise UnsupportedServerError(
            f"the database has the encoding {encoding}: create one with the encoding UTF8 and use that"
        )
    if dropped:
        raise UnsupportedServerError(
            f"the connection lacks settings that were sent ({', '.join(dropped)}): {NO_POOLER}"
        )


@asynccontextmanager
async def connected(dsn: str, **settings: str) -> AsyncIterator[Connection]:
    """Open a connection until the block ends; see ``connect``."""
    connection = await connect(dsn, **settings)
    try:
        yield connection
    except asyncio.CancelledError:
        # A server that does not respond must not delay the end of the process.
        connection.terminate()
        raise
    finally:
        await connection.close()


async def _set_json_codec(connection: Connection) -> None:
    """Let parameters of the type json be any value that orjson can write."""
    await connection.set_type_codec(
        "json",
        schema="pg_catalog",
        encoder=lambda value: orjson.dumps(value).decode(),
        decoder=orjson.loads,
    )


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Raise StorageUnavailableError for every lost connection and every timeout."""
    try:
        yield
    except Exception as error:
        if is_connection_lost(error):
            raise StorageUnavailableError(str(error) or type(error).__name__) from error
        raise


class ConnectionPool:
    """A connection pool for reads. Each use of a connection has a time limit.

    Args:
        dsn: the database.
        seconds_max: the time limit for one use, including the wait for a connection.
        on_connect: called with each new connection.
    """

    def __init__(self, dsn: str, seconds_max: float, on_connect: OnConnect | None = None) -> None:
        self.seconds_max = seconds_max
        # Of the keys whose reads use or await a connection now.
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

        async def connect_for_pool(*_args: object, **_kwargs: object) -> Connection:
            return await connect(dsn, on_connect, **POOL_SETTINGS)

        self._pool: asyncpg.Pool[asyncpg.Record] = asyncpg.create_pool(
            dsn,
            min_size=0,
            max_size=POOL_CONNECTIONS_MAX,
            max_inactive_connection_lifetime=IDLE_SECONDS_MAX,
            connect=connect_for_pool,
        )

    @property
    def idle(self) -> int:
        """How many open connections are idle."""
        return self._pool.get_idle_size()

    @property
    def used(self) -> int:
        """How many connections are in use."""
        return self._pool.get_size() - self._pool.get_idle_size()

    async def open(self) -> None:
        """Make the pool ready. Connections are opened when they are first needed."""
        await self._pool

    @asynccontextmanager
    async def connection(self, seconds_max: float | None = None) -> AsyncIterator[Connection]:
        """Lend a connection.

        Args:
            seconds_max: the time limit, None for the pool's.

        Raises:
            StorageUnavailableError: the time limit was reached, or the connection was lost.
        """
        limit = self.seconds_max if seconds_max is None else seconds_max
        with as_unavailable():
            async with asyncio.timeout(limit), self._share(), self._pool.acquire() as connection:
                try:
                    yield cast("Connection", connection)
                except asyncio.CancelledError:
                    # Between two statements, too: the connection may be in a transaction.
                    connection.terminate()
                    raise

    def _share(self) -> AbstractAsyncContextManager[None]:
        """Return the turns of the reads of one key."""
        name = READER.get()
        if name is None:
            return nullcontext()
        if (share := self._shares.get(name)) is None:
            share = self._shares[name] = asyncio.Semaphore(POOL_CONNECTIONS_PER_KEY_MAX)
        return share

    def close(self) -> None:
        """Close every connection."""
        self._pool.terminate()


class DedicatedConnection:
    """One connection for one purpose, opened when first needed and reopened after a loss.

    Its users take turns.

    Args:
        connect: opens the connection.
        seconds_max: the time limit for one use, including the wait for its turn; None for the connection's own
            limit for each statement alone. With a limit, a lost connection is raised as
            StorageUnavailableError.
        on_open: called when a connection has been opened. After a failover or a restore, the server may lack
            commits that this process has seen, so it drops everything that it remembers of them.
        idle_seconds_max: after a longer pause, the connection is probed before it is used.
    """

    def __init__(
        self,
        connect: Connect,
        seconds_max: float | None = None,
        on_open: Callable[[], None] = lambda: None,
        idle_seconds_max: float = IDLE_SECONDS_MAX,
    ) -> None:
        self._connect = connect
        self._idle_seconds_max = idle_seconds_max
        self._used_at = 0.0
        self._on_open = on_open
        self.times_opened = 0
        # A commit whose wait for its standby was cancelled succeeds with a warning.
        self.warnings = 0
        self._seconds_max = seconds_max
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def connection(
        self, seconds_max: float | None = None, *, open_until: float = inf
    ) -> AsyncIterator[Connection]:
        """Lend the connection. After an error it is rolled back or closed.

        Args:
            seconds_max: the time limit, None for the one of the constructor.
            open_until: the time of the event loop from which on no connection is opened for this use.

        Raises:
            StorageUnavailableError: only with a limit: it was reached, or the connection was lost.
            TooLateError: it is later than ``open_until``.
        """
        limit = self._seconds_max if seconds_max is None else seconds_max
        with nullcontext() if limit is None else as_unavailable():
            async with asyncio.timeout(limit), self._use(open_until) as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self, begin: str = "BEGIN", *, open_until: float = inf) -> AsyncIterator[Connection]:
        """Lend the connection in a transaction: committed at the end of the block, rolled back after an error.

        asyncpg's own context manager would send a ROLLBACK and wait for it even when cancelled.
        """
        async with self.connection(open_until=open_until) as connection:
            await connection.execute(begin)
            yield connection
            await connection.execute("COMMIT")

    @asynccontextmanager
    async def _use(self, open_until: float) -> AsyncIterator[Connection]:
        async with self._turn:
            if self._connection is not None and monotonic() - self._used_at > self._idle_seconds_max:
                await _terminate_if_silent(self._connection)
            if self._connection is None or self._connection.is_closed():
                if asyncio.get_running_loop().time() > open_until:
                    raise TooLateError("too little time is left to open a connection")
                self._connection = await self._connect()
                self._connection.add_log_listener(self._count_warning)
                self.times_opened += 1
                self._on_open()
            connection = self._connection
            is_usable = False
            try:
                yield connection
                is_usable = True
            except Exception as error:
                if isinstance(error, TimeoutError) and isinstance(connection, LimitedConnection):
                    log_silence(connection.server)
                is_lost = is_connection_lost(error) and not isinstance(
                    error, asyncpg.InsufficientPrivilegeError
                )
                if not is_lost and not connection.is_closed():
                    if connection.is_in_transaction():
                        await connection.execute("ROLLBACK")
                    is_usable = True
                raise
            finally:
                self._used_at = monotonic()
                if not is_usable:
                    connection.terminate()

    def _count_warning(self, _connection: object, message: asyncpg.PostgresLogMessage) -> None:
        self.warnings += message.severity_en == "WARNING"

    async def close(self) -> None:
        """Close the connection. A later use opens a new one."""
        if self._connection is not None:
            self._connection.terminate()


async def _terminate_if_silent(connection: Connection) -> None:
    """Terminate a connection on which the server does not respond at once."""
    probe = asyncio.ensure_future(connection.execute(IS_ALIVE))
    try:
        await asyncio.wait([probe], timeout=PROBE_SECONDS_MAX)
    finally:
        if not probe.done() or probe.exception() is not None:
            # First, so that asyncpg does not wait for the server to confirm a cancellation.
            connection.terminate()
            await asyncio.gather(probe, return_exceptions=True)
