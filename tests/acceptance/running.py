"""The service as its users run it: a real process on a real port, with the PostgreSQL that it starts itself."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
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


@dataclass
class Load:
    """Many callers that report without pause, and an account of what they were told."""

    url: str
    callers: int = 16
    orders: int = 40
    sent: set[str] = field(default_factory=set)
    acknowledged: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0
    stopped: bool = False

    async def run(self) -> None:
        """Report until ``stopped``."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._call(session, number) for number in range(self.callers)))

    async def _call(self, session: aiohttp.ClientSession, number: int) -> None:
        statuses = ("Diajukan", "Dijemput", "Dikirim", "Diantar", "Diterima", "Kendala", "Retur")
        count = 0
        while not self.stopped:
            count += 1
            mark = f"{number}-{count}-{uuid4()}"
            body = {
                "order_no": f"KOM{(number * 7 + count) % self.orders}",
                "status": statuses[count % 7],
                "mark": mark,
            }
            # The intent is written down before it is sent.
            self.sent.add(mark)
            began = time.monotonic()
            try:
                async with session.put(f"{self.url}/webhook", json=body) as response:
                    receipt = await response.json(content_type=None)
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(0.05)
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.answers[response.status] = self.answers.get(response.status, 0) + 1
            if response.status == 200:
                self.acknowledged.append({**receipt, "mark": mark})
            else:
                assert response.headers["Retry-After"]
                await asyncio.sleep(0.05)


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


async def assert_exactly_once(url: str, load: Load) -> None:
    """Every acknowledged report is one event with its own bytes; none is there twice; versions have no gaps."""
    events = await whole_log(url)
    marks = [json.loads(event["data"]["body"])["mark"] for event in events]
    assert len(marks) == len(set(marks))
    assert set(marks) <= load.sent
    by_mark = dict(zip(marks, events, strict=True))
    for receipt in load.acknowledged:
        event = by_mark[receipt["mark"]]
        assert (event["position"], event["version"], event["order_no"], event["data"]["report_id"]) == (
            receipt["position"],
            receipt["version"],
            receipt["order_no"],
            receipt["report_id"],
        )
    versions: dict[str, int] = {}
    for event in events:
        assert event["version"] == versions.get(event["order_no"], 0) + 1
        versions[event["order_no"]] = event["version"]
