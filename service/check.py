"""Whether everything is in order: what would be noticed too late otherwise."""

from typing import Final, NamedTuple

import asyncpg

from projections.engine import view_state
from service.database import Connection, StorageUnavailableError, UnsupportedServerError, connect
from service.schema import SCHEMA_VERSION, VIEWS, SchemaError, check_version

TRIGGERS: Final = """
    SELECT tgname, tgenabled FROM pg_trigger
    WHERE tgrelid = 'public.order_events'::regclass AND NOT tgisinternal
"""
EXPECTED_TRIGGERS: Final = ("order_events_immutable", "order_events_kept")
ALWAYS: Final = b"A"
SERVER_VERSION: Final = "SHOW server_version"
DURABILITY: Final = """
    SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')
"""


class Finding(NamedTuple):
    """One thing that was looked at."""

    is_ok: bool
    text: str


def _ok(text: str) -> Finding:
    return Finding(is_ok=True, text=text)


def _wrong(text: str) -> Finding:
    return Finding(is_ok=False, text=text)


async def check(dsn: str) -> list[Finding]:
    """Look at the database and what lies in it; the settings were read before."""
    try:
        connection = await connect(dsn)
    except (StorageUnavailableError, UnsupportedServerError, asyncpg.PostgresError) as error:
        return [_wrong(f"the database cannot be used: {error}")]
    try:
        findings = [_ok(f"PostgreSQL {await connection.fetchval(SERVER_VERSION)} answers")]
        findings += [
            Finding(is_ok=setting == "on", text=f"{name} is {setting}")
            for name, setting in await connection.fetch(DURABILITY)
        ]
        try:
            await check_version(connection)
        except SchemaError as error:
            return [*findings, _wrong(str(error))]
        findings.append(_ok(f"the schema has version {SCHEMA_VERSION}"))
        return [*findings, *await _check_triggers(connection), *await _check_views(connection)]
    finally:
        await connection.close()


async def _check_triggers(connection: Connection) -> list[Finding]:
    enabled = {row["tgname"]: row["tgenabled"] for row in await connection.fetch(TRIGGERS)}
    return [
        _ok(f"trigger {name} keeps the log immutable")
        if enabled.get(name) == ALWAYS
        else _wrong(f"trigger {name} is not ENABLE ALWAYS: the log can be changed")
        for name in EXPECTED_TRIGGERS
    ]


async def _check_views(connection: Connection) -> list[Finding]:
    findings = []
    for view in VIEWS:
        await connection.execute("SELECT set_config('search_path', $1, false)", view.name)
        try:
            state = await view_state(connection)
        except asyncpg.UndefinedTableError:
            findings.append(_wrong(f"the view {view.name} is missing: 'serve' makes it"))
            continue
        if state.definition != view.definition:
            findings.append(_wrong(f"the view {view.name} is outdated: 'replay' rebuilds it"))
        elif state.sets_aside:
            findings.append(_wrong(f"the view {view.name} has orders set aside: 'replay' heals it"))
        else:
            findings.append(_ok(f"the view {view.name} is at position {state.position}"))
    return findings
