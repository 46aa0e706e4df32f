"""The history on the command line: proofs, keys, checkpoints, the check, and what a backup or a move does."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.client import Client
from tests.support.commands import Completed, call_command
from tests.support.folders import temporary_folder
from tests.support.history import until_signed, verify
from tests.support.processes import RunningService, running_service

pytestmark = pytest.mark.usefixtures("all_features")

FILES = ("history.key", "history.signed")


@pytest.fixture
def new() -> Iterator[Path]:
    """An empty state folder."""
    with temporary_folder() as folder:
        yield folder


def succeed(done: Completed) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


async def report(service: RunningService, size: int, *reports: tuple[str, str]) -> str:
    """Send reports, wait until the history is signed at a size, and return the checkpoint."""
    async with aiohttp.ClientSession() as session:
        client = Client(session, int(service.url.rpartition(":")[2]))
        for order_no, status in reports:
            await client.webhook(order_no, status)
        return await until_signed(client, size)


async def get(service: RunningService, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}{path}") as response:
        return response.status, await response.json(content_type=None)


async def test_a_proof_is_made_and_verified(service: RunningService, tmp_path: Path) -> None:
    """The commands print the key, a checkpoint and a proof, and verify it: as a command, and as one file."""
    state = service.state_dir
    old = await report(service, 3, ("KOM1", "Diajukan"), ("KOM1", "Dikirim"))
    key = succeed(call_command(state, "history", "key")).strip()
    assert succeed(call_command(state, "history", "checkpoint")) == old
    (tmp_path / "old").write_text(old, encoding="utf-8")
    await report(service, 5, ("KOM1", "Diterima"), ("KOM2", "Diajukan"))
    bundle = tmp_path / "bundle.json"
    bundle.write_text(succeed(call_command(state, "proof", "KOM1", "--bodies", f"--since={tmp_path / 'old'}")))
    options = ("--since", str(tmp_path / "old"))
    alone = verify(bundle.read_text(), key, tmp_path, *options)
    assert (alone.code, "events: 3" in alone.text, '"status": "Dikirim"' in alone.text) == (0, True, True)
    key_file = tmp_path / "key"
    key_file.write_text(f"{key}\n", encoding="utf-8")
    done = call_command(state, "verify", str(bundle), "--key", str(key_file), *options)
    assert (done.returncode, done.stdout) == (0, alone.text)
    bundle.write_text(bundle.read_text().replace("Dikirim", "Selesai"), encoding="utf-8")
    done = call_command(state, "verify", str(bundle), "--key", key)
    assert (done.returncode, done.stdout.startswith("NOT VALID: ")) == (1, True)
    assert call_command(state, "verify", str(tmp_path / "absent"), "--key", key).returncode == 2
    for order_no in ("KOM3", "KOM 3"):
        done = call_command(state, "proof", order_no)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"no such event of {order_no}" in done.stderr
    async with aiohttp.ClientSession() as session:
        receipt = await Client(session, int(service.url.rpartition(":")[2])).webhook("KOM1", "Selesai")
    after = f"--after-position={receipt['position']}"
    part = json.loads(succeed(call_command(state, "proof", "KOM1", after, "--from-version=3")))
    assert [json.loads(event["entry"])["version"] for event in part["events"]] == [3, 4]
    done = call_command(state, "proof", "KOM1", "--after-position=99")
    assert (done.returncode, "the log ends at position 5" in done.stderr) == (1, True)
    done = call_command(state, "proof", "KOM1", "--since", str(bundle))
    assert (done.returncode, "not a file with a checkpoint" in done.stderr) == (2, True)


async def test_the_check_compares_the_history(service: RunningService) -> None:
    """It says how far the history is signed, names each changed position, and guards the key's file."""
    state = service.state_dir
    await report(service, 3, ("KOM1", "Diajukan"), ("KOM1", "Dikirim"))
    for options in ((), ("--history",)):
        checked = succeed(call_command(state, "check", *options))
        assert "the history has 3 entries, of which 3 are signed; 3 were compared with the log" in checked
        assert "tables, constraints, triggers and rights are those of this release" in checked
    (state / "history.key").chmod(0o644)
    done = call_command(state, "check")
    assert (done.returncode, "other users can read the history's key: run 'chmod 600" in done.stdout) == (
        1,
        True,
    )
    (state / "history.key").chmod(0o600)
    (state / "history.signed").rename(state / "away")
    done = call_command(state, "check")
    assert (done.returncode, "the history is not signed any more: the guard" in done.stdout) == (1, True)


