"""The operator's commands run nothing that the service's role may write with more rights than it has."""

import asyncio
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeAlias

import psycopg
import pytest

from domain.order import Order
from projections.views import VIEWS
from service.database.embedded_postgres import EmbeddedPostgres, running_dsn
from service.database.schema import service_dsn
from tests.support.commands import call_command
from tests.support.databases import WAITING_FOR_LOCKS
from tests.support.examples import SENT_STATE
from tests.support.folders import ROOT, temporary_folder
from tests.support.processes import running_service
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.usefixtures("all_features")

Attacker: TypeAlias = psycopg.Connection[Any]

# The commands that connect with the operator's rights.
COMMANDS: Final = (
    ("check",),
    ("check", "--history"),
    ("erase", "KOM1", "asked for"),
    ("backup", "{folder}/dump"),
    ("migrate",),
    ("move", "{folder}/new"),
)
# It connects before there is a service's role with rights.
OTHERS: Final = {"restore.py"}
# Runs a program with the rights that the session can get, and leaves a trace of each success.
ATTACK: Final = """
    CREATE FUNCTION {schema}.attack() RETURNS text LANGUAGE plpgsql AS $$
    BEGIN
        EXECUTE 'RESET ROLE';
        COPY (SELECT current_user) TO PROGRAM 'cat >{folder}/$(date +%s%N)';
        RETURN '';
    EXCEPTION WHEN OTHERS THEN
        RETURN '';
    END $$;
    CREATE FUNCTION {schema}.trap(value anyelement) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
        'BEGIN RETURN {schema}.attack(); END';
    CREATE FUNCTION {schema}.fire() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM {schema}.attack(); RETURN coalesce(NEW, OLD); END';
    GRANT USAGE ON SCHEMA {schema} TO PUBLIC;
"""
# The planner computes a constant expression of an index, whatever the statement reads.
TRAPS: Final = """
    CREATE INDEX ON {table} ({schema}.trap(1));
    CREATE TRIGGER fire BEFORE INSERT OR UPDATE OR DELETE ON {table}
        FOR EACH ROW EXECUTE FUNCTION {schema}.fire();
    CREATE TRIGGER fire_too BEFORE TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION {schema}.fire();
    GRANT SELECT ON {table} TO PUBLIC;
    ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
    CREATE POLICY trap ON {table} USING ({schema}.trap(1) = '');
"""
REPLACE: Final = """
    ALTER TABLE {schema}.projection RENAME TO kept;
    CREATE VIEW {schema}.projection AS
        SELECT position + length({schema}.attack()) AS position, definition, one_row FROM {schema}.kept;
"""


@pytest.fixture
def traces() -> Iterator[Path]:
    """Return a folder in which PostgreSQL can write."""
    with temporary_folder() as folder:
        folder.chmod(0o777 | stat.S_ISVTX)
        yield folder


@pytest.fixture
def attacker(state_dir: Path, traces: Path) -> Iterator[Attacker]:
    """Connect as the service's role, with a function in each view that attacks its caller."""
    with EmbeddedPostgres(state_dir) as server:
        with psycopg.connect(server.dsn) as connection:
            values = ("KOM1", Order.StatusReported.TOPIC, SENT_STATE)
            connection.execute("INSERT INTO order_events VALUES (%s, 1, %s, %s)", values)
        with psycopg.connect(asyncio.run(service_dsn(server.dsn)), autocommit=True) as connection:
            for view in VIEWS:
                connection.execute(ATTACK.format(schema=view.name, folder=traces).encode())
            yield connection


def run(state_dir: Path, traces: Path, command: Sequence[str]) -> None:
    """Run a command. Its result does not matter."""
    if command == ("serve",):
        with running_service(state_dir, DATABASE_URL=str(running_dsn(state_dir))):
            return
    call_command(state_dir, *(part.format(folder=traces) for part in command))


def traced(traces: Path) -> list[str]:
    """Return the roles that attacks had."""
    return [file.read_text() for file in traces.iterdir() if file.name not in {"dump", "new"}]


def test_every_command_with_the_operators_rights_is_known() -> None:
    """A further command that connects with the operator's rights belongs in the list of this file."""
    files = [
        file for file in (ROOT / "service/cli").glob("*.py") if "as_service=False" in file.read_text("utf-8")
    ]
    assert {file.name for file in files} == {f"{command[0]}.py" for command in COMMANDS} | OTHERS


@pytest.mark.parametrize("command", [*COMMANDS, ("serve",)], ids=" ".join)
def test_a_trap_in_a_view_does_not_run(
    state_dir: Path, traces: Path, attacker: Attacker, command: Sequence[str]
) -> None:
    """No index's expression, trigger or policy of a view's table runs with the operator's rights."""
    for view in VIEWS:
        for table in ("projection", "parked_orders", *(table.name for table in view.tables)):
            attacker.execute(TRAPS.format(schema=view.name, table=f"{view.name}.{table}").encode())
    if command[0] == "move":
        # It refuses a database that another session uses.
        attacker.close()
    run(state_dir, traces, command)
    assert traced(traces) == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_table_that_is_replaced_at_the_wrong_moment_does_not_run(
    state_dir: Path, traces: Path, attacker: Attacker, command: Sequence[str]
) -> None:
    """A table that becomes a database view while the command waits for it runs nothing either."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        with attacker.transaction():
            for view in VIEWS:
                attacker.execute(REPLACE.format(schema=view.name).encode())
            done = thread.submit(run, state_dir, traces, command)
            until(lambda: done.done() or attacker.execute(WAITING_FOR_LOCKS).fetchone() != (0,))
        done.result(PATIENCE_SECONDS)
    assert traced(traces) == []


def test_the_traps_would_run(state_dir: Path, traces: Path, attacker: Attacker) -> None:
    """A superuser's SELECT sets a trap off, as the tests above expect."""
    attacker.execute(TRAPS.format(schema="timeline", table="timeline.projection").encode())
    with psycopg.connect(str(running_dsn(state_dir))) as connection:
        connection.execute("SELECT position FROM timeline.projection")
    assert {*traced(traces)} == {"order_tracking\n"}
