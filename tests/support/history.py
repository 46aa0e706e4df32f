"""The history in tests: waiting for a signature, and the verifier as a stranger runs it."""

import json
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, NamedTuple

from projections.postgres import Connection
from service.database.connections import DedicatedConnection, connect
from service.event_log.follow import Memory
from service.features.proofs.api import VERIFY_PY
from service.features.proofs.follower import Follower
from service.features.proofs.signer import Signer
from tests.support.client import Client
from tests.support.waiting import PATIENCE_SECONDS, until_async


class Result(NamedTuple):
    """The exit code of the verifier, and its output."""

    code: int
    text: str


async def until_signed(client: Client, size: int) -> str:
    """Wait until the history is signed at a size or above, and return the checkpoint."""
    notes: list[str] = []

    async def is_signed() -> bool:
        async with client.session.get(client.url("/history/checkpoint")) as response:
            if response.status != 200:
                return False
            notes.append(await response.text())
        return read_size(notes[-1]) >= size

    await until_async(is_signed)
    return notes[-1]


async def build_history(dsn: str, key_file: Path) -> None:
    """Add every event of a log to its history, and sign it."""

    def connect_again() -> Awaitable[Connection]:
        return connect(dsn)

    writing = DedicatedConnection(connect_again)
    try:
        follower = Follower(writing, Memory(writing), Signer(key_file))
        while await follower.step():
            pass
    finally:
        await writing.close()


def read_size(note: str) -> int:
    """Return the size of a checkpoint."""
    return int(note.splitlines()[1])


def verify(bundle: Any, key: str, folder: Path, *options: str, others: tuple[Any, ...] = ()) -> Result:
    """Verify a bundle, or several, with the verifier alone: a file, in an isolated Python."""
    files = []
    for number, one in enumerate((bundle, *others)):
        file = folder / f"{number}.proof.json"
        file.write_text(one if isinstance(one, str) else json.dumps(one), encoding="utf-8")
        files.append(str(file))
    done = subprocess.run(
        [sys.executable, "-I", str(VERIFY_PY), *files, "--key", key, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    return Result(done.returncode, done.stdout + done.stderr)
