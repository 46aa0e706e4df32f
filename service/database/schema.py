"""The log's part of schema.sql, its migrations, and the views' tables: applied to a database."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import asyncpg

from projections.postgres import Connection
from projections.views import LOG_SQL, VIEWS
from service.database.catalog import first_difference, read_catalog
from service.database.connections import (
    RECONNECT_PAUSE_SECONDS,
    StorageUnavailableError,
    UnsupportedServerError,
    connected,
)
from service.database.log_identity import LOG_ID, MAKE_LOG_ID, MOVED_TO, moved
from service.database.sequences import require_rising_numbers
from service.errors import OperatorError

MIGRATIONS_FOLDER: Final = Path(__file__).resolve().parent / "migrations"
# How long a start waits for an unreachable database, such as one that starts at the same time.
START_SECONDS_MAX: Final = 30.0
# The pause between two attempts grows to this: a rejected login is a line in the server's log each time.
START_PAUSE_SECONDS_MAX: Final = 1.0
# The server or the network has ended the connection.
ENDED: Final = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InterfaceError)

# Processes that start on one database at once take turns. The number is the word "SCHEMA" in ASCII.
SCHEMA_LOCK: Final = 0x534348454D41

# A migration that waits longer for a table, such as for a pg_dump, gives way and is tried again: webhooks wait
# behind it.
LIMIT_LOCKS: Final = "SET LOCAL lock_timeout = '1s'"
TAKE_SCHEMA_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"
IS_APPLIED: Final = "SELECT to_regclass('public.schema_version') IS NOT NULL"
SCHEMAS: Final = "SELECT nspname FROM pg_namespace"
# Version 1 had no column for the hash.
APPLIED: Final = """
    SELECT version, to_jsonb(schema_version) ->> 'sha256' FROM public.schema_version ORDER BY version
"""
ACT_AS: Final = "SELECT set_config('role', $1, true)"
RECORD_VERSION: Final = """
    INSERT INTO public.schema_version (version, sha256) VALUES ($1, $2)
    ON CONFLICT (version) DO UPDATE SET sha256 = excluded.sha256
"""
HAS_VIEW_NAMES: Final = "SELECT array_agg(view_name) @> $1 FROM public.view_names"
ADD_VIEW_NAMES: Final = "INSERT INTO public.view_names SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
SET_SEARCH_PATH: Final = "SELECT set_config('search_path', $1, true)"
CLEAR_DEFINITION: Final = "UPDATE projection SET definition = ''"
# The service's role may not create schemas. This function creates that of a view as the owner.
CREATE_VIEW_SCHEMA: Final = "SELECT public.make_view_schema($1)"
INSERT_PROJECTION: Final = "INSERT INTO projection (position, definition) VALUES (0, $1)"

OWNER_ROLE: Final = "order_tracking_owner"
SERVICE_ROLE: Final = "order_tracking_service"
IS_SERVICE: Final = "SELECT current_user = 'order_tracking_service'"
# Roles belong to the server, rights to a database: the service's role may exist without rights in this one.
# The role may exist for another database of the server, without rights in this one.
MAY_ACT_AS_SERVICE: Final = """
    SELECT pg_has_role(session_user, oid, 'MEMBER')
       AND has_table_privilege(oid, 'public.order_events', 'SELECT')
    FROM pg_roles WHERE rolname = 'order_tracking_service'
"""
MAY_APPEND: Final = """
    SELECT bool_and(has_column_privilege('public.order_events', name, 'INSERT'))
    FROM unnest(ARRAY['originator_id', 'originator_version', 'topic', 'state']) AS name
"""
GRANT_APPEND: Final = (
    "GRANT INSERT (originator_id, originator_version, topic, state) ON order_events TO order_tracking_service"
)
MAY_ACT_AS_OWNER: Final = """
    SELECT pg_has_role(session_user, roles.oid, 'MEMBER')
    FROM pg_roles AS roles JOIN pg_class ON relowner = roles.oid
    WHERE rolname = 'order_tracking_owner' AND pg_class.oid = 'public.order_events'::regclass
