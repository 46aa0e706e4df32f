"""``check`` compares a database with a new one, and finds what would keep the service from recording."""

import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from projections.postgres import Connection
from service.database.catalog import CATALOG_FILE, RIGHT, compare, read_catalog, read_rights
from service.database.schema import OWNER_ROLE, SERVICE_ROLE, apply_schema
from service.database.sequences import NUMBERED
from service.maintenance.check import check_database
from tests.support.baseline import baseline
from tests.support.catalog import describe
from tests.support.databases import TestServer
from tests.support.folders import make_folder

RIGHTS = [
    line.removeprefix(RIGHT).replace(" on ", " ON ")
    for line in CATALOG_FILE.read_text("utf-8").splitlines()
    if line.startswith(RIGHT)
]
# Each with a part of the finding.
CHANGES = {
    "ALTER TABLE order_events ADD CONSTRAINT sane CHECK (originator_id <> 'KOM1')": "constraint sane",
    "ALTER TABLE order_events ADD COLUMN more text NOT NULL": "column order_events.more",
    "ALTER TABLE quarantine DROP COLUMN named_order_no": "column quarantine.named_order_no is",
    "ALTER TABLE operations ALTER COLUMN actor TYPE varchar(5)": "column operations.actor is 'char",
    "ALTER TABLE operations ALTER COLUMN actor SET NOT NULL": "column operations.actor is 'text NOT NULL'",
    "ALTER TABLE sessions ALTER COLUMN used_at DROP DEFAULT": "column sessions.used_at",
    "ALTER TABLE held_orders DROP CONSTRAINT held_orders_pkey": "constraint held_orders_pkey",
    "CREATE UNIQUE INDEX one_topic ON order_events (topic)": "index one_topic",
    "DROP INDEX quarantine_named_idx": "index quarantine_named_idx is missing",
    "DROP TRIGGER order_events_kept ON order_events": "trigger order_events_kept of",
    "ALTER TABLE order_events DISABLE TRIGGER order_events_kept": "state of trigger order_events_kept",
    "ALTER TABLE history_salts ENABLE TRIGGER history_salts_kept": "state of trigger history_salts_kept",
    "CREATE TRIGGER mine BEFORE INSERT ON sessions EXECUTE FUNCTION refuse_change()": "trigger mine",
    "CREATE RULE silent AS ON INSERT TO operations DO INSTEAD NOTHING": "rule silent of operations",
    "ALTER TABLE order_events ENABLE ROW LEVEL SECURITY": "table order_events is",
    "ALTER TABLE history_commitments SET UNLOGGED": "table history_commitments is 'persistence u",
    "DROP FUNCTION lock_history()": "function lock_history() is missing",
    "ALTER FUNCTION swap_view_schemas(text) SECURITY INVOKER": "function swap_view_schemas(",
}
HARMLESS = (
    "CREATE TABLE mine (x int UNIQUE CHECK (x > 0))",
    "CREATE INDEX my_index ON order_events (recorded_at)",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "GRANT SELECT ON order_events TO PUBLIC",
    "ANALYZE order_events",
)


@asynccontextmanager
async def rolled_back(connection: Connection) -> AsyncIterator[None]:
    """Undo what a block does to the database."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


async def wrong(dsn: str) -> list[str]:
    """Return the problems that ``check`` finds, except the settings that the tests turn off."""
    off = {"fsync is off", "full_page_writes is off"}
    return [one.text for one in await check_database(dsn) if one.kind == "WRONG" and one.text not in off]


async def test_the_catalog_is_that_of_a_new_database(connection: Connection) -> None:
    """The file is what a new database has: python -m tests.support.catalog writes it."""
    assert await describe(connection) == CATALOG_FILE.read_text(encoding="utf-8")


async def test_a_new_and_a_migrated_database_differ_in_nothing(owner_dsn: str, empty_dsn: str) -> None:
    """``check`` finds nothing wrong in a new database, nor in a migrated one of the first release."""
    async with baseline(empty_dsn) as old:
        await old.execute("DELETE FROM api_keys")
        await apply_schema(old)
        # The start of a service would rebuild them.
        assert all("the view" in text for text in await wrong(empty_dsn))
    assert await wrong(owner_dsn) == []
    notes = {one.text for one in await check_database(owner_dsn) if one.kind == "note"}
    assert len(notes) == 1, notes  # that the API is open


@pytest.mark.parametrize("right", RIGHTS)
async def test_a_lost_right_is_found(connection: Connection, right: str) -> None:
    """Each right of the service's role is missed, and the statement in the finding gives it back."""
    async with rolled_back(connection):
        await connection.execute(f"REVOKE {right} FROM {SERVICE_ROLE}, PUBLIC")
        lost = compare([], await read_rights(connection, SERVICE_ROLE)).lost
        assert lost == [right]
        await connection.execute(f"GRANT {lost[0]} TO {SERVICE_ROLE}")
        assert compare([], await read_rights(connection, SERVICE_ROLE)).lost == []


