"""Connections to PostgreSQL with the service's settings: pooled or dedicated, with time limits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from math import inf
from time import monotonic
from typing import Final, TypeAlias, cast
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakValueDictionary

import asyncpg
import orjson
from asyncpg.connect_utils import SessionAttribute

from projections.postgres_errors import Connection, is_connection_lost
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

# The encoding, and the settings that were sent and are not in force. ``transaction_timeout`` cannot be sent,
# since PostgreSQL before 17 does not have it.
INSPECT: Final = """
    SELECT current_setting('server_encoding'),
        ARRAY(SELECT name FROM unnest($1::text[], $2::text[]) AS sent (name, setting)
              WHERE current_setting(name, true) IS DISTINCT FROM setting),
        CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
             THEN set_config('transaction_timeout', '0', false) END
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


async def connect(dsn: str, on_connect: OnConnect | None = None, /, **settings: str) -> Connection:
    """Open a connection with the service's settings and the given ones.

    Args:
        dsn: the database.
        on_connect: called with the connection. If it fails, so does the attempt to connect.
        settings: further settings of the server.

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
    connection: Connection = await asyncpg.connect(
        dsn,
        host=host and host.name,
        port=host and host.port,
        target_session_attrs=SessionAttribute(read_target(dsn)),
        server_settings={**KEEPALIVES, **sent},
    )
    try:
        await _set_json_codec(connection)
        await _inspect(connection, sent)
        if on_connect is not None:
            await on_connect(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


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
    ((encoding, dropped, _),) = await connection.fetch(INSPECT, list(sent), list(sent.values()))
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
                    # asyncpg would wait until the server, which may be suspended, confirms the cancellation.
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
        seconds_max: the time limit for one use, including the wait for its turn; None for no limit. With a
            limit, a lost connection is raised as StorageUnavailableError.
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
                if not is_connection_lost(error) and not connection.is_closed():
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
