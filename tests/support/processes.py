"""The service and its command line as a user runs them, with real processes, ports and signals."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self
from uuid import uuid4

import aiohttp

from service.database.embedded_postgres import running_dsn
from tests.support.folders import ROOT
from tests.support.waiting import PATIENCE_SECONDS, until

LISTENS: Final = re.compile(r'order-tracking is listening on (?P<url>[^\s"]+)')
COMMAND: Final = (sys.executable, "-m", "service")
# This variable makes a child process measure its coverage, which makes it a third slower. Only a few tests need
# that: ``call_command`` runs the same code in the test process.
COVERAGE_VARIABLE: Final = "COVERAGE_PROCESS_CONFIG"
# Runs a command that inherits a socket, as systemd hands it over: LISTEN_PID is the id of the command itself.
HAND_OVER: Final = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execvp(sys.argv[2], sys.argv[2:])
"""
# A module of tests chooses it for all of its processes.
FEATURES: Final = "ORDER_TRACKING_FEATURES"
NOT_INHERITED: Final = ("ORDER_TRACKING_", COVERAGE_VARIABLE)


def environment(state_dir: Path, **settings: str) -> dict[str, str]:
    """Return this process's environment with the settings of one service.

    The caller's own settings and the measurement of coverage are not inherited.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == FEATURES or not name.startswith(NOT_INHERITED)
    }
    return {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "ORDER_TRACKING_STATE_DIR": str(state_dir),
        "ORDER_TRACKING_PORT": "0",
        "ORDER_TRACKING_ENV_FILE": os.devnull,
        "NO_COLOR": "1",
        "COLUMNS": "200",
        **{f"ORDER_TRACKING_{name}": value for name, value in settings.items()},
    }


def run_command(state_dir: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run a command until it exits."""
    return run_command_for(PATIENCE_SECONDS, state_dir, *arguments, **settings)


def run_command_for(
    seconds_max: float, state_dir: Path, *arguments: str, **settings: str
) -> "subprocess.CompletedProcess[str]":
    """Run a command until it exits, for at most so many seconds."""
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(state_dir, **settings),
        cwd=state_dir,
        capture_output=True,
        text=True,
        timeout=seconds_max,
        check=False,
    )


@contextmanager
def background_command(state_dir: Path, *arguments: str, **settings: str) -> "Iterator[subprocess.Popen[str]]":
    """Run a command alongside the block, which reads its output, and kill it at the end of the block."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(state_dir, **settings),
        cwd=state_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def running_commands() -> str:
    """Return the command lines of every process on this machine."""
    listing = ["ps", "-axww", "-o", "command="]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout


def wait_for_output(process: "subprocess.Popen[bytes]", log: Path, pattern: re.Pattern[str]) -> "re.Match[str]":
    """Wait for a match in the output of a process, and return the match; fail if the process ends first."""

    def find() -> "re.Match[str] | None":
        found = pattern.search(log.read_text(encoding="utf-8"))
        assert found is not None or process.poll() is None, log.read_text(encoding="utf-8")
        return found

    match = until(find, lambda: log.read_text(encoding="utf-8"))
    assert match is not None
    return match


class RunningService:
    """A service process.

    Args:
        state_dir: its state folder.
        options: the options of its command.
        settings: its settings, without the prefix ORDER_TRACKING_.
    """

    # The command that starts the service, and whether its coverage is measured.
    command: tuple[str, ...] = COMMAND
    is_measured = False
    # The socket that it inherits instead of opening a port.
    inherited: socket.socket | None = None

    def __init__(self, state_dir: Path, *options: str, **settings: str) -> None:
        self.state_dir = state_dir
        self.options = options
        self.settings = settings
        self.url = ""
        self.log_file = state_dir / f"service-{uuid4().hex}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start the service and wait until it responds."""
        return self.launch().wait_until_it_answers()

    def launch(self) -> Self:
        """Start the service without waiting."""
        names = environment(self.state_dir, **self.settings)
        if self.is_measured and COVERAGE_VARIABLE in os.environ:
            names[COVERAGE_VARIABLE] = os.environ[COVERAGE_VARIABLE]
        command = [*self.command, "serve", *self.options]
        files = [] if self.inherited is None else [self.inherited.fileno()]
        if files:
            command = [sys.executable, "-c", HAND_OVER, str(files[0]), *command]
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                pass_fds=files,
                env=names,
                cwd=self.state_dir,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    def wait_until_it_answers(self) -> Self:
        """Wait for the service's address, then for its first response, which follows the startup messages."""
        self.url = wait_for_output(self.process, self.log_file, LISTENS)["url"]
        with urllib.request.urlopen(f"{self.url}/livez", timeout=PATIENCE_SECONDS) as response:  # noqa: S310 - our own
            assert response.status == 200
        return self

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def output(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def dsn(self) -> str:
        dsn = running_dsn(self.state_dir)
        assert dsn is not None
        return dsn

    @property
    def postmaster_pid(self) -> int:
        return int((self.state_dir / "postgres" / "postmaster.pid").read_text(encoding="utf-8").split()[0])

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal that ends the process, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def end(self) -> None:
        """End the process if it is still running."""
        if self._process is not None and self._process.poll() is None:
            try:
                self.terminate()
            except subprocess.TimeoutExpired:
                self.kill()


@contextmanager
def running_service(state_dir: Path, *options: str, **settings: str) -> Iterator[RunningService]:
    """Run a service for the length of the block."""
    with ended_service(RunningService(state_dir, *options, **settings)) as service:
        yield service


@contextmanager
def measured_service(state_dir: Path, **settings: str) -> Iterator[RunningService]:
    """Run a service whose coverage is measured, for the length of the block."""
    service = RunningService(state_dir, **settings)
    service.is_measured = True
    with ended_service(service):
        yield service


@contextmanager
def ended_service(service: RunningService) -> Iterator[RunningService]:
    """Start a service, and end it at the end of the block."""
    try:
        yield service.start()
    finally:
        service.end()


async def read_whole_log(url: str) -> list[dict[str, Any]]:
    """Read every event over HTTP, page by page."""
    events: list[dict[str, Any]] = []
    path = "/events?limit=1000"
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}{path}") as response:
                assert response.status == 200, await response.text()
                page = await response.json()
            if not page["events"]:
                return events
            events += page["events"]
            path = page["next"]
