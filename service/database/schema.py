"""schema.sql and its migrations: applied to a database, and cut into the log's part and each view's section."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import asyncpg

from projections import current_status, statistics, timeline
from projections.engine import View
from projections.rebuild import CREATE_SCHEMA
from service.database.catalog import first_difference, read_catalog
from service.database.connections import Connection, StorageUnavailableError, connect

SCHEMA_FILE: Final = Path(__file__).resolve().parents[2] / "schema.sql"
MIGRATIONS_FOLDER: Final = Path(__file__).resolve().parent / "migrations"

# Two processes that start on one empty database take turns. The number is the word "SCHEMA" in ASCII.
SCHEMA_LOCK: Final = 0x534348454D41

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
SEARCH: Final = "SELECT set_config('search_path', $1, true)"
BEGIN_PROJECTION: Final = "INSERT INTO projection (position, definition) VALUES (0, $1)"

OWNER_ROLE: Final = "order_tracking_owner"
SERVICE_ROLE: Final = "order_tracking_service"
IS_SERVICE: Final = "SELECT current_user = 'order_tracking_service'"
# The roles are the server's, their rights each database's: a database of one role only has none of them.
MAY_ACT_AS_SERVICE: Final = """
    SELECT pg_has_role(session_user, oid, 'MEMBER')
       AND has_column_privilege(oid, 'public.order_events', 'state', 'INSERT')
    FROM pg_roles WHERE rolname = 'order_tracking_service'
"""
MAY_ACT_AS_OWNER: Final = """
    SELECT pg_has_role(session_user, roles.oid, 'MEMBER')
    FROM pg_roles AS roles JOIN pg_class ON relowner = roles.oid
    WHERE rolname = 'order_tracking_owner' AND pg_class.oid = 'public.order_events'::regclass
"""
MAY_MAKE_SCHEMAS: Final = """
    SELECT has_database_privilege('order_tracking_owner', current_database(), 'CREATE')
        OR NOT has_database_privilege(current_database(), 'CREATE WITH GRANT OPTION')
"""
GRANT_SCHEMAS: Final = """
    DO $$ BEGIN
        EXECUTE format('GRANT CREATE ON DATABASE %I TO order_tracking_owner', current_database());
    END $$
"""

_IN_EVERY_VIEW: Final = re.compile(r"^-- in every view\n(?P<tables>.*?)^(?=-- view )", re.MULTILINE | re.DOTALL)
_SECTIONS: Final = re.compile(
    r"^-- view (?P<name>\w+)\n(?P<tables>.*?)^-- keys\n(?P<keys>.*?)(?=^-- view |^-- end)",
    re.MULTILINE | re.DOTALL,
)


class SchemaError(Exception):
    """The database's schema is not one that this release can work with."""


def read_schema(text: str) -> tuple[str, tuple[View, ...]]:
    """Return the log's part of schema.sql and the views, each with its own section."""
    sections = {match["name"]: match for match in _SECTIONS.finditer(text)}
    shared = _IN_EVERY_VIEW.search(text)
    if shared is None:
        raise SchemaError("schema.sql has no section of every view")
    views = tuple(
        View(
            name=module.NAME,
            fold_version=module.FOLD_VERSION,
            tables_sql=shared["tables"] + sections[module.NAME]["tables"],
            keys_sql=sections[module.NAME]["keys"],
            tables=module.TABLES,
            apply=module.apply,
            copy=module.copy,
            page_events_max=module.PAGE_EVENTS_MAX,
            rest_seconds=module.REST_SECONDS,
        )
        for module in (current_status, timeline, statistics)
    )
    return text[: shared.start()], views


LOG_SQL, VIEWS = read_schema(SCHEMA_FILE.read_text(encoding="utf-8"))
# What makes the roles stands first, and may be run again.
ROLES_SQL: Final = LOG_SQL.partition("CREATE TABLE")[0]


class Migration(NamedTuple):
    """One step of the schema: the version that it leads to, its file's name, and its text.

    The text of version 1, the baseline, is the catalog of its database. That of every later one is SQL.
    """

    version: int
    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The hash that a database keeps of a migration once it is applied."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_migrations(folder: Path) -> tuple[Migration, ...]:
    """Return the migrations of a folder by version: 0001_baseline.txt, 0002_what_it_does.sql, and so on."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".txt", ".sql"))
    return tuple(Migration(int(file.name[:4]), file.name, file.read_text(encoding="utf-8")) for file in files)


MIGRATIONS: Final = read_migrations(MIGRATIONS_FOLDER)
SCHEMA_VERSION: Final = MIGRATIONS[-1].version


async def apply_schema(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring a database to this release's schema, in one transaction: all of it, or the migrations it lacks.

    Args:
        connection: of a role that may do so; for migrations, of the log's owner.
        migrations: every version of the schema, the baseline first.

    Raises:
        SchemaError: the database is newer than this release, or its schema is not that of a release.
    """
    async with connection.transaction():
        # Whoever runs this, unqualified names must mean the schema public.
        await connection.execute(SEARCH, "public")
        await connection.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
        is_new = not await connection.fetchval(IS_APPLIED)
        try:
            if is_new:
                await connection.execute(LOG_SQL)
                await _record(connection, migrations)
            else:
                await _migrate(connection, migrations)
        except asyncpg.PostgresError as error:
            what = "schema.sql" if is_new else "a migration"
            raise SchemaError(f"{what} cannot be applied to this database: {error}") from error
        if await connection.fetchval(MAY_ACT_AS_SERVICE):
            await _grant_database(connection)
            await connection.execute(ACT_AS, SERVICE_ROLE)
        # A view that is new in this release is empty and of no definition, so that it is rebuilt at start.
        existing = {name for (name,) in await connection.fetch(SCHEMAS)}
        missing = [view for view in VIEWS if view.name not in existing]
        await _make_views(connection, missing, None if is_new else "")


