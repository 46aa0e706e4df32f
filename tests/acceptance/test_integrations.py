"""The programs of docs/integrations.md keep a shop's own tables current, however often an event arrives."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from service.database.embedded_postgres import running_dsn
from tests.support.folders import ROOT
from tests.support.processes import RunningService, run_command, running_service
from tests.support.waiting import until

PAGE: Final = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
PINNED: Final = ROOT / "tests" / "support" / "contract"
NETWORKS: Final = {"SUBSCRIPTION_NETWORKS": "127.0.0.0/8", "SUBSCRIPTION_RETRY_SECONDS": "0,0.1,0.1,0.1"}
LISTENS: Final = re.compile(r"listening on (\d+)|Development Server \(http://127\.0\.0\.1:(\d+)\) started")


def program(name: str) -> str:
    """Return the block of code that the page tells you to save under a name."""
    after = re.split(rf"[Ss]ave as\s+`{re.escape(name)}`", PAGE, maxsplit=1)[1]
    found = re.search(r"^```\w+\n(.*?)^```", after, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@contextmanager
def running(folder: Path, command: list[str], **variables: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a program of the page for the length of the block. Its output is in the file ``output``."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def port_of(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    """Wait until a program listens, and return its port."""

    def find() -> str | None:
        text = (folder / "output").read_text(encoding="utf-8")
        assert process.poll() is None, text
        found = LISTENS.search(text)
        return found and (found[1] or found[2])

    return str(until(find))


@pytest.fixture
def service(state_dir: Path) -> Iterator[RunningService]:
    """Run a service that may deliver to this machine."""
    with running_service(state_dir, **NETWORKS) as service:
        yield service


def subscribe(service: RunningService, url: str, *options: str) -> tuple[str, str]:
    """Add a subscription on the command line, and return its id and its secret."""
    done = run_command(service.state_dir, "subscriptions", "add", url, *options, **NETWORKS)
    assert done.returncode == 0, done.stderr
    (number,) = re.findall(r"^id +(\S+)$", done.stdout, re.MULTILINE)
    (secret,) = re.findall(r"^secret +(\S+)$", done.stdout, re.MULTILINE)
    return number, secret


def push(service: RunningService, order_no: str, *statuses: str) -> None:
    """Send reports as Komerce does."""
    for status in statuses:
        body = json.dumps({"order_no": order_no, "cnote": "JX1", "status": status}).encode()
        request = urllib.request.Request(f"{service.url}/webhook", body, method="PUT")  # noqa: S310 - our own
        with urllib.request.urlopen(request) as response:  # noqa: S310 - our own
            assert response.status == 200


def read_sqlite(file: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query, none while the table does not exist yet."""
    if not file.exists():
        return []
    try:
        with closing(sqlite3.connect(file, timeout=10)) as database:
            return database.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


ORDERS: Final = "SELECT order_no, version, status FROM orders ORDER BY order_no"
EXPECTED: Final = [("KOM1", 3, "delivered"), ("KOM2", 1, "in_transit")]


