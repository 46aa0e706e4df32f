"""The check of an installation: settings, database, schema, rights, API keys and views."""

from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple

import asyncpg

from projections.engine import OutdatedViewError, view_state
from projections.postgres_errors import Connection
from service.database.api_keys import list_keys
from service.database.connections import (
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
    connected,
)
from service.database.schema import SCHEMA_VERSION, VIEWS, SchemaError, check_version, service_dsn
from service.settings import Settings

TRIGGERS: Final = """
    SELECT tgname, tgenabled FROM pg_trigger
    WHERE tgrelid = 'public.order_events'::regclass AND NOT tgisinternal
"""
EXPECTED_TRIGGERS: Final = ("order_events_immutable", "order_events_kept")
ALWAYS: Final = b"A"
SERVER_VERSION: Final = "SHOW server_version"
# The rights of the role that the service runs as. A right to insert a position or a time is a right to forge.
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
SELECT_VIEW: Final = "SELECT set_config('search_path', $1, false)"


class Finding(NamedTuple):
    """One result. A note reports something unprotected or missing that may be intended."""

    kind: Literal["ok", "note", "WRONG"]
    text: str


def _ok(text: str) -> Finding:
    return Finding("ok", text)


def _note(text: str) -> Finding:
    return Finding("note", text)


def _wrong(text: str) -> Finding:
    return Finding("WRONG", text)


def check_settings(settings: Settings) -> list[Finding]:
    """Check who may send webhooks. Each setting's own value was checked when it was read."""
    count = len(settings.webhook_tokens)
    if count:
        return [_ok(f"the webhook requires a token; valid tokens: {count}")]
    if settings.webhook_hmac_secret:
        return [_ok("the webhook requires a signature")]
    if settings.is_local:
        return [_note("the webhook is open to this machine: ORDER_TRACKING_WEBHOOK_TOKENS is not set")]
    return [_wrong("the webhook is open to the network: set ORDER_TRACKING_WEBHOOK_TOKENS")]


def describe_database(settings: Settings, dsn: str) -> Finding:
    """Return which database is checked, and how to open it with psql."""
    if settings.database_url:
        return _ok("the database is that of ORDER_TRACKING_DATABASE_URL")
    return _ok(f"the database is the one in {settings.state_dir}; while it runs, open it with: psql '{dsn}'")


async def check_database(dsn: str) -> list[Finding]:
    """Check the database and its content."""
    try:
        connection = await connect(dsn)
    except (StorageUnavailableError, UnsupportedServerError, asyncpg.PostgresError) as error:
        return [_wrong(f"the database cannot be used: {error}")]
    try:
        findings = [_ok(f"PostgreSQL {await connection.fetchval(SERVER_VERSION)} responds")]
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
    """Check what the service's role could do to the log."""
    async with connected(await service_dsn(dsn)) as connection:
        name, is_superuser, owns_log, may_change, may_forge, may_create_views, is_login = (
            await connection.fetch(ROLE)
        )[0]
    findings = [_ok(f"the service runs as {name}")]
    dangers = [
        danger
        for danger, is_present in (
            ("is a superuser", is_superuser),
            ("owns the log and can disable its triggers", owns_log),
            ("may change or remove events", may_change),
            ("may choose positions and times", may_forge),
        )
        if is_present
    ]
    if dangers:
        findings.append(_note(f"the log is not protected from the service: {name} {', '.join(dangers)}"))
    else:
        findings.append(_ok("the service can add to the log, but neither change nor remove events"))
    if not may_create_views:
        findings.append(
            _wrong("the log's owner cannot create schemas, so no view can be rebuilt: run 'migrate'")
        )
    if not is_login:
        findings.append(
            _note(f"the service acts as {name} by SET ROLE, which is reversible: see docs/operations.md")
        )
    return findings


async def _check_keys(connection: Connection) -> list[Finding]:
    now = datetime.now(UTC)
    valid = sum(key.is_valid(now) for key in await list_keys(connection))
    return [_ok(f"valid API keys: {valid}") if valid else _note("no API key is valid")]


async def _check_views(connection: Connection) -> list[Finding]:
    findings = []
    for view in VIEWS:
        # A database view in place of a table would run its creator's code with the reader's rights.
        tables = [f"{view.name}.projection", f"{view.name}.parked_orders"]
        if await connection.fetchval(ARE_TABLES, tables) != len(tables):
            findings.append(_wrong(f"the view {view.name} is missing or outdated: run 'serve' or 'replay'"))
            continue
        await connection.execute(SELECT_VIEW, view.name)
        try:
            state = await view_state(connection)
        except OutdatedViewError:
            findings.append(_wrong(f"the view {view.name} has lost its position: run 'serve' or 'replay'"))
            continue
        if state.definition != view.definition:
            findings.append(_wrong(f"the view {view.name} is outdated: run 'serve' or 'replay'"))
        elif state.has_parked:
            findings.append(_wrong(f"the view {view.name} has parked orders: run 'replay'"))
        else:
            findings.append(_ok(f"the view {view.name} is at position {state.position}"))
    return findings
