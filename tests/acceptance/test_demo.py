"""``make demo``, as it stands in the README."""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.running import ROOT, environment, running_commands
from tests.conftest import make_folder

SECONDS_MAX = 60
LOOK_AT = re.compile(r"look at (?P<url>http://\S+/) while")
ALL_IS_TOLD = re.compile(r"all is told; the service goes on")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo makes its own."""
    folder = make_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def said(log: Path, wanted: re.Pattern[str], process: "subprocess.Popen[bytes]") -> "re.Match[str]":
    """Wait until it has said so."""
    due = time.monotonic() + SECONDS_MAX
    while (found := wanted.search(log.read_text(encoding="utf-8"))) is None:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < due, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    return found


@contextmanager
def demo(folder: Path, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """The demo as a terminal runs it: Ctrl-C reaches all of its group. At the end nothing may be left of it."""
    own = folder / "tmp"
    own.mkdir(mode=0o711)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "demo", "ARGS=--orders 8 --rate 60 --seed 1 --delay 0 --hang-up 0"],
            cwd=ROOT,
            # What would close it to whoever looks.
            env={
                **environment(folder, TRUSTED_PROXIES="10.0.0.0/8", LOG_FORMAT="json", HOST="0.0.0.0"),  # noqa: S104
                "TMPDIR": str(own),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SECONDS_MAX)
    assert [*own.iterdir()] == []
    assert str(own) not in running_commands()


def test_a_demo_can_be_looked_at_until_ctrl_c_and_leaves_nothing(folder: Path) -> None:
    """A page, orders, an account that agrees; then neither a process nor a file is left."""
    log = folder / "log"
    with demo(folder, log) as process:
        url = said(log, LOOK_AT, process)["url"]
        said(log, ALL_IS_TOLD, process)
        assert "the account agrees" in log.read_text(encoding="utf-8")
        for path, wanted in (("", "<!doctype html>"), ("orders?limit=1000", '"order_no"')):
            with urllib.request.urlopen(f"{url}{path}", timeout=SECONDS_MAX) as answer:  # noqa: S310 - our own
                assert wanted in answer.read().decode()


def test_a_demo_that_is_ended_twice_leaves_nothing(folder: Path) -> None:
    """An impatient second Ctrl-C does not keep it from clearing up."""
    log = folder / "log"
    with demo(folder, log) as process:
        said(log, LOOK_AT, process)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)


def test_a_demo_that_is_ended_while_it_starts_leaves_nothing(folder: Path) -> None:
    """Whatever had been begun."""
    with demo(folder, folder / "log"):
        time.sleep(0.8)
