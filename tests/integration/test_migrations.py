"""Migrations bring a database of the baseline release to the schema of schema.sql."""

import asyncio
import re

import pytest

from projections.postgres import Connection
from service.database.catalog import read_catalog
from service.database.connections import StorageUnavailableError, connect
from service.database.log_identity import read_log_id
from service.database.schema import (
    MIGRATIONS,
    OWNER_ROLE,
    SCHEMA_VERSION,
    Migration,
    SchemaError,
    apply_schema,
    check_version,
    prepare_database,
    service_dsn,
)
from service.features.settings import Settings
from service.listening import serving
from service.maintenance.check import check_database
from tests.support.baseline import BASELINE, baseline
from tests.support.client import Client, serving_client
from tests.support.databases import wait_for_locked
from tests.support.waiting import until_async

# The beginnings of the hashes of the migrations. Append that of a new one.
RELEASED = (
    "cbb48acb78d5a159",
    "e5816f352a174a59",
    "2a77035c6d0cced6",
    "f45c8e35f6de878f",
    "929040c1ce9e361a",
    "b9a49ceed4ade6eb",
    "1a38a4f352ced740",
    "ca628bff63d391c3",
    "315d30e9101a76ba",
    "096087648a7622bd",
    "26816e35ac6202d4",
    "20761fb6d2bef9b0",
    "65a803acc4a4f6ad",
)
# The rights on each object of the schema public, and the triggers that always fire.
RIGHTS = """
    SELECT format('%s %s', relname, acl) FROM pg_class, unnest(relacl) AS acl
        WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT format('%s.%s %s', attrelid::regclass, attname, acl)
        FROM pg_attribute, unnest(attacl) AS acl
    UNION ALL SELECT format('%s %s', proname, acl) FROM pg_proc, unnest(proacl) AS acl
        WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT format('schema %s %s', nspname, acl) FROM pg_namespace, unnest(nspacl) AS acl
        WHERE nspname = 'public'
    UNION ALL SELECT format('%s %s', tgname, tgenabled) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT format('default %s %s', defaclrole::regrole, defaclacl) FROM pg_default_acl
    UNION ALL SELECT format('owner of %s %s', relname, relowner::regrole) FROM pg_class
        WHERE relnamespace = 'public'::regnamespace
    ORDER BY 1
"""


def next_migrations(*texts: str) -> tuple[Migration, ...]:
    """Return the migrations of a later release that adds these texts."""
    more = [Migration(SCHEMA_VERSION + number, f"{number}.sql", text) for number, text in enumerate(texts, 1)]
    return (*MIGRATIONS, *more)


async def are_rebuilt(client: Client) -> bool:
    projections = (await client.get("/projections"))["projections"]
    return not any(projection["is_outdated"] for projection in projections)


async def test_the_baseline_and_its_migrations_equal_schema_sql(empty_dsn: str, connection: Connection) -> None:
    """A migrated database has the same objects, owners, rights and triggers as a new one."""
    async with baseline(empty_dsn) as old:
        await apply_schema(old)
        assert await read_catalog(old) == await read_catalog(connection)
        assert await old.fetch(RIGHTS) == await connection.fetch(RIGHTS)
        assert await old.fetch(
            "SELECT version, sha256 FROM schema_version ORDER BY 1"
        ) == await connection.fetch("SELECT version, sha256 FROM schema_version ORDER BY 1")


async def test_an_existing_log_gets_its_own_id(empty_dsn: str, connection: Connection) -> None:
    """The migration gives the log a random id, which a later start keeps."""
    async with baseline(empty_dsn) as old:
        await apply_schema(old)
        log_id = await read_log_id(old)
        await apply_schema(old)
        assert await read_log_id(old) == log_id != await read_log_id(connection)


async def test_a_filled_baseline_opens_and_answers_as_before(empty_dsn: str) -> None:
    """After a migration, every event, view row, quarantine entry and key is still there, and the
    log continues.
    """
    async with baseline(empty_dsn) as old:
        before = await old.fetch(
            "SELECT originator_id, originator_version, state FROM order_events ORDER BY notification_id"
        )
        entries = await old.fetch("SELECT * FROM timeline.entries ORDER BY position")
        orders = await old.fetch("SELECT * FROM current_status.orders ORDER BY first_position")
        await old.execute("DELETE FROM api_keys")  # otherwise the client would need a key
        async with serving_client(await prepare_database(empty_dsn)) as client:
            # The definitions of the views have changed, so the start rebuilds the views.
            await until_async(lambda: are_rebuilt(client))
            assert (await client.webhook("KOM1", "Diantar"))["version"] == 8
            assert (await client.get("/orders/KOM1/timeline?after_position=12"))["status"] == "out_for_delivery"
            listed = (await client.get("/quarantine"))["entries"]
            assert [entry["state"] for entry in listed] == ["retried", "open", "discarded", "open"]
            again = await client.raw(
                b'{"order_no": "KOM4", "cnote": "AWB4", "status": "Dikirim", "buyer": "B"}',
                **{"webhook-id": "key-1"},
            )
            assert (again["version"], again["position"]) == (1, 10)
            shown = await client.get("/statistics?after_position=12")
            assert sum(status["orders"] for status in shown["statuses"]) == len(orders)
        assert before == await old.fetch(
            "SELECT originator_id, originator_version, state FROM order_events "
            "WHERE notification_id <= 11 ORDER BY notification_id"
        )
        after = await old.fetch("SELECT * FROM timeline.entries WHERE position <= 11 ORDER BY position")
        # Later releases have added columns.
        assert [dict(entry) for entry in entries] == [
            {name: entry[name] for name in entries[0].keys()}  # noqa: SIM118 - of a record
            for entry in after
        ]


