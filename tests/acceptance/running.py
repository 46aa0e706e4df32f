"""The service as its users run it: a real process on a real port, with the PostgreSQL that it starts itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import aiohttp

from service.embedded_postgres import running_dsn

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0
LISTENS = re.compile(r'order-tracking listens on (?P<url>[^\s"]+)')


def environment(state_dir: Path, **settings: str) -> dict[str, str]:
    """This process's environment with the settings of one service, and none of the caller's own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORDER_TRACKING_")}
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
    """Run a command of the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        env=environment(state_dir, **settings),
        cwd=state_dir,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def running_commands() -> str:
    """The command lines of every process on this machine."""
    listing = ["ps", "-axww", "-o", "command="]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout


class RunningService:
    """One service process."""

    def __init__(self, state_dir: Path, **settings: str) -> None:
        self.state_dir = state_dir
        self.settings = settings
        self.url = ""
        self.log_file = state_dir / f"service-{uuid4().hex}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it and wait until it says where it listens."""
        with self.log_file.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve"],
                env=environment(self.state_dir, **self.settings),
                cwd=self.state_dir,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        due = time.monotonic() + START_SECONDS_MAX
        while (found := LISTENS.search(self.output)) is None:
            assert self._process.poll() is None, self.output
            assert time.monotonic() < due, self.output
            time.sleep(0.02)
        self.url = found["url"]
        return self

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    @property
    def output(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    @property
    def dsn(self) -> str:
        dsn = running_dsn(self.state_dir)
        assert dsn is not None
        return dsn

    @property
    def postmaster_pid(self) -> int:
        return int((self.state_dir / "postgres" / "postmaster.pid").read_text(encoding="utf-8").split()[0])

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS_MAX)

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.kill()


async def whole_log(url: str) -> list[dict[str, Any]]:
    """Every event, over HTTP, page by page."""
    events: list[dict[str, Any]] = []
    path: str | None = "/events?limit=1000"
    async with aiohttp.ClientSession() as session:
        while path is not None:
            async with session.get(f"{url}{path}") as response:
                assert response.status == 200, await response.text()
                page = await response.json()
            events += page["events"]
            path = page["next"]
    return events