"""
MAY_MAKE_LOG_ID: Final = "SELECT has_table_privilege('public.log_identity', 'INSERT')"
MAY_CREATE_SCHEMAS: Final = """
    SELECT has_database_privilege('order_tracking_owner', current_database(), 'CREATE')
        OR NOT has_database_privilege(current_database(), 'CREATE WITH GRANT OPTION')
"""
GRANT_SCHEMAS: Final = """
    DO $$ BEGIN
        EXECUTE format('GRANT CREATE ON DATABASE %I TO order_tracking_owner', current_database());
    END $$
"""


class SchemaError(OperatorError):
    """This release cannot work with the database's schema. ``str()`` says what to do."""


class OldSchemaError(SchemaError):
    """The database has no schema yet, or an older one than this release's."""


class OldReplicaError(StorageUnavailableError):
    """A database that is only read has an older schema, which its primary may be about to replace."""


# The statements that create the roles come first, and can be repeated.
ROLES_SQL: Final = LOG_SQL.partition("CREATE TABLE")[0]


class Migration(NamedTuple):
    """One version of the schema: its number, its file's name, and the file's text.

    The text of version 1, the baseline, is a database's catalog (see catalog.py); every later text is SQL.
    """

    version: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The hash that a database records for an applied migration."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_migrations(folder: Path) -> tuple[Migration, ...]:
    """Return a folder's migrations by version: 0001_baseline.txt, 0002_what_it_does.sql, and so on."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".txt", ".sql"))
    return tuple(Migration(int(file.name[:4]), file.name, file.read_text(encoding="utf-8")) for file in files)


MIGRATIONS: Final = read_migrations(MIGRATIONS_FOLDER)
SCHEMA_VERSION: Final = MIGRATIONS[-1].version


async def prepare_database(
    dsn: str,
    seconds_max: float = START_SECONDS_MAX,
    on_failure: Callable[[StorageUnavailableError], object] = lambda _: None,
    *,
    is_reader: bool = False,
) -> str:
    """Wait for the database, bring its schema up to date, and return the DSN that the service connects with.

    Args:
        dsn: the configured DSN.
        seconds_max: how long to wait for an unreachable database.
        on_failure: called for each failed attempt, after which there is another one.
        is_reader: only read: wait until another process has brought the schema up to date.

    Raises:
        StorageUnavailableError: the database was unreachable for ``seconds_max``.
        UnsupportedServerError: this release cannot use the server, or positions would not rise.
        SchemaError: this release cannot work with the database's schema.
    """
    deadline = asyncio.get_running_loop().time() + seconds_max
    pause = RECONNECT_PAUSE_SECONDS
    while True:
        try:
            with _ended_as_unavailable():
                if is_reader:
                    return await _reader_dsn(dsn)
                async with connected(dsn) as connection:
                    await apply_schema(connection)
                    await require_rising_numbers(connection)
                return await service_dsn(dsn)
        except UnsupportedServerError:
            raise
        except StorageUnavailableError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise
            on_failure(error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, START_PAUSE_SECONDS_MAX)


@contextmanager
def _ended_as_unavailable() -> Iterator[None]:
    """Raise StorageUnavailableError if the server ends the connection, as when it restarts."""
    try:
        yield
    except ENDED as error:
        raise StorageUnavailableError(str(error)) from error


async def apply_schema(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring a database to this release's schema in one transaction: all of it, or the missing migrations.

    Args:
        connection: a connection whose role may create the schema or, for migrations, act as the log's owner.
        migrations: every version of the schema, the baseline first.

    Raises:
        SchemaError: the database is newer than this release, or its schema does not match any release.
        StorageUnavailableError: another session holds a lock that a migration needs. Nothing was changed.
    """
    async with connection.transaction():
        # Unqualified names must mean the schema public, whatever the role's own search path is.
        await connection.execute(SET_SEARCH_PATH, "public")
        await connection.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
        await connection.execute(LIMIT_LOCKS)
        is_new = not await connection.fetchval(IS_APPLIED)
        try:
            if is_new:
                await connection.execute(LOG_SQL)
                await _record(connection, migrations)
                await connection.execute(MAKE_LOG_ID)
            else:
                await _migrate(connection, migrations)
            await _register_views(connection)
        except asyncpg.LockNotAvailableError as error:
            detail = "another session, such as pg_dump or psql, holds a lock that a migration needs"
            raise StorageUnavailableError(detail) from error
        except ENDED:
            raise
        except asyncpg.PostgresError as error:
            what = "schema.sql" if is_new else "a migration"
            raise SchemaError(f"{what} cannot be applied to this database: {error}") from error
        if await connection.fetchval(MAY_ACT_AS_SERVICE):
            # This right belongs to the database itself: neither a dump nor a template database includes it.
            if not await connection.fetchval(MAY_CREATE_SCHEMAS):
                await connection.execute(GRANT_SCHEMAS)
            await connection.execute(ACT_AS, SERVICE_ROLE)
        await _create_views(connection, is_new=is_new)