async def test_a_key_is_replaced(service: RunningService, tmp_path: Path) -> None:
    """A second line signs too; without the key, a restart makes a new one, and says so."""
    state = service.state_dir
    await report(service, 2, ("KOM1", "Diajukan"))
    old = succeed(call_command(state, "history", "key")).strip()
    with (state / "history.key").open("a", encoding="utf-8") as file:
        file.write(succeed(call_command(state, "history", "new-key")))
    await report(service, 3, ("KOM1", "Dikirim"))
    keys = succeed(call_command(state, "history", "key")).split()
    assert (len(keys), keys[0]) == (2, old)
    bundle = succeed(call_command(state, "proof", "KOM1"))
    for key in keys:
        assert verify(bundle, key, tmp_path).code == 0
    (state / "history.key").unlink()
    done = call_command(state, "proof", "KOM1")
    assert (done.returncode, "must be put back" in done.stderr) == (1, True)
    done = call_command(state, "history", "restart", "the key was lost")
    assert (done.returncode, "there is a new key" in done.stderr) == (0, True)
    await report(service, 3)
    assert succeed(call_command(state, "history", "key")).strip() not in keys


def test_nothing_is_restarted_without_a_history(state_dir: Path) -> None:
    """Before the first event there is nothing to print and nothing to restart, and a reason is needed."""
    for arguments in (("history", "key"), ("history", "checkpoint"), ("history", "restart", "a reason")):
        done = call_command(state_dir, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    done = call_command(state_dir, "history", "restart", " ")
    assert (done.returncode, "reason" in done.stderr) == (2, True)
    done = call_command(state_dir, "proof", "KOM1")
    assert (done.returncode, "has not begun yet" in done.stderr) == (1, True)


async def test_a_restored_backup_is_not_signed_until_a_restart(
    service: RunningService, new: Path, tmp_path: Path
) -> None:
    """A backup, a hundred webhooks, a restore: proofs are refused, webhooks go on, and a restart helps."""
    state, dump = service.state_dir, tmp_path / "dump"
    await report(service, 3, ("KOM1", "Diajukan"), ("KOM1", "Dikirim"))
    succeed(call_command(state, "backup", str(dump)))
    note = await report(service, 103, *((f"LOST{number}", "Diajukan") for number in range(100)))
    old = succeed(call_command(state, "proof", "KOM1"))
    key = succeed(call_command(state, "history", "key")).strip()
    service.end()
    refused = call_command(new, "restore", str(dump))
    assert (refused.returncode, "copy history.key and history.signed" in refused.stderr) == (1, True)
    assert refused.stderr.endswith("nothing was restored\n")
    for name in FILES:
        shutil.copy(state / name, new / name)
    again = call_command(new, "restore", "--new-history", str(dump))
    assert (again.returncode, "belong to another history" in again.stderr) == (2, True)
    succeed(call_command(new, "restore", str(dump)))
    with running_service(new) as restored:
        async with aiohttp.ClientSession() as session:
            client = Client(session, int(restored.url.rpartition(":")[2]))
            await client.webhook("KOM2", "Diajukan")
        status, problem = await get(restored, "/orders/KOM1/proof")
        assert (status, problem["type"]) == (503, "/problems/history-halted")
        assert "but 103 were signed" in problem["detail"]
        checked = call_command(new, "check")
        assert (checked.returncode, "but 103 were signed" in checked.stdout) == (1, True)
        done = call_command(new, "proof", "KOM1")
        assert (done.returncode, "history restart REASON" in done.stderr) == (1, True)
        assert "is not the newest checkpoint" in call_command(new, "history", "checkpoint").stderr
        status, problem = await get(restored, "/history/checkpoint")
        assert (status, problem["type"]) == (503, "/problems/history-halted")
        succeed(call_command(new, "history", "restart", "restored the backup of noon"))
        await report(restored, 4)
        bundle = succeed(call_command(new, "proof", "KOM2"))
        again = call_command(new, "history", "restart", "once more")
        assert (again.returncode, "nothing to restart; --force" in again.stderr) == (1, True)
        assert "4 entries, of which 4 are signed" in succeed(call_command(new, "check", "--history"))
    result = verify(bundle, key, tmp_path)
    assert (result.code, "restored the backup of noon" in result.text) == (0, True)
    (tmp_path / "old").write_text(note, encoding="utf-8")
    result = verify(bundle, key, tmp_path, "--since", str(tmp_path / "old"))
    assert (result.code, "is newer than the proof" in result.text) == (1, True)
    assert json.loads(json.loads(bundle)["log"]["entry"])["continues"]["note"] == note
    assert verify(old, key, tmp_path).code == 0


async def test_a_restore_can_begin_a_new_history(service: RunningService, new: Path, tmp_path: Path) -> None:
    """Without the key, the operator begins a new history with another one, and says so."""
    state, dump = service.state_dir, tmp_path / "dump"
    await report(service, 3, ("KOM1", "Diajukan"), ("KOM1", "Dikirim"))
    succeed(call_command(state, "backup", str(dump)))
    succeed(call_command(new, "restore", "--new-history", str(dump)))
    with running_service(new) as restored:
        await report(restored, 3)
        key = succeed(call_command(new, "history", "key")).strip()
        bundle = succeed(call_command(new, "proof", "KOM1"))
    assert key != succeed(call_command(state, "history", "key")).strip()
    result = verify(bundle, key, tmp_path)
    assert (result.code, "recorded before it began: 2" in result.text) == (0, True)