async def act_as_owner(connection: Connection) -> None:
    """Act as the owner of the log, to the end of the transaction, where this role may.

    Else it is the owner itself, or is refused what it asks.
    """
    await connection.execute(ACT_AS, OWNER_ROLE if await connection.fetchval(MAY_ACT_AS_OWNER) else "none")


async def _migrate(connection: Connection, migrations: Sequence[Migration]) -> None:
    version = await _version(connection, migrations)
    missing = [migration for migration in migrations if migration.version > version]
    for migration in missing:
        await act_as_owner(connection)
        await connection.execute(migration.text)
        await connection.execute(ACT_AS, "none")
    if missing:
        await _record(connection, migrations)


async def _record(connection: Connection, migrations: Sequence[Migration]) -> None:
    await connection.executemany(RECORD_VERSION, [(one.version, one.sha256) for one in migrations])


async def _grant_database(connection: Connection) -> None:
    """Grant what belongs to the database itself, which neither a dump nor a template carries along."""
    if not await connection.fetchval(MAY_MAKE_SCHEMAS):
        await connection.execute(GRANT_SCHEMAS)


async def service_dsn(dsn: str) -> str:
    """Return the DSN by which the service connects: as its own role, where there is one and this one may.

    Raises:
        SchemaError: the database has no schema, or a newer one.
    """
    connection = await connect(dsn)
    try:
        await check_version(connection)
        if await connection.fetchval(IS_SERVICE) or not await connection.fetchval(MAY_ACT_AS_SERVICE):
            return dsn
    finally:
        await connection.close()
    return await _own_login(dsn) or as_role(dsn, SERVICE_ROLE)


async def _own_login(dsn: str) -> str | None:
    """Return the DSN of the service's own login, where a socket lets it in; from that there is no way back."""
    if urlsplit(dsn).hostname is not None:
        return None
    own = re.sub(r"(?<=[?&]user=)[^&]*", SERVICE_ROLE, dsn)
    try:
        connection = await connect(own)
    except StorageUnavailableError:
        return None
    is_service = await connection.fetchval(IS_SERVICE)
    await connection.close()
    return own if is_service else None


def as_role(dsn: str, role: str) -> str:
    """Return a DSN whose connections act as a role; what they may do is then the role's."""
    return f"{dsn}{'&' if '?' in dsn else '?'}role={role}"


async def check_version(connection: Connection) -> None:
    """Compare the database's schema with this release's.

    Raises:
        SchemaError: the database has no schema, or not this release's.
    """
    if not await connection.fetchval(IS_APPLIED):
        raise SchemaError("the database has no schema yet: run 'serve' or 'migrate' to create it")
    if (found := await _version(connection, MIGRATIONS)) < SCHEMA_VERSION:
        raise SchemaError(f"the database has schema version {found}: 'migrate' brings it to {SCHEMA_VERSION}")


async def _version(connection: Connection, migrations: Sequence[Migration]) -> int:
    """Return the schema version of a database whose schema is that of a release."""
    applied: dict[int, str | None] = dict([tuple(row) for row in await connection.fetch(APPLIED)])
    known = migrations[-1].version
    found = max(applied, default=None)
    if found is None or found > known:
        raise SchemaError(
            f"the database has schema version {found}, this release knows up to {known}: "
            "use the release that made it, or a newer one"
        )
    baseline = migrations[0]
    if found == baseline.version and applied[found] is None:
        difference = first_difference(baseline.text.splitlines(), await read_catalog(connection))
        if difference is not None:
            raise _unreleased(f"{difference} is missing or differs from the first release's")
        return found
    for migration in migrations[:found]:
        if applied.get(migration.version) != migration.sha256:
            raise _unreleased(f"it was not made by this release's {migration.name}")
    return found


def _unreleased(difference: str) -> SchemaError:
    return SchemaError(
        f"the database's schema is that of no release ({difference}): run the code that made it, or set "
        "ORDER_TRACKING_STATE_DIR or ORDER_TRACKING_DATABASE_URL to another, empty database"
    )


async def _make_views(connection: Connection, views: Sequence[View], definition: str | None) -> None:
    for view in views:
        await connection.execute(CREATE_SCHEMA, view.name)
        await connection.execute(SEARCH, view.name)
        await connection.execute(view.tables_sql)
        await connection.execute(view.keys_sql)
        await connection.execute(BEGIN_PROJECTION, view.definition if definition is None else definition)
    await connection.execute(SEARCH, "public")