async def act_as_owner(connection: Connection) -> None:
    """Act as the log's owner until the end of the transaction, if this role may.

    Otherwise nothing changes: either this role is the owner itself, or PostgreSQL refuses its next statement.
    """
    await connection.execute(ACT_AS, OWNER_ROLE if await connection.fetchval(MAY_ACT_AS_OWNER) else "none")


async def _migrate(connection: Connection, migrations: Sequence[Migration]) -> None:
    version = await _read_version(connection, migrations)
    missing = [migration for migration in migrations if migration.version > version]
    for migration in missing:
        await act_as_owner(connection)
        await connection.execute(migration.text)
        await connection.execute(ACT_AS, "none")
    if missing:
        await _record(connection, migrations)
    if await connection.fetchval(LOG_ID) is None:
        await act_as_owner(connection)
        if not await connection.fetchval(MAY_MAKE_LOG_ID):
            raise SchemaError("the log has no id, as after a restore: run 'migrate' to make one")
        await connection.execute(MAKE_LOG_ID)
        await connection.execute(ACT_AS, "none")


async def _register_views(connection: Connection) -> None:
    """Let the service create the schemas of all views, also of those that this release adds."""
    names = [view.name for view in VIEWS]
    if await connection.fetchval(HAS_VIEW_NAMES, names):
        return
    await act_as_owner(connection)
    await connection.execute(ADD_VIEW_NAMES, names)
    await connection.execute(ACT_AS, "none")


async def _record(connection: Connection, migrations: Sequence[Migration]) -> None:
    await connection.executemany(RECORD_VERSION, [(one.version, one.sha256) for one in migrations])


async def service_dsn(dsn: str) -> str:
    """Return the DSN that the service connects with: as its own role if this role may act as that role.

    Raises:
        SchemaError: the database has no schema, or not this release's.
    """
    async with connected(dsn) as connection:
        await check_version(connection)
        if await connection.fetchval(IS_SERVICE) or not await connection.fetchval(MAY_ACT_AS_SERVICE):
            return dsn
    own = await _service_login(dsn) or as_role(dsn, SERVICE_ROLE)
    async with connected(own) as connection:
        if not await connection.fetchval(MAY_APPEND):
            raise SchemaError(
                f"the service's role may not append to the log: run, as its owner, {GRANT_APPEND}"
            )
    return own


async def _reader_dsn(dsn: str) -> str:
    try:
        return await service_dsn(dsn)
    except OldSchemaError as error:
        raise OldReplicaError(f"{error}, on the primary: this service only reads") from error