async def test_a_database_of_one_role_migrates(empty_dsn: str) -> None:
    """On a server without rights to create roles, one role owns everything and can migrate."""
    plain = re.sub(r"^(GRANT|REVOKE|ALTER DEFAULT|ALTER \w+ .* OWNER).*?;\n", "", BASELINE, flags=re.MULTILINE)
    async with baseline(empty_dsn) as admin:
        await admin.execute("DROP SCHEMA public, current_status, timeline, statistics CASCADE")
        await admin.execute("DROP ROLE IF EXISTS alone; CREATE ROLE alone LOGIN")
        try:
            name = await admin.fetchval("SELECT current_database()")
            await admin.execute(f"ALTER DATABASE {name} OWNER TO alone")
            dsn = empty_dsn.replace("user=order_tracking", "user=alone")
            own = await connect(dsn)
            await own.execute("CREATE SCHEMA public")
            await own.execute(plain)
            await own.close()
            assert await prepare_database(dsn) == dsn
            async with serving(Settings(port=0), dsn):
                pass
        finally:
            await admin.execute(
                "DROP OWNED BY alone; ALTER DATABASE " + name + " OWNER TO order_tracking; DROP ROLE alone"
            )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("ALTER TABLE quarantine DROP COLUMN times_seen", "column quarantine.times_seen"),
        ("ALTER TABLE erasures ALTER COLUMN events TYPE integer", "column erasures.events"),
        ("DROP INDEX quarantine_state_idx", "index quarantine_state_idx"),
        ("DROP TRIGGER order_events_kept ON order_events", "trigger order_events_kept of order_events"),
        ("DROP FUNCTION swap_view_schemas", "function swap_view_schemas(view text)"),
    ],
)
async def test_an_unreleased_schema_is_named_with_the_way_out(empty_dsn: str, change: str, named: str) -> None:
    """The error about a schema of an unreleased commit names the first object that differs, and the way out."""
    async with baseline(empty_dsn) as old:
        await old.execute(change)
        said = f"does not match any release \\({re.escape(named)} is missing or differs"
        with pytest.raises(SchemaError, match=said) as error:
            await prepare_database(empty_dsn)
        assert "set ORDER_TRACKING_STATE_DIR or ORDER_TRACKING_DATABASE_URL to another" in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(SchemaError, match=said):
            await check_version(old)
        assert any(
            re.search(said, finding.text)
            for finding in await check_database(empty_dsn)
            if finding.kind == "WRONG"
        )
        assert await old.fetchval("SELECT max(version) FROM schema_version") == 1


async def test_an_operators_own_tables_and_indexes_are_accepted(empty_dsn: str) -> None:
    """An operator's own tables and indexes do not prevent a migration."""
    async with baseline(empty_dsn) as old:
        await old.execute("CREATE TABLE mine (a int); CREATE INDEX my_idx ON quarantine (remote)")
        await apply_schema(old)
        await check_version(old)


async def test_a_migration_of_another_text_is_found(connection: Connection) -> None:
    """A database that an unreleased migration has changed is refused."""
    await connection.execute("UPDATE schema_version SET sha256 = 'x' WHERE version = 2")
    with pytest.raises(
        SchemaError, match=r"0002_migration_hashes\.sql is missing or differs from this release's"
    ):
        await apply_schema(connection)
    with pytest.raises(SchemaError, match="does not match any release"):
        await check_version(connection)


def test_no_migration_is_edited() -> None:
    """Databases keep the hash of each migration, so even a comment in one must stay as it is."""
    assert tuple(migration.sha256[:16] for migration in MIGRATIONS[: len(RELEASED)]) == RELEASED


