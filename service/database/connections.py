"""Connections to PostgreSQL: how one is made, when it counts as lost, and how it is left."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final, TypeAlias, cast
from urllib.parse import urlsplit

import asyncpg
import orjson

from projections.engine import CONTENT_SQLSTATES

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connect: TypeAlias = Callable[[], Awaitable[Connection]]

# A server that does not answer in this time is as good as gone.
CONNECT_SECONDS_MAX: Final = 2.0
# Between two attempts to reach a server that is not there.
RECONNECT_PAUSE_SECONDS: Final = 0.05
# For the reads that are not gathered: enough for some slow pages, few beside the server's own limit.
POOL_CONNECTIONS_MAX: Final = 8
# A reader that gave up has ended its connection, which the server notices only when it next writes to it.
POOL_STATEMENT_TIMEOUT: Final = "4s"
SERVER_VERSION_MIN: Final = 15

SERVER_SETTINGS: Final = {
    "application_name": "order-tracking",
    # A plan made while the log was empty would be kept for ever: 0.1 ms became 4.6.
    "plan_cache_mode": "force_custom_plan",
    "timezone": "UTC",
    # A process that is stopped in mid-transaction must not keep the append lock from the others.
    "idle_in_transaction_session_timeout": "10s",
}

# For the few statements that are run all the time, each on a held connection: planned once, always by way of
# the keys, whatever the tables held at that time. Planning them anew would cost more than running them.
HOT_SETTINGS: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "statement_timeout": "10s",
}

# The connection, the server, its resources or its settings failed, a conflict or a lock ended ours: none of it
# has to do with what was asked, and each may be mended by trying again, at once or when an operator has acted.
_LOST_SQLSTATES: Final = ("08", "25", "28", "3D", "40", "42501", "53", "55", "57", "58", "XX")


class StorageUnavailableError(ConnectionError):
    """The database cannot be reached, or did not answer in time."""


class UnsupportedServerError(Exception):
    """The database server is older than this service supports."""


def is_connection_lost(error: BaseException) -> bool:
    """Tell whether an error leaves open what became of the statement that met it."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(_LOST_SQLSTATES)
    # asyncpg raises InternalClientError as well as the documented ones when the server dies.
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError)


def is_content_refused(error: BaseException) -> bool:
    """Tell whether an error is about the values of a statement, which would meet it again each time."""
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "").startswith(CONTENT_SQLSTATES)
    # Of our own code's errors these alone: they come before anything is sent, and another try after a commit
    # would record twice.
    return isinstance(error, UnicodeError | OverflowError)


async def connect(dsn: str, **settings: str) -> Connection:
    """Open a connection with the settings that every connection of this service has, and the given ones.

    Raises:
        StorageUnavailableError: the server did not answer within CONNECT_SECONDS_MAX, or refused.
        UnsupportedServerError: the server is older than SERVER_VERSION_MIN.
    """
    try:
        async with asyncio.timeout(CONNECT_SECONDS_MAX):
            connection = await asyncpg.connect(dsn, server_settings={**SERVER_SETTINGS, **settings})
            await _take_json(connection)
    except (OSError, asyncpg.InternalClientError, asyncpg.InterfaceError, asyncpg.PostgresError) as error:
        # A wrong password or an unknown database may be mended by an operator like all the rest.
        parts = urlsplit(dsn)
        where = f"{parts.hostname}:{parts.port or 5432}" if parts.hostname else "its socket"
        raise StorageUnavailableError(f"at {where}: {error or 'no answer in time'}") from error
    version = connection.get_server_version().major
    if version < SERVER_VERSION_MIN:
        await connection.close()
        raise UnsupportedServerError(
            f"PostgreSQL {version} is too old: {SERVER_VERSION_MIN} or newer is needed"
        )
    return connection


async def _take_json(connection: Connection) -> None:
    """Let a parameter of type json be whatever orjson can write."""
    try:
        await connection.set_type_codec(
            "json",
            schema="pg_catalog",
            encoder=lambda value: orjson.dumps(value).decode(),
            decoder=orjson.loads,
        )
    except BaseException:
        connection.terminate()
        raise


def open_pool(dsn: str) -> Pool:
    """Return a pool that opens connections as they are needed; ``await`` it once before use."""

    async def connect_for_pool(*_args: object, **_kwargs: object) -> Connection:
        return await connect(dsn, statement_timeout=POOL_STATEMENT_TIMEOUT)

    pool: Pool = asyncpg.create_pool(dsn, min_size=0, max_size=POOL_CONNECTIONS_MAX, connect=connect_for_pool)
    return pool


@asynccontextmanager
async def borrowed(pool: Pool, seconds_max: float) -> AsyncIterator[Connection]:
    """Lend a connection of the pool for at most ``seconds_max`` seconds, waiting included.

    Raises:
        StorageUnavailableError: the time is over, or the connection was lost.
    """
    with _told_as_unavailable():
        async with asyncio.timeout(seconds_max), pool.acquire() as connection:
            try:
                yield cast("Connection", connection)
            except asyncio.CancelledError:
                # asyncpg would wait for its cancellation to be answered, by a server that may be stopped.
                connection.terminate()
                raise


@contextmanager
def _told_as_unavailable() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_connection_lost(error):
            raise StorageUnavailableError(str(error) or type(error).__name__) from error
        raise


class HeldConnection:
    """One connection for one purpose: opened when first needed, and anew after it was lost.

    The users of a held connection take turns.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Connection]:
        """Lend the connection; leave no transaction open, and no connection that is in doubt."""
        async with self._turn:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect()
            connection = self._connection
            try:
                yield connection
            except Exception as error:
                await self._leave(connection, error)
                raise
            except BaseException:
                connection.terminate()
                raise

    @asynccontextmanager
    async def lent(self, seconds_max: float) -> AsyncIterator[Connection]:
        """Lend the connection for at most ``seconds_max`` seconds, waiting included.

        Raises:
            StorageUnavailableError: the time is over, or the connection was lost.
        """
        with _told_as_unavailable():
            async with asyncio.timeout(seconds_max), self.use() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self, begin: str = "BEGIN") -> AsyncIterator[Connection]:
        """Lend the connection in a transaction: committed at the end, undone after an error.

        asyncpg's own context manager would send a ROLLBACK and wait for it even when cancelled.
        """
        async with self.use() as connection:
            await connection.execute(begin)
            yield connection
            await connection.execute("COMMIT")

    async def _leave(self, connection: Connection, error: Exception) -> None:
        if is_connection_lost(error) or connection.is_closed():
            connection.terminate()
        elif connection.is_in_transaction():
            try:
                await connection.execute("ROLLBACK")
            except BaseException:
                connection.terminate()
                raise

    async def close(self) -> None:
        """End the connection; a later use would open another."""
        if self._connection is not None and not self._connection.is_closed():
            self._connection.terminate()
        self._connection = None
