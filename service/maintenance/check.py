"""The check of an installation: settings, database, schema, rights, API keys and views."""

import subprocess
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import partial
from importlib.metadata import version
from math import isinf
from shlex import quote
from typing import Final, Literal, NamedTuple

import asyncpg

from projections.postgres import Connection
from projections.view import View
from projections.views import VIEWS
from service.command_name import command_name
from service.database.api_keys import list_keys
from service.database.catalog import compare, read_catalog, read_rights
from service.database.connections import StorageUnavailableError, connect, connected
from service.database.durability import read_durability
from service.database.embedded_postgres import CREATE_ACCOUNT, belongs_to_nobody, wheel_bindir
from service.database.replica import Replica, read_replica
from service.database.schema import SCHEMA_VERSION, SERVICE_ROLE, SchemaError, check_version, service_dsn
from service.database.sequences import find_faults, find_scarce
from service.event_log import store
from service.ingest.refusals import find_cause
from service.maintenance.retention import MAY_ERASE
from service.settings import CoreSettings, find_exposed_file

SERVER_VERSION: Final = "SHOW server_version"
# The rights of the role that the service runs as. A role that may insert a position or a time can forge events.
ROLE: Final = """
    SELECT current_user::text AS name, session_user = current_user AS is_login,
           (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser,
           pg_has_role(relowner, 'MEMBER') AS owns_log,
           has_table_privilege(oid, 'UPDATE, DELETE, TRUNCATE') AS may_change,
           has_column_privilege(oid, 'notification_id', 'INSERT')
           OR has_column_privilege(oid, 'recorded_at', 'INSERT') AS may_forge,
           has_database_privilege(relowner, current_database(), 'CREATE') AS may_create_views
    FROM pg_class WHERE oid = 'public.order_events'::regclass
"""
DANGERS: Final = {
    "is_superuser": "is a superuser",
    "owns_log": "owns the log and can disable its triggers",
    "may_change": "may change or remove events",
    "may_forge": "may choose positions and times",
}
ROLE_SETTINGS: Final = """
    SELECT rolname, unnest(setconfig) FROM pg_db_role_setting JOIN pg_roles ON pg_roles.oid = setrole
    WHERE rolname = ANY($1::text[])
"""
# The role that the service runs as, if it can log in or be acted as at all.
INTENDED_ROLE: Final = """
    SELECT CASE WHEN relowner = to_regrole('order_tracking_owner') THEN 'order_tracking_service'
        ELSE current_user END
    FROM pg_class WHERE oid = to_regclass('public.order_events')
"""
# Of a view's table: a position and a hash take less.
COPIED_BYTES_MAX: Final = 1_000
# A rebuild's swap locks a view for milliseconds.
LOCK_WAIT: Final = "5s"
# A table of 4 MB, for which PostgreSQL has to extend a file.
PROBE: Final = "CREATE TEMPORARY TABLE probe AS SELECT generate_series(1, 100000)"

# When PostgreSQL released the embedded version. Its package does not contain that date.
RELEASE_DATES: Final = {"18.6": date(2026, 8, 13)}
# PostgreSQL has a minor release each quarter, so an older one lacks fixes.
RELEASE_DAYS_MAX: Final = 180


class Finding(NamedTuple):
    """One result. A note reports a missing protection that may be intended."""

    kind: Literal["ok", "note", "WRONG"]
    text: str


_ok = partial(Finding, "ok")
_note = partial(Finding, "note")
_wrong = partial(Finding, "WRONG")
SCHEMA_FOUND: Final = _ok(f"the schema has version {SCHEMA_VERSION}")


def check_webhook(settings: CoreSettings) -> Finding:
    """Check who may send webhooks. The settings' values were checked when they were read."""
    if settings.read_only:
        return _ok("the service only reads, and refuses webhooks with 503")
    if settings.webhook_tokens:
        return _ok(f"the webhook requires a token; valid tokens: {len(settings.webhook_tokens)}")
    if settings.webhook_hmac_secret:
        return _ok("the webhook requires a signature")
    if settings.is_open:
        return _note(
            "the webhook is open to every program of this machine: set ORDER_TRACKING_WEBHOOK_TOKENS before "
            "you put a proxy or a tunnel in front"
        )
    return _wrong("the webhook is open to the network: set ORDER_TRACKING_WEBHOOK_TOKENS")


def check_settings_file(settings: CoreSettings) -> list[Finding]:
    """Check that only one user can read the secrets in the settings file."""
    file = find_exposed_file(type(settings))
    if file is None:
        return []
    return [
        _wrong(
            f"other users can read the secrets in {file}: let the service's user own the file, and run "
            f"'chmod 600 {quote(str(file))}'"
        )
    ]


def describe_database(settings: CoreSettings, dsn: str) -> Finding:
    """Return which database is checked, and how to open it with psql."""
    if settings.database_url:
        return _ok("the database is the one at ORDER_TRACKING_DATABASE_URL")
    return _ok(f"the database is the one in {settings.state_dir}; while it runs, open it with: psql '{dsn}'")