async def _service_login(dsn: str) -> str | None:
    """Return a DSN that logs in as the service's role if a socket admits it: unlike SET ROLE, irreversibly."""
    if urlsplit(dsn).hostname is not None:
        return None
    login = re.sub(r"(?<=[?&]user=)[^&]*", SERVICE_ROLE, dsn)
    try:
        async with connected(login) as connection:
            return login if await connection.fetchval(IS_SERVICE) else None
    except StorageUnavailableError:
        return None


def as_role(dsn: str, role: str) -> str:
    """Return a DSN whose connections act as a role, with that role's rights."""
    return f"{dsn}{'&' if '?' in dsn else '?'}role={role}"


async def check_version(connection: Connection) -> None:
    """Compare the database's schema with this release's.

    Raises:
        SchemaError: the database has no schema, or not this release's, or its log was moved.
    """
    if not await connection.fetchval(IS_APPLIED):
        raise OldSchemaError("the database has no schema yet: run 'serve' or 'migrate' to create it")
    if (version := await _read_version(connection, MIGRATIONS)) < SCHEMA_VERSION:
        raise OldSchemaError(
            f"the database has schema version {version}: run 'migrate' to bring it to {SCHEMA_VERSION}"
        )
    if (destination := await connection.fetchval(MOVED_TO)) is not None:
        raise SchemaError(moved(destination))


async def _read_version(connection: Connection, migrations: Sequence[Migration]) -> int:
    """Return the database's schema version. Raise SchemaError if its schema does not match any release."""
    applied: dict[int, str | None] = dict([tuple(row) for row in await connection.fetch(APPLIED)])
    latest = migrations[-1].version
    version = max(applied, default=None)
    if version is None or version > latest:
        raise SchemaError(
            f"the database has schema version {version}, but this release supports at most {latest}: "
            "use the release that created it, or a newer one"
        )
    baseline = migrations[0]
    if version == baseline.version and applied[version] is None:
        difference = first_difference(baseline.text.splitlines(), await read_catalog(connection))
        if difference is not None:
            raise _unreleased(f"{difference} is missing or differs from the first release")
        return version
    for migration in migrations[:version]:
        if applied.get(migration.version) != migration.sha256:
            raise _unreleased(f"{migration.name} is missing or differs from this release's")
    return version


def _unreleased(difference: str) -> SchemaError:
    return SchemaError(
        f"the database's schema does not match any release ({difference}): run the code that created it, "
        "or set ORDER_TRACKING_STATE_DIR or ORDER_TRACKING_DATABASE_URL to another, empty database"
    )


async def _create_views(connection: Connection, *, is_new: bool) -> None:
    """Create the missing views. In an existing database their definition is empty, so 'serve' rebuilds them."""
    existing = {name for (name,) in await connection.fetch(SCHEMAS)}
    for view in VIEWS:
        if view.name not in existing:
            await connection.execute(CREATE_VIEW_SCHEMA, view.name)
            await connection.execute(SET_SEARCH_PATH, view.name)
            await connection.execute(view.tables_sql)
            if view.indexes_sql:
                await connection.execute(view.indexes_sql)
            await connection.execute(INSERT_PROJECTION, view.definition if is_new else "")
    await connection.execute(SET_SEARCH_PATH, "public")


async def mark_views_outdated(connection: Connection) -> None:
    """Empty the definitions of all views in the present transaction, so that 'serve' rebuilds them.

    The service's role owns the views: its triggers must not run with the rights of the caller.
    """
    await connection.execute(ACT_AS, "none")
    if await connection.fetchval(MAY_ACT_AS_SERVICE):
        await connection.execute(ACT_AS, SERVICE_ROLE)
    for view in VIEWS:
        await connection.execute(SET_SEARCH_PATH, view.name)
        await connection.execute(CLEAR_DEFINITION)
    await connection.execute(SET_SEARCH_PATH, "public")
    await connection.execute(ACT_AS, "none")
