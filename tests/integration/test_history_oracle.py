"""The served checkpoint, tiles and entries, verified by another implementation of the same formats."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.client import serving_client
from tests.support.history import until_signed
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.usefixtures("all_features")

pytest.importorskip("aics_tlog", reason="aics-tlog needs Python 3.12")

EVENTS = 600


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aics_tlog", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


async def test_another_implementation_accepts_what_is_served(dsn: str, tmp_path: Path) -> None:
    """aics-tlog verifies an entry's inclusion, and that the history continues an older checkpoint."""
    async with serving_client(dsn, state_dir=tmp_path, history_public=True) as client:
        for number in range(10):
            await client.webhook(f"KOM{number}")
        old = tmp_path / "old"
        old.write_text(await until_signed(client, 11), encoding="utf-8")
        await asyncio.gather(*(client.webhook(f"OTHER{number}") for number in range(EVENTS)))
        await until_signed(client, 11 + EVENTS)
        key = (await client.text("/history/key")).strip()
        prefix = ("--tiles", str(client.url("/history")), "--log-key", key)
        async with client.session.get(client.url("/history/tile/entries/000")) as response:
            data = await response.read()
        length = int.from_bytes(data[:2], "big")
        header, second = data[2 : 2 + length], data[2 + length :]
        leaf = tmp_path / "leaf"
        for index, entry in enumerate((header, second[2 : 2 + int.from_bytes(second[:2], "big")])):
            leaf.write_bytes(entry)
            done = await asyncio.to_thread(
                run, "verify-inclusion", *prefix, "--index", str(index), "--leaf", leaf
            )
            assert done.returncode == 0, done.stdout + done.stderr
        done = await asyncio.to_thread(run, "verify-consistency", *prefix, "--old-checkpoint", old)
        assert done.returncode == 0, done.stdout + done.stderr
        leaf.write_bytes(header.replace(b'"existing":', b'"existing":9'))
        done = await asyncio.to_thread(run, "verify-inclusion", *prefix, "--index", "0", "--leaf", leaf)
        assert done.returncode != 0