def check_account(settings: CoreSettings) -> list[Finding]:
    """Check which user the embedded PostgreSQL's data belongs to."""
    if settings.database_url or not belongs_to_nobody(settings.state_dir):
        return []
    return [
        _note(
            "the database is open to every process of the user nobody: create the service's own account "
            f"('{CREATE_ACCOUNT}') and restart"
        )
    ]


async def check_database(
    dsn: str,
    *,
    is_open: bool = True,
    retention_days: int = 0,
    replica_age_seconds_max: float | None = None,
) -> list[Finding]:
    """Check the database and its content.

    Args:
        dsn: the database.
        is_open: the setting of this name.
        retention_days: the setting of this name.
        replica_age_seconds_max: the setting of this name; None if the service records.
    """
    is_reader = replica_age_seconds_max is not None
    try:
        # A policy on a table may be a function of the service's role; it must not run as the operator.
        connection = await connect(dsn, row_security="off")
    except (StorageUnavailableError, asyncpg.PostgresError) as error:
        return [_wrong(f"the database cannot be used: {error}")]
    try:
        findings = [_ok(f"PostgreSQL {await connection.fetchval(SERVER_VERSION)} responds")]
        replica = await read_replica(connection)
        if replica_age_seconds_max is not None:
            findings.append(_describe_replica(replica, replica_age_seconds_max))
        elif replica.is_standby:
            findings.append(_wrong("the database is a standby, which cannot record webhooks"))
        try:
            await check_version(connection)
        except SchemaError as error:
            return [*findings, _wrong(str(error))]
        return [
            *findings,
            SCHEMA_FOUND,
            *await _check_objects(connection),
            *await _check_sequences(connection),
            *([] if is_reader or replica.is_standby else await _check_disk(connection)),
            *await _check_as_service(dsn, " on the primary" if is_reader else ""),
            *await _check_role_settings(connection),
            *([await _check_retention(connection, retention_days)] if retention_days else []),
            *await check_keys(connection, is_open=is_open, is_reader=is_reader),
        ]
    finally:
        await connection.close()


def is_current(findings: list[Finding]) -> bool:
    """Return whether the findings of a database include that it has this release's schema."""
    return SCHEMA_FOUND in findings


def _describe_replica(replica: Replica, age_seconds_max: float) -> Finding:
    """Check how far the database of a process that only reads is behind its primary."""
    if not replica.is_standby:
        return _ok("the database is a primary, which this service only reads")
    if isinf(replica.age_seconds):
        return _wrong("the standby receives no WAL, and has replayed no commit since its start")
    text = f"the standby may have missed the commits of {replica.age_seconds:.1f} s"
    if replica.age_seconds > age_seconds_max:
        return _wrong(f"{text}, more than {age_seconds_max:g} s: check its connection to the primary")
    return _ok(text)


async def _check_objects(connection: Connection) -> list[Finding]:
    """Compare tables, constraints, triggers and the rights of the service with those of a new database."""
    role: str = await connection.fetchval(INTENDED_ROLE)
    differences = compare(await read_catalog(connection), await read_rights(connection, role))
    findings = [_wrong(f"the schema differs from this release's: {fault}") for fault in differences.faults]
    if differences.lost:
        statements = "; ".join(f"GRANT {right} TO {role}" for right in differences.lost)
        findings.append(_wrong(f"rights of the service are missing: run, as the log's owner, {statements}"))
    # The role of a database without the service's own owns everything.
    if differences.further and role == SERVICE_ROLE:
        statements = "; ".join(f"REVOKE {right} FROM {role}" for right in differences.further)
        findings.append(_note(f"the service has further rights. To take them back, run {statements}"))
    if differences.indexes:
        findings.append(_note(f"further indexes make each write slower: {', '.join(differences.indexes)}"))
    if any(finding.kind == "WRONG" for finding in findings):
        return findings
    return [_ok("tables, constraints, triggers and rights are those of this release"), *findings]


async def _check_sequences(connection: Connection) -> list[Finding]:
    faults = [*await find_faults(connection), *await find_scarce(connection)]
    return [_wrong(fault) for fault in faults] or [
        _ok("the sequences are ahead of their tables, and have room")
    ]