async def test_a_migration_gives_way_to_a_lock(empty_dsn: str) -> None:
    """While another session holds a lock on a table, a migration changes nothing and is tried again later."""
    async with baseline(empty_dsn) as old:
        reader = await connect(empty_dsn)
        await reader.execute("BEGIN; SELECT count(*) FROM public.quarantine")
        with pytest.raises(StorageUnavailableError, match="holds a lock that a migration needs"):
            await apply_schema(old)
        assert await old.fetchval("SELECT max(version) FROM schema_version") == 1
        starting = asyncio.create_task(prepare_database(empty_dsn))
        await wait_for_locked(reader)
        await reader.execute("COMMIT")
        await starting
        await reader.close()
        assert await old.fetchval("SELECT max(version) FROM schema_version") == SCHEMA_VERSION


async def test_starts_at_once_migrate_once(empty_dsn: str) -> None:
    """If several processes of a new release start at the same time, only one of them migrates."""
    async with baseline(empty_dsn) as old:
        await asyncio.gather(*(prepare_database(empty_dsn) for _ in range(4)))
        versions = await old.fetch("SELECT version FROM schema_version ORDER BY version")
        assert [version for (version,) in versions] == [migration.version for migration in MIGRATIONS]


async def test_migrations_run_in_order_as_the_owner(connection: Connection) -> None:
    """Migrations run in order, are recorded, create objects of the owner, and keep the connection's role."""
    migrations = next_migrations(
        "CREATE TABLE couriers (name text)", "ALTER TABLE couriers ADD COLUMN code text"
    )
    await apply_schema(connection, migrations)
    await apply_schema(connection, migrations)
    owner = await connection.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'couriers'")
    assert owner == OWNER_ROLE
    assert await connection.fetchval("SELECT max(version) FROM schema_version") == SCHEMA_VERSION + 2
    assert await connection.fetchval("SELECT current_user") == "order_tracking"
    with pytest.raises(SchemaError, match="use the release that created it, or a newer one"):
        await check_version(connection)


async def test_a_migration_that_fails_leaves_nothing(connection: Connection) -> None:
    """A failed migration rolls back all pending migrations, with a one-line error."""
    migrations = next_migrations("CREATE TABLE couriers (name text)", "SELECT 1 / 0")
    with pytest.raises(SchemaError, match="a migration cannot be applied to this database: division by zero"):
        await apply_schema(connection, migrations)
    assert await connection.fetchval("SELECT to_regclass('couriers')") is None
    assert await connection.fetchval("SELECT max(version) FROM schema_version") == SCHEMA_VERSION


async def test_the_service_cannot_migrate(empty_dsn: str) -> None:
    """A service with its own login refuses an older database, and the error names the command to run."""
    async with baseline(empty_dsn):
        with pytest.raises(SchemaError, match="run 'migrate' to bring it to"):
            await service_dsn(empty_dsn)


async def test_a_process_of_the_previous_code_still_records(empty_dsn: str) -> None:
    """A process of the previous release can still record during an upgrade, with the statements of a2c7c32."""
    async with baseline(empty_dsn):
        await prepare_database(empty_dsn)
        service = await connect(empty_dsn.replace("user=order_tracking", "user=order_tracking_service"))
        try:
            async with service.transaction():
                await service.execute("SELECT public.lock_order_events()")
                await service.execute("SELECT pg_advisory_xact_lock($1)", 0x4F52444552)
                rows = await service.fetch(
                    """
                    INSERT INTO order_events (originator_id, originator_version, topic, state)
                    SELECT given.*
                    FROM (SELECT pg_advisory_xact_lock($5), pg_notify('order_events', '')) AS held,
                         unnest($1::text[], $2::bigint[], $3::text[], $4::bytea[]) AS given
                    RETURNING originator_id, originator_version, notification_id
                    """,
                    *(["KOM9"], [1], ["order.status_reported"], [b"{}"]),
                    0x4F52444552,
                )
                await service.execute(
                    "INSERT INTO idempotency_keys (order_no, key, version, body_sha256) "
                    "VALUES ('KOM9', 'k', 1, '')"
                )
                await service.execute(
                    "INSERT INTO quarantine (body, reason, remote, received_at, last_seen_at) "
                    "SELECT 'x', 'y', NULL, now(), now()"
                )
            assert len(rows) == 1
        finally:
            await service.close()


async def test_no_key_depends_on_the_locales_of_the_operating_system(connection: Connection) -> None:
    """Each indexed text, in the log and in the views, is compared byte for byte."""
    others = """
        SELECT pg_index.indexrelid::regclass::text, attname
        FROM pg_index JOIN pg_attribute ON attrelid = indexrelid
        JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname NOT LIKE 'pg\\_%' AND attcollation NOT IN (0, 'pg_catalog."C"'::regcollation)
    """
    assert await connection.fetch(others) == []
