"""``make demo`` works as the README describes it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from service.features.settings import Settings
from tests.support.folders import ROOT, temporary_folder
from tests.support.processes import environment, running_commands, wait_for_output
from tests.support.waiting import PATIENCE_SECONDS, until

LOOK_AT: Final = re.compile(r"open (?P<url>http://\S+/) to watch")
ALL_IS_TOLD: Final = re.compile(r"all orders are simulated; the service keeps running")

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="there is no .venv: run `make test`"),
]


class Demo:
    """A demo in its own process group, like in a terminal, so that Ctrl-C can be sent to the group."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self._log = folder / "log"
        self.temporary.mkdir(mode=0o711)
        # The demo must ignore these settings, which would prevent the user from opening it.
        settings = environment(folder, TRUSTED_PROXIES="10.0.0.0/8", LOG_FORMAT="json", HOST="0.0.0.0")  # noqa: S104
        del settings["ORDER_TRACKING_PORT"]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                ["make", "demo", "ARGS=--orders 8 --rate 60 --seed 1 --delay 0 --hang-up 0"],
                cwd=ROOT,
                env={**settings, "TMPDIR": str(self.temporary)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, pattern: re.Pattern[str]) -> "re.Match[str]":
        """Wait until the output has a match, and return the match."""
        return wait_for_output(self.process, self._log, pattern)

    def interrupt(self) -> None:
        """Send SIGINT to the process group, like Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)


@contextmanager
def demo() -> Iterator[Demo]:
    """Run a demo for the length of the block, then interrupt it. It must leave no process and no file."""
    with temporary_folder() as folder:
        demo = Demo(folder)
        try:
            yield demo
        finally:
            demo.interrupt()
            demo.process.wait(PATIENCE_SECONDS)
        assert [*demo.temporary.iterdir()] == []
        assert str(demo.temporary) not in running_commands()


@contextmanager
def usual_port_taken() -> Iterator[None]:
    """Hold the port of ``make run`` for the length of the block, unless another process holds it already."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(socket.create_server(("127.0.0.1", Settings.model_fields["port"].default)))
        yield


def test_a_demo_runs_until_ctrl_c_and_leaves_nothing() -> None:
    """The demo serves pages and orders on a free port, and its account agrees; Ctrl-C leaves no process and no
    file.
    """
    with usual_port_taken(), demo() as running:
        url = running.wait_for(LOOK_AT)["url"]
        running.wait_for(ALL_IS_TOLD)
        assert "the account agrees" in running.output
        for path, text in (("", "<!doctype html>"), ("orders?limit=1000", '"order_no"')):
            with urllib.request.urlopen(f"{url}{path}", timeout=PATIENCE_SECONDS) as response:  # noqa: S310 - our own
                assert text in response.read().decode()


def test_a_demo_that_is_interrupted_twice_leaves_nothing() -> None:
    """A second Ctrl-C does not prevent the cleanup."""
    with demo() as running:
        running.wait_for(LOOK_AT)
        running.interrupt()

        def is_ending() -> bool:
            logs = [*running.temporary.glob("*/log")]
            return not logs or "stopping" in logs[0].read_text(encoding="utf-8")

        until(is_ending)


def test_a_demo_that_is_interrupted_at_its_start_leaves_nothing() -> None:
    """Ctrl-C while PostgreSQL is being initialised leaves no process and no file."""
    with demo() as running:
        until(lambda: [*running.temporary.glob("*/postgres*")], lambda: running.output)
