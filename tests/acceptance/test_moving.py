"""A whole log moves between databases by ``export`` and ``import``, as docs/operations.md describes it."""

import asyncio
import os
import signal
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
import pytest

from service.database.embedded_postgres import has_data
from tests.support.commands import call_command
from tests.support.folders import temporary_folder
from tests.support.processes import (
    COMMAND,
    RunningService,
    environment,
    read_whole_log,
    run_command,
    running_service,
)
from tests.support.waiting import PATIENCE_SECONDS, until

WORDS = ("Diajukan", "Dikirim", "Dikirim", "Antar Ulang", "Diterima", "Dibatalkan")


@pytest.fixture
def new() -> Iterator[Path]:
    """An empty state folder for an import."""
    with temporary_folder() as folder:
        yield folder


def request(url: str, body: bytes | None = None, **headers: str) -> Any:
    method = "GET" if body is None else "PUT"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = urllib.request.Request(url, body, named, method=method)  # noqa: S310 - our own service
    with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        return orjson.loads(response.read())


def send(service: RunningService, order_no: str, status: str, **headers: str) -> Any:
    body = orjson.dumps({"order_no": order_no, "cnote": "AWB1", "status": status, "note": "é\u2028"})
    return request(f"{service.url}/webhook", body, **headers)


def log_id(service: RunningService) -> str | None:
    with urllib.request.urlopen(f"{service.url}/events", timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        name: str | None = response.headers["X-Order-Tracking-Log"]
        return name


def timelines(service: RunningService, order_nos: tuple[str, ...], position: int) -> list[Any]:
    return [
        request(f"{service.url}/orders/{order_no}/timeline?limit=100&after_position={position}")
        for order_no in order_nos
    ]


async def test_a_moved_log_is_the_same_log(state_dir: Path, new: Path) -> None:
    """After a move through a pipe, the log's id, events, timelines, quarantine and receipts are equal, and the
    log continues.

    The test takes about 10 s: two services, an import, and a replay.
    """
    orders = ("KOM1", "KOM2")
    with running_service(state_dir) as old:
        for order_no in orders:
            for status in WORDS:
                last = send(old, order_no, status)
        receipt = send(old, "KOM3", "Dikirim", Idempotency_Key="once")
        request(f"{old.url}/webhook", b"no report \xff")
        log, identity = await read_whole_log(old.url), log_id(old)
        before = timelines(old, orders, receipt["position"])
        quarantined = request(f"{old.url}/quarantine/1")
        pipe = '"$@" export - | ORDER_TRACKING_STATE_DIR="$NEW" "$@" import -'
        piped = await asyncio.to_thread(
            subprocess.run,
            ["sh", "-c", pipe, "sh", *COMMAND],
            env={**environment(state_dir), "NEW": str(new)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert (piped.returncode, piped.stdout) == (0, ""), piped.stderr
        assert f"imported: the log ends at position {receipt['position']}" in piped.stderr
    assert last["position"] < receipt["position"]
    for command in (("replay",), ("replay", "--verify"), ("check",)):
        done = call_command(new, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    with running_service(new) as moved:
        assert (await read_whole_log(moved.url), log_id(moved)) == (log, identity)
        assert timelines(moved, orders, receipt["position"]) == before
        assert request(f"{moved.url}/quarantine/1") == quarantined
        assert send(moved, "KOM3", "Dikirim", Idempotency_Key="once") == receipt
        assert send(moved, "KOM3", "Diterima")["position"] == receipt["position"] + 1


@pytest.mark.long
def test_an_imported_log_is_rebuilt_by_the_next_start(
    service: RunningService, new: Path, tmp_path: Path
) -> None:
    """Without a replay, the next ``serve`` rebuilds the views."""
    position = send(service, "KOM1", "Dikirim")["position"]
    file = tmp_path / "log.ndjson"
    exported = call_command(service.state_dir, "export", str(file))
    assert (exported.returncode, exported.stdout) == (0, ""), exported.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = call_command(service.state_dir, "export", str(file))
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    imported = call_command(new, "import", str(file))
    assert imported.returncode == 0, imported.stderr

    def is_rebuilt(url: str) -> bool:
        try:
            return bool(request(f"{url}/orders/KOM1")["status"] == "in_transit")
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            return False

    with running_service(new) as moved:
        until(lambda: is_rebuilt(moved.url))
        assert send(moved, "KOM1", "Diterima")["position"] > position
    again = call_command(new, "import", str(file))
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert again.stderr.startswith("the database is not empty (rows of order_events: 2")


def test_a_wrong_file_creates_no_database(tmp_path: Path, new: Path) -> None:
    """A missing file, or one that 'export' has not written, is one line, before a database is created."""
    (tmp_path / "dump").write_bytes(b"PGDMP\n")
    for file, message in ((tmp_path / "dump", "line 1 is 'PGDMP"), (tmp_path / "absent", "cannot read ")):
        done = call_command(new, "import", str(file))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith(message)
    assert not has_data(new)


def test_an_import_that_waits_for_its_input_can_be_stopped(new: Path) -> None:
    """Ctrl-C ends an import whose pipe brings nothing."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [*COMMAND, "import"],
        env=environment(new),
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(reading)
    try:
        # The pipe is full until the command has begun to read.
        os.set_blocking(writing, False)
        line = b" " * 65_536
        assert os.write(writing, line) == len(line)

        def is_read() -> bool:
            try:
                return os.write(writing, b" ") == 1
            except BlockingIOError:
                assert process.poll() is None
                return False

        until(is_read)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        os.close(writing)
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output


def test_an_export_whose_reader_leaves_is_one_line(shared_service: RunningService, tmp_path: Path) -> None:
    """If the pipe is closed or the disk is full, the command fails with one line."""
    send(shared_service, "KOM1", "Dikirim")
    reading, writing = os.pipe()
    os.close(reading)
    for target, reason in (
        (writing, "Broken pipe"),
        (os.open("/dev/full", os.O_WRONLY), "No space left on device"),
    ):
        done = subprocess.run(
            [*COMMAND, "export"],
            env=environment(shared_service.state_dir),
            cwd=tmp_path,
            stdout=target,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        os.close(target)
        assert (done.returncode, done.stderr) == (1, f"cannot write -: {reason}\n")


def test_a_terminal_is_no_input(new: Path) -> None:
    """Without a file or a pipe, the command names both instead of waiting for a keyboard."""
    control, terminal = os.openpty()
    done = subprocess.run(
        [*COMMAND, "import"],
        env=environment(new),
        stdin=terminal,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    os.close(control)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (
        2,
        "pass the file to import, or pipe an export into this command\n",
    )


def test_help_and_list_have_both_commands(tmp_path: Path) -> None:
    """``import`` is a keyword of Python, but a command like any other."""
    listed = run_command(tmp_path, "--help").stdout
    for command, summary in {
        "export": "Write the whole log to an NDJSON file, to move it.",
        "import": "Import an exported log into an empty database.",
    }.items():
        assert summary in listed
        assert summary in call_command(tmp_path, command, "--help").stdout
