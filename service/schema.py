"""schema.sql: applied once to an empty database, and cut into the log's part and each view's own."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import asyncpg

from projections import current_status, timeline
from projections.engine import View
from service.database import Connection

SCHEMA_FILE: Final = Path(__file__).resolve().parent.parent / "schema.sql"
SCHEMA_VERSION: Final = 1

# Two processes that start on one empty database take turns. The number is the word "SCHEMA" in ASCII.
SCHEMA_LOCK: Final = 0x534348454D41

TAKE_SCHEMA_LOCK: Final = "SELECT pg_advisory_xact_lock($1)"
IS_APPLIED: Final = "SELECT to_regclass('public.schema_version') IS NOT NULL"
SCHEMAS: Final = "SELECT nspname FROM pg_namespace"
CURRENT_VERSION: Final = "SELECT max(version) FROM public.schema_version"
RECORD_VERSION: Final = "INSERT INTO public.schema_version (version) VALUES ($1)"
BEGIN_PROJECTION: Final = "INSERT INTO projection (position, definition) VALUES (0, $1)"

_SECTIONS: Final = re.compile(
    r"^-- view (?P<name>\w+)\n(?P<tables>.*?)^-- keys\n(?P<keys>.*?)(?=^-- view |^-- end)",
    re.MULTILINE | re.DOTALL,
)


class SchemaError(Exception):
    """The database's schema is not one that this release can work with."""


def read_schema(text: str) -> tuple[str, tuple[View, ...]]:
    """Return the log's part of schema.sql and the views, each with its own section."""
    sections = {match["name"]: match for match in _SECTIONS.finditer(text)}
    views = tuple(
        View(
            name=module.NAME,
            fold_version=module.FOLD_VERSION,
            tables_sql=sections[module.NAME]["tables"],
            keys_sql=sections[module.NAME]["keys"],
            tables=module.TABLES,
            apply=module.apply,
            copy=module.copy,
        )
        for module in (current_status, timeline)
    )
    first_section = _SECTIONS.search(text)
    if first_section is None:
        raise SchemaError("schema.sql has no section of a view")
    return text[: first_section.start()], views


LOG_SQL, VIEWS = read_schema(SCHEMA_FILE.read_text(encoding="utf-8"))


async def apply_schema(connection: Connection) -> bool:
    """Apply schema.sql where no schema is yet, in one transaction; return whether it was applied.

    Raises:
        SchemaError: the database is newer than this release, or something else lies in its place.
    """
    async with connection.transaction():
        await connection.execute(TAKE_SCHEMA_LOCK, SCHEMA_LOCK)
        if await connection.fetchval(IS_APPLIED):
            await check_version(connection)
            # A view that is new in this release: empty, and of no definition, so that it is rebuilt at start.
            existing = {name for (name,) in await connection.fetch(SCHEMAS)}
            await _make_views(connection, [view for view in VIEWS if view.name not in existing], "")
            return False
        try:
            await connection.execute(LOG_SQL)
            await _make_views(connection, VIEWS, None)
        except asyncpg.PostgresError as error:
            raise SchemaError(f"schema.sql cannot be applied to this database: {error}") from error
        await connection.execute(RECORD_VERSION, SCHEMA_VERSION)
        return True


async def check_version(connection: Connection) -> None:
    """Compare the database's schema version with this release's.

    Raises:
        SchemaError: there is none, or it is newer.
    """
    if not await connection.fetchval(IS_APPLIED):
        raise SchemaError("the database has no schema yet: 'serve' applies it")
    version = await connection.fetchval(CURRENT_VERSION)
    if version is None or version > SCHEMA_VERSION:
        raise SchemaError(
            f"the database has schema version {version}, this release knows up to {SCHEMA_VERSION}: "
            "use the release that made it, or a newer one"
        )


async def _make_views(connection: Connection, views: Sequence[View], definition: str | None) -> None:
    for view in views:
        await connection.execute(f"CREATE SCHEMA {view.name}; SET LOCAL search_path TO {view.name}")
        await connection.execute(view.tables_sql)
        await connection.execute(view.keys_sql)
        await connection.execute(BEGIN_PROJECTION, view.definition if definition is None else definition)
    await connection.execute("SET LOCAL search_path TO DEFAULT")
