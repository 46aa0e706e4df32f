"""A whole log moves to another database by ``move``, as docs/operations.md describes it."""

import re
import shutil
import urllib.request
from itertools import product
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.support.client import Client
from tests.support.commands import call_command
from tests.support.folders import temporary_folder
from tests.support.history import until_signed, verify
from tests.support.processes import RunningService, read_whole_log, run_command, running_service
from tests.support.receiver import Received, accept, receiving
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("all_features")

# The first attempt is at once, the second one after the test.
SETTINGS: Final = {"SUBSCRIPTION_NETWORKS": "127.0.0.0/8", "SUBSCRIPTION_RETRY_SECONDS": "0,3600"}
WORDS = ("Diajukan", "Dikirim", "Dikirim", "Antar Ulang", "Diterima", "Dibatalkan")


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


async def refuse(_received: Received) -> web.StreamResponse:
    """Refuse a delivery."""
    return web.Response(status=500)


async def signed(service: RunningService, entries: int) -> str:
    """Wait until so many entries are signed, and return the checkpoint."""
    async with aiohttp.ClientSession() as session:
        return await until_signed(Client(session, service.port), entries)


async def test_a_moved_log_is_the_same_log(state_dir: Path, empty_dsn: str, tmp_path: Path) -> None:
    """The log of an embedded database goes on in a database of your own, with all that belongs to it.

    The log's id, events, timelines, quarantine and receipts are equal. The subscription delivers the orders
    that it held, and goes on behind its position. The new proofs continue the old ones. The old database starts
    no service.
    """
    orders, own = ("KOM1", "KOM2"), {"DATABASE_URL": empty_dsn}
    async with receiving() as shop:
        shop.respond = refuse
        with running_service(state_dir, **SETTINGS) as old:
            added = call_command(state_dir, "subscriptions", "add", shop.url, **SETTINGS)
            (number,) = re.findall(r"^id +(\S+)$", added.stdout, re.MULTILINE)
            for order_no in orders:
                for status in WORDS:
                    send(old, order_no, status)
            receipt = send(old, "KOM3", "Dikirim", Idempotency_Key="once")
            request(f"{old.url}/webhook", b"no report \xff")
            await shop.wait_for_requests(3)
            log, identity = await read_whole_log(old.url), log_id(old)
            before = timelines(old, orders, receipt["position"])
            quarantined = request(f"{old.url}/quarantine/1")
            (tmp_path / "old").write_text(await signed(old, 1 + len(log)), encoding="utf-8")
            key = call_command(state_dir, "history", "key").stdout.strip()
            used = call_command(state_dir, "move", empty_dsn)
            assert (used.returncode, "other sessions are connected" in used.stderr) == (1, True), used.stderr
        done = call_command(state_dir, "move", empty_dsn)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert f"moved: the log ends at position {receipt['position']} (" in done.stderr
        for command in (("serve",), ("replay",), ("audit", "KOM1")):
            refused = run_command(state_dir, *command)
            assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
            assert "the log was moved to" in refused.stderr
        # Otherwise the service rebuilds the views while it records.
        assert call_command(state_dir, "replay", **own).returncode == 0
        shop.respond = accept
        with running_service(state_dir, **SETTINGS, **own) as moved:
            assert (await read_whole_log(moved.url), log_id(moved)) == (log, identity)
            assert timelines(moved, orders, receipt["position"]) == before
            assert request(f"{moved.url}/quarantine/1") == quarantined
            assert send(moved, "KOM3", "Dikirim", Idempotency_Key="once") == receipt
            assert send(moved, "KOM3", "Diterima")["position"] == receipt["position"] + 1
            retried = call_command(state_dir, "subscriptions", "retry", number, "--all", **SETTINGS, **own)
            assert retried.returncode == 0, retried.stderr
            # By default, a subscription is for events that advance their order.
            advanced = [*product(orders, (1, 2, 5)), ("KOM3", 1), ("KOM3", 2)]
            await shop.wait_for(len(advanced))
            assert sorted(shop.places()) == advanced
            await signed(moved, 2 + len(log))
            proved = call_command(state_dir, "proof", "KOM3", f"--since={tmp_path / 'old'}", **own)
            assert call_command(state_dir, "replay", "--verify", **own).returncode == 0
            checked = call_command(state_dir, "check", **own).stdout.splitlines()
            # The test servers run without them.
            unsafe = ["WRONG  fsync is off", "WRONG  full_page_writes is off"]
            assert [line for line in checked if line.startswith("WRONG")] == unsafe
    result = verify(proved.stdout, key, tmp_path, "--since", str(tmp_path / "old"))
    assert (result.code, "events: 2" in result.text) == (0, True), result.text


def test_a_log_moves_into_a_new_state_folder(state_dir: Path) -> None:
    """From a database to an embedded one, which ``move`` makes and stops again."""
    with running_service(state_dir) as old:
        position = send(old, "KOM1", "Dikirim")["position"]
    with temporary_folder() as new:
        done = call_command(state_dir, "move", str(new))
        assert (done.returncode, "set ORDER_TRACKING_STATE_DIR to the new database" in done.stderr) == (0, True)
        assert (
            f"the log was moved to {new}: set ORDER_TRACKING_STATE_DIR to"
            in call_command(state_dir, "audit", "KOM1").stderr
        )
        for name in ("history.key", "history.signed"):
            shutil.copy(state_dir / name, new / name)
        with running_service(new) as moved:
            assert send(moved, "KOM1", "Diterima")["version"] == 2
            assert request(f"{moved.url}/events")["events"][0]["position"] == position


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("db2.example", "TARGET_DSN: expected a URL that begins with postgresql://, or an absolute path"),
        ("postgresql://db2:port/x", "TARGET_DSN: the port 'port' of db2 is not a number from 1 to 65535"),
    ],
)
def test_a_wrong_target_is_refused_before_anything_starts(tmp_path: Path, target: str, message: str) -> None:
    """The error names the value."""
    done = call_command(tmp_path, "move", target)
    assert (done.returncode, done.stderr) == (2, f"{message}\n")