async def _check_disk(connection: Connection) -> list[Finding]:
    """Let PostgreSQL extend a file, of a table that is rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(PROBE)
    except asyncpg.PostgresError as error:
        cause = find_cause(error)
        # An operator may refuse temporary tables.
        if isinstance(error, asyncpg.InsufficientPrivilegeError) or cause == "no_answer":
            return []
        advice = "see 'Why webhooks are refused' in docs/operations.md"
        return [_wrong(f"the database cannot write ({cause}: {error}): {advice}")]
    finally:
        await transaction.rollback()
    return [_ok("the database's disk has room")]


async def _check_as_service(dsn: str, where: str) -> list[Finding]:
    """Check what the service's role could do to the log, whether its commits are durable, and the views.

    The service's role can put anything in the place of a view, so this connection has only that role's rights.
    With some DSNs it has them by a reversible SET ROLE, so views are also read without running a function.
    """
    try:
        async with connected(await service_dsn(dsn), row_security="off", lock_timeout=LOCK_WAIT) as connection:
            (role,) = await connection.fetch(ROLE)
            findings = _describe_role(role, await read_durability(connection))
            return [*findings, *[await _check_view(connection, view, where) for view in VIEWS]]
    except (SchemaError, asyncpg.PostgresError) as error:
        return [_wrong(f"the service cannot work with its role: {error}")]


def _describe_role(role: asyncpg.Record, durability: Mapping[str, bool]) -> list[Finding]:
    name = role["name"]
    findings = [(_ok if is_safe else _wrong)(text) for text, is_safe in durability.items()]
    findings.append(_ok(f"the service runs as {name}"))
    if dangers := [danger for right, danger in DANGERS.items() if role[right]]:
        findings.append(_note(f"the log is not protected from the service: {name} {', '.join(dangers)}"))
    else:
        findings.append(_ok("the service can add to the log, but neither change nor remove events"))
    if not role["may_create_views"]:
        problem = "the log's owner cannot create schemas, so no view can be rebuilt: run 'migrate'"
        findings.append(_wrong(problem))
    if not role["is_login"]:
        problem = f"the service acts as {name} by SET ROLE, which is reversible: see docs/operations.md"
        findings.append(_note(problem))
    return findings


async def _check_role_settings(connection: Connection) -> list[Finding]:
    """Report defaults of the service's role, which it can set for its own logins."""
    found = await connection.fetch(ROLE_SETTINGS, [SERVICE_ROLE])
    return [
        _note(f"{name} has its own default {setting}: if you did not set it, run ALTER ROLE {name} RESET ALL")
        for name, setting in found
    ]


async def _check_retention(connection: Connection, days: int) -> Finding:
    if await connection.fetchval(MAY_ERASE):
        return _ok(f"bodies of settled orders are erased {days} days after the last report")
    return _wrong(
        "ORDER_TRACKING_BODY_RETENTION_DAYS is set, but the configured role may not erase: "
        "run GRANT order_tracking_owner TO that role"
    )


async def check_keys(connection: Connection, *, is_open: bool, is_reader: bool = False) -> list[Finding]:
    """Check who may read. Without any key, the open mode lets every program of this machine read."""
    now = datetime.now(UTC)
    keys = await list_keys(connection)
    if valid := sum(key.is_valid(now) for key in keys):
        findings = [_ok(f"valid API keys: {valid}")]
        if is_open and not is_reader:
            findings.append(
                _wrong(
                    "an API key exists, but every program of this machine, a proxy included, can still send "
                    "webhooks: set ORDER_TRACKING_WEBHOOK_TOKENS"
                )
            )
        return findings
    command = f"run '{command_name()} keys create NAME'"
    if is_open and not keys:
        return [_note(f"API and pages are open to every program of this machine: {command} to close them")]
    return [_wrong(f"no API key is valid, so the API and the pages are closed: {command}")]


async def _check_view(connection: Connection, view: View, where: str) -> Finding:
    try:
        states = await _copy(connection, view, "projection", "position", "definition")
        parked = await _copy(connection, view, "parked_orders", "since_version")
    except asyncpg.PostgresError as error:
        reason = str(error).partition("\n")[0]
        return _wrong(f"the view {view.name} cannot be read ({reason}): run 'serve' or 'replay'{where}")
    position, _, definition = states.strip().partition("\t")
    problem = ""
    if definition != view.definition or not position.isdecimal():
        problem = f"is outdated: run 'serve' or 'replay'{where}"
    elif int(position) > await store.head_position(connection):
        problem = f"has events that the log has lost: run 'replay'{where}"
    elif parked:
        problem = "has parked orders: see GET /projections for the reasons"
    if problem:
        return _wrong(f"the view {view.name} {problem}")
    return _ok(f"the view {view.name} is at position {position}")


async def _copy(connection: Connection, view: View, table: str, *columns: str) -> str:
    """Return the columns of a table, or only their beginning.

    COPY refuses everything but a table, and neither a rule nor an index or a policy of its owner makes it run a
    function; a SELECT plans with the expressions of indexes.
    """
    copied = bytearray()

    async def keep(data: bytes) -> None:
        if len(copied) < COPIED_BYTES_MAX:
            copied.extend(data)

    await connection.copy_from_table(table, schema_name=view.name, columns=columns, output=keep)
    return copied.decode()


def check_embedded(settings: CoreSettings, today: date) -> list[Finding]:
    """Check the age of the embedded PostgreSQL, if it is used."""
    if settings.database_url or settings.pg_bindir:
        return []
    server = wheel_bindir() / "postgres"
    output = subprocess.check_output((server, "--version"), text=True)  # noqa: S603 - our own arguments
    release, package = output.split()[-1], version("embedded-postgres")
    text = f"the embedded PostgreSQL is {release}, from the package embedded-postgres {package}"
    if (released := RELEASE_DATES.get(release)) is None:
        return [_note(f"{text}; its age is unknown")]
    days = (today - released).days
    text = f"{text}, released on {released}, {days} days ago"
    if days <= RELEASE_DAYS_MAX:
        return [_ok(text)]
    return [_note(f"{text}: it lacks later fixes, so upgrade this service or use your own PostgreSQL")]