def check_receiver(service: RunningService, url: str, secret: str, number: str, read: Any) -> None:
    """Deliver twice, and expect each order once in its present state; a wrong signature changes nothing."""
    push(service, "KOM1", "Dijemput", "Dikirim", "Diterima")
    push(service, "KOM2", "Dikirim")
    until(lambda: read() == EXPECTED, read)
    done = run_command(service.state_dir, "subscriptions", "replay", number, "--from-position", "0")
    assert done.returncode == 0, done.stderr
    until(lambda: delivered(service, number) >= 8)
    assert read() == EXPECTED
    forged = urllib.request.Request(  # noqa: S310 - our own
        url,
        json.dumps(
            {"type": "order.advanced", "data": {"order_no": "KOM1", "version": 9, "status": "lost"}}
        ).encode(),
        {
            "webhook-id": "msg_1",
            "webhook-timestamp": "1",
            "webhook-signature": "v1,AAAA",
            "Content-Type": "application/json",
        },
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(forged)  # noqa: S310 - our own
    assert read() == EXPECTED
    assert secret not in service.output


def delivered(service: RunningService, number: str) -> int:
    """Return how many attempts were delivered."""
    with urllib.request.urlopen(f"{service.url}/subscriptions/{number}") as response:  # noqa: S310 - our own
        return int(json.load(response)["delivered"])


def check_program(
    service: RunningService, folder: Path, name: str, command: list[str], read: Any, **variables: str
) -> None:
    """Run a receiver of the page: its port and its secret are known only one after the other."""
    (folder / name).write_text(program(name), encoding="utf-8")
    # A subscription needs the receiver's port, and the receiver the subscription's secret.
    port = free_port()
    number, secret = subscribe(service, f"http://127.0.0.1:{port}/hooks/orders")
    with running(folder, command, WEBHOOK_SECRET=secret, PORT=str(port), **variables) as process:
        assert port_of(folder, process) == str(port)
        check_receiver(service, f"http://127.0.0.1:{port}/hooks/orders", secret, number, read)


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_the_python_receiver(service: RunningService, tmp_path: Path) -> None:
    """It keeps its table current."""
    read = partial(read_sqlite, tmp_path / "orders.db", ORDERS)
    check_program(service, tmp_path, "receiver.py", [sys.executable, "receiver.py"], read)


def test_the_php_receiver(service: RunningService, tmp_path: Path) -> None:
    """It keeps its table current."""
    if shutil.which("php") is None:
        pytest.skip("php is not installed")
    modules = subprocess.run(["php", "-m"], capture_output=True, text=True, check=True).stdout.split()
    if "pdo_sqlite" not in modules:
        pytest.skip("this PHP has no pdo_sqlite")
    read = partial(read_sqlite, tmp_path / "orders.db", ORDERS)
    port = free_port()
    (tmp_path / "receiver.php").write_text(program("receiver.php"), encoding="utf-8")
    number, secret = subscribe(service, f"http://127.0.0.1:{port}/receiver.php")
    command = ["php", "-S", f"127.0.0.1:{port}"]
    with running(tmp_path, command, WEBHOOK_SECRET=secret, DATABASE="orders.db") as process:
        assert port_of(tmp_path, process) == str(port)
        check_receiver(service, f"http://127.0.0.1:{port}/receiver.php", secret, number, read)


@pytest.mark.long
def test_the_node_receiver(service: RunningService, tmp_path: Path) -> None:
    """It keeps its table current, with the packages of Node.js for Standard Webhooks and PostgreSQL."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(PINNED / name, tmp_path)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=tmp_path, check=True, capture_output=True)
    dsn = running_dsn(service.state_dir)
    assert dsn is not None

    def read() -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            try:
                return connection.execute(
                    "SELECT order_no, version, status FROM shop_orders ORDER BY order_no"
                ).fetchall()
            except psycopg.errors.UndefinedTable:
                return []

    check_program(service, tmp_path, "receiver.mjs", ["node", "receiver.mjs"], read, DATABASE_URL=dsn)


def test_the_notifier(service: RunningService, tmp_path: Path) -> None:
    """It sends one message for each order on its way, however often the event arrives."""
    (tmp_path / "notifier.py").write_text(program("notifier.py"), encoding="utf-8")
    port = free_port()
    number, secret = subscribe(service, f"http://127.0.0.1:{port}/", "--status", "out_for_delivery")
    with running(tmp_path, [sys.executable, "notifier.py"], WEBHOOK_SECRET=secret, PORT=str(port)) as process:
        port_of(tmp_path, process)
        push(service, "KOM1", "Dikirim", "Diantar", "Diterima")
        push(service, "KOM2", "Diantar")
        until(lambda: delivered(service, number) >= 2)
        assert (
            run_command(service.state_dir, "subscriptions", "replay", number, "--from-position", "0").returncode
            == 0
        )
        until(lambda: delivered(service, number) >= 4)
    lines = (tmp_path / "output").read_text(encoding="utf-8").splitlines()
    messages = [line for line in lines if line.startswith("Pesanan")]
    assert sorted(messages) == [
        f"Pesanan KOM{number} sedang diantar (resi JX1). Mohon siapkan penerima di alamat tujuan."
        for number in (1, 2)
    ]


def test_the_follower(service: RunningService, tmp_path: Path) -> None:
    """It keeps its table current by the feed, and goes on where it was killed."""
    (tmp_path / "follower.py").write_text(program("follower.py"), encoding="utf-8")
    read = partial(read_sqlite, tmp_path / "orders.db", ORDERS)
    push(service, "KOM1", "Dijemput", "Dikirim")
    with running(tmp_path, [sys.executable, "follower.py"], SERVICE_URL=service.url):
        until(lambda: read() == [("KOM1", 2, "in_transit")], read)
    push(service, "KOM1", "Diterima")
    push(service, "KOM2", "Dikirim")
    with running(tmp_path, [sys.executable, "follower.py"], SERVICE_URL=service.url):
        until(lambda: read() == EXPECTED, read)