async def test_rights_are_named_with_their_remedy(owner_dsn: str, connection: Connection) -> None:
    """A lost right is WRONG and a further one a note, each with the statement that ends it."""
    await connection.execute(f"REVOKE UPDATE (state) ON quarantine FROM {SERVICE_ROLE}")
    await connection.execute(f"GRANT DELETE ON operations TO {SERVICE_ROLE}")
    (lost,) = await wrong(owner_dsn)
    assert lost.endswith(f"run, as the log's owner, GRANT UPDATE (state) ON quarantine TO {SERVICE_ROLE}")
    notes = [one.text for one in await check_database(owner_dsn) if "further rights" in one.text]
    assert [one.partition("run ")[2] for one in notes] == [f"REVOKE DELETE ON operations FROM {SERVICE_ROLE}"]


@pytest.mark.parametrize(
    "right", ["USAGE ON SCHEMA public", "SELECT ON order_events", "INSERT (topic) ON order_events"]
)
async def test_a_right_without_which_nothing_works_is_found(
    owner_dsn: str, connection: Connection, right: str
) -> None:
    """``check`` names the right, although it cannot look at the database as the service."""
    await connection.execute(f"REVOKE {right} FROM {SERVICE_ROLE}, PUBLIC")
    assert f"GRANT {right} TO {SERVICE_ROLE}" in (await wrong(owner_dsn))[0]


@pytest.mark.parametrize("change", CHANGES)
async def test_a_changed_object_is_found(connection: Connection, change: str) -> None:
    """A further, missing or changed column, constraint, trigger, rule or unique index is a fault."""
    async with rolled_back(connection):
        await connection.execute(f"SET ROLE {OWNER_ROLE}; {change}")
        faults = compare(await read_catalog(connection), []).faults
    assert any(CHANGES[change] in fault for fault in faults), faults


async def test_what_an_operator_may_add_is_no_fault(owner_dsn: str, connection: Connection) -> None:
    """An operator's own tables and functions are ignored, and an index or a right is at most a note."""
    for change in HARMLESS:
        await connection.execute(change)
    assert await wrong(owner_dsn) == []


async def test_a_sequence_near_its_end_is_found(owner_dsn: str, connection: Connection) -> None:
    """Each sequence that numbers rows is WRONG before its last number, with a statement if one helps."""
    names = [numbered.sequence for numbered in NUMBERED] + ["held_orders_held_id_seq"]
    for name in names:
        await connection.execute(f"ALTER SEQUENCE {name} MAXVALUE 2147483647")
        await connection.execute(f"SELECT setval('{name}', 2000000000)")
    found = [text for text in await wrong(owner_dsn) if "147,483,647 numbers left" in text]
    assert len(found) == len(names)
    for text in found:
        await connection.execute(re.findall(r"run, as its owner, (.+)", text)[0])
    assert await wrong(owner_dsn) == []
    await connection.execute("SELECT setval('order_events_notification_id_seq', 9223372036854775000)")
    (text,) = await wrong(owner_dsn)
    assert text.startswith("the sequence order_events_notification_id_seq has only 807 numbers left: ")


@pytest.fixture
def small_disk(server: TestServer) -> Iterator[Path]:
    """Return a folder of the server's user on a disk of 1 MB."""
    folder = make_folder()
    size = f"size=1m,uid={Path(f'/proc/{server.pid}').stat().st_uid},mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


async def test_a_full_disk_is_named(owner_dsn: str, connection: Connection, small_disk: Path) -> None:
    """A disk on which PostgreSQL cannot extend a file is WRONG, with the cause that refused webhooks have."""
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
    await connection.execute(f"ALTER DATABASE {name} SET temp_tablespaces = small")
    (text,) = await wrong(owner_dsn)
    assert text.startswith("the database cannot write (disk_full: could not extend file")
    await connection.execute(f"ALTER DATABASE {name} RESET temp_tablespaces")
    await connection.execute("DROP TABLESPACE small")
