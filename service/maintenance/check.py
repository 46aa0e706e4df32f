"""Whether everything is in order: what would be noticed too late otherwise."""

from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import asyncpg

from projections.engine import OutdatedViewError, view_state
from service.database.connections import Connection, StorageUnavailableError, UnsupportedServerError, connect
from service.database.schema import SCHEMA_VERSION, VIEWS, SchemaError, check_version, service_dsn
from service.http.access import all_keys
from service.settings import Settings

TRIGGERS: Final = """
    SELECT tgname, tgenabled FROM pg_trigger
    WHERE tgrelid = 'public.order_events'::regclass AND NOT tgisinternal
"""
EXPECTED_TRIGGERS: Final = ("order_events_immutable", "order_events_kept")
ALWAYS: Final = b"A"
SERVER_VERSION: Final = "SHOW server_version"
# A right to one of the columns is a right to forge.
ROLE: Final = """
    SELECT current_user::text,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user),
           (SELECT pg_has_role(relowner, 'MEMBER') FROM pg_class WHERE oid = 'public.order_events'::regclass),
           has_table_privilege('public.order_events', 'UPDATE, DELETE, TRUNCATE'),
           has_column_privilege('public.order_events', 'notification_id', 'INSERT')
           OR has_column_privilege('public.order_events', 'recorded_at', 'INSERT'),
           (SELECT has_database_privilege(relowner, current_database(), 'CREATE') FROM pg_class
            WHERE oid = 'public.order_events'::regclass),
           session_user = current_user
"""
ARE_TABLES: Final = """
    SELECT count(*) FROM unnest($1::text[]) AS name JOIN pg_class ON oid = to_regclass(name) AND relkind = 'r'
"""
DURABILITY: Final = """
    SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit')
"""


class Finding(NamedTuple):
    """One thing that was looked at; ``note`` is something that is open, and may be meant to be."""

    kind: Literal["ok", "note", "WRONG"]
    text: str


def _ok(text: str) -> Finding:
    return Finding("ok", text)


def _note(text: str) -> Finding:
    return Finding("note", text)


def _wrong(text: str) -> Finding:
    return Finding("WRONG", text)


def check_settings(settings: Settings) -> list[Finding]:
    """Look at what the settings leave open; whether each is one was looked at when they were read."""
    count = len(settings.webhook_tokens)
    if count:
        return [_ok(f"the webhook asks for a token; {count} {'is' if count == 1 else 'are'} good")]
    if settings.webhook_hmac_secret:
        return [_ok("the webhook asks for a signature")]
    if settings.is_local:
        return [_note("the webhook is open to this machine: ORDER_TRACKING_WEBHOOK_TOKENS is not set")]
    return [_wrong("the webhook is open to whoever reaches it: set ORDER_TRACKING_WEBHOOK_TOKENS")]


def place(settings: Settings, dsn: str) -> Finding:
    """Say which database is looked at, and how else to enter it."""
    if settings.database_url:
        return _ok("the database is that of ORDER_TRACKING_DATABASE_URL")
    return _ok(f"the database is the one in {settings.state_dir}; while it runs: psql '{dsn}'")


async def check(dsn: str) -> list[Finding]:
    """Look at the database and what lies in it; the settings were read before."""
    try:
        connection = await connect(dsn)
    except (StorageUnavailableError, UnsupportedServerError, asyncpg.PostgresError) as error:
        return [_wrong(f"the database cannot be used: {error}")]
    try:
        findings = [_ok(f"PostgreSQL {await connection.fetchval(SERVER_VERSION)} answers")]
        findings += [
            (_ok if setting == "on" else _wrong)(f"{name} is {setting}")
            for name, setting in await connection.fetch(DURABILITY)
        ]
        try:
            await check_version(connection)
        except SchemaError as error:
            return [*findings, _wrong(str(error))]
        findings.append(_ok(f"the schema has version {SCHEMA_VERSION}"))
        return [
            *findings,
            *await _check_triggers(connection),
            *await _check_role(dsn),
            *await _check_keys(connection),
            *await _check_views(connection),
        ]
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


async def _check_role(dsn: str) -> list[Finding]:
    """Look at what the role that the service runs as could do to the log."""
    connection = await connect(await service_dsn(dsn))
    try:
        name, is_superuser, owns_log, may_change, may_forge, may_make_views, is_login = (
            await connection.fetch(ROLE)
        )[0]
    finally:
        await connection.close()
    findings = [_ok(f"the service runs as {name}")]
    open_ways = [
        what
        for what, is_open in (
            ("is a superuser", is_superuser),
            ("owns the log and can switch its triggers off", owns_log),
            ("may change or remove events", may_change),
            ("may choose positions and times", may_forge),
        )
        if is_open
    ]
    if open_ways:
        findings.append(_note(f"the log is not protected from the service: {name} {', '.join(open_ways)}"))
    else:
        findings.append(_ok("it can add to the log, and neither change nor remove what is there"))
    if not may_make_views:
        findings.append(
            _wrong("the owner of the log cannot make schemas, so no view can be rebuilt: 'migrate'")
        )
    if not is_login:
        findings.append(
            _note(f"it acts as {name} by SET ROLE, and could take that back: a login of its own could not")
        )
    return findings


async def _check_keys(connection: Connection) -> list[Finding]:
    now = datetime.now(UTC)
    valid = sum(key.is_valid(now) for key in await all_keys(connection))
    return [_ok(f"API keys that are valid: {valid}") if valid else _note("no API key is valid")]


async def _check_views(connection: Connection) -> list[Finding]:
    findings = []
    for view in VIEWS:
        # A view in the place of a table would run what its maker wrote as whoever looks at it.
        tables = [f"{view.name}.projection", f"{view.name}.set_aside"]
        if await connection.fetchval(ARE_TABLES, tables) != len(tables):
            findings.append(_wrong(f"the view {view.name} is missing: 'serve' makes it"))
            continue
        await connection.execute("SELECT set_config('search_path', $1, false)", view.name)
        try:
            state = await view_state(connection)
        except OutdatedViewError:
            findings.append(_wrong(f"the view {view.name} has lost its position: 'serve' rebuilds it"))
            continue
        if state.definition != view.definition:
            findings.append(_wrong(f"the view {view.name} is outdated: 'replay' rebuilds it"))
        elif state.sets_aside:
            findings.append(_wrong(f"the view {view.name} has orders set aside: 'replay' heals it"))
        else:
            findings.append(_ok(f"the view {view.name} is at position {state.position}"))
    return findings
