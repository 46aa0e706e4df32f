"""``make demo``, as it stands in the README."""

import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.running import ROOT, environment
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


def test_a_demo_can_be_looked_at_until_ctrl_c_and_leaves_nothing(folder: Path) -> None:
    """A page, orders, an account that agrees; then neither a process nor a file is left."""
    log = folder / "log"
    own = folder / "tmp"
    own.mkdir(mode=0o711)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["make", "demo", "ARGS=--orders 8 --rate 60 --seed 1 --delay 0 --hang-up 0"],
            cwd=ROOT,
            env={**environment(folder), "TMPDIR": str(own)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = said(log, LOOK_AT, process)["url"]
        said(log, ALL_IS_TOLD, process)
        text = log.read_text(encoding="utf-8")
        assert "the account agrees" in text
        for path, wanted in (("", "<!doctype html>"), ("orders?limit=1000", '"order_no"')):
            with urllib.request.urlopen(f"{url}{path}", timeout=SECONDS_MAX) as answer:  # noqa: S310 - our own
                assert wanted in answer.read().decode()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SECONDS_MAX)
    assert [*own.iterdir()] == []
    listing = subprocess.run(
        ["ps", "-axww", "-o", "command="], capture_output=True, text=True, check=True
    ).stdout
    assert str(own) not in listing
