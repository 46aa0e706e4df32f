"""schema.sql: applied once to an empty database, and cut into the log's part and each view's own."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg

from projections import current_status, statistics, timeline
from projections.engine import View
from projections.rebuild import CREATE_SCHEMA
from service.database import Connection, StorageUnavailableError, connect

SCHEMA_FILE: Final = Path(__file__).resolve().parent.parent / "schema.sql"
MIGRATIONS: Final = Path(__file__).resolve().parent / "migrations"

# Two processes that start on one empty database take turns. The number is the word "SCHEMA" in ASCII.
SCHEMA_LOCK: Final = 0x534348454D41

TAKE_SCHEMA_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"
IS_APPLIED: Final = "SELECT to_regclass('public.schema_version') IS NOT NULL"
SCHEMAS: Final = "SELECT nspname FROM pg_namespace"
CURRENT_VERSION: Final = "SELECT max(version) FROM public.schema_version"
ACT_AS: Final = "SELECT set_config('role', $1, true)"
RECORD_VERSION: Final = "INSERT INTO public.schema_version (version) VALUES ($1)"
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


def read_migrations(folder: Path) -> dict[int, str]:
    """Return the migrations by the version that each leads to: files named 0002_what_it_does.sql and so on."""
    return {int(file.name.split("_")[0]): file.read_text(encoding="utf-8") for file in folder.glob("*.sql")}


MIGRATION_SQL: Final = read_migrations(MIGRATIONS)
SCHEMA_VERSION: Final = max(MIGRATION_SQL, default=1)


async def apply_schema(
    connection: Connection, migrations: Mapping[int, str] = MIGRATION_SQL, *, version: int = SCHEMA_VERSION
) -> None:
    """Bring a database to this release's schema, in one transaction: the whole of it, or what is missing.

    Args:
        connection: of whoever may do so; for migrations, the owner of the log.
        migrations: by the version that each leads to.
        version: of this release's schema.

    Raises:
        SchemaError: the database is newer than this release, or something else lies in its place.
    """
    async with connection.transaction():
        # What is run here must be found where it is meant to be, whoever runs it.
        await connection.execute(SEARCH, "public")
        await connection.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
        is_new = not await connection.fetchval(IS_APPLIED)
        try:
            if is_new:
                await connection.execute(LOG_SQL)
                await connection.execute(RECORD_VERSION, version)
            else:
                await _migrate(connection, migrations, version)
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


async def _migrate(connection: Connection, migrations: Mapping[int, str], version: int) -> None:
    found = await _version(connection, version)
    for number in range(found + 1, version + 1):
        await act_as_owner(connection)
        await connection.execute(migrations[number])
        await connection.execute(RECORD_VERSION, number)
        await connection.execute(ACT_AS, "none")


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
    """Compare the database's schema version with this release's.

    Raises:
        SchemaError: there is none, or it is another.
    """
    if not await connection.fetchval(IS_APPLIED):
        raise SchemaError("the database has no schema yet: 'serve' applies it")
    if (found := await _version(connection, SCHEMA_VERSION)) < SCHEMA_VERSION:
        raise SchemaError(f"the database has schema version {found}: 'migrate' brings it to {SCHEMA_VERSION}")


async def _version(connection: Connection, known: int) -> int:
    found: int | None = await connection.fetchval(CURRENT_VERSION)
    if found is None or found > known:
        raise SchemaError(
            f"the database has schema version {found}, this release knows up to {known}: "
            "use the release that made it, or a newer one"
        )
    return found


async def _make_views(connection: Connection, views: Sequence[View], definition: str | None) -> None:
    for view in views:
        await connection.execute(CREATE_SCHEMA, view.name)
        await connection.execute(SEARCH, view.name)
        await connection.execute(view.tables_sql)
        await connection.execute(view.keys_sql)
        await connection.execute(BEGIN_PROJECTION, view.definition if definition is None else definition)
    await connection.execute(SEARCH, "public")
