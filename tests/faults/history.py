"""The history during a fault: every checkpoint on the way, and the tree at the end."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from service.database.connections import connected
from service.features.proofs import storage
from service.features.proofs.check import check_history
from service.features.proofs.notes import open_note, read_checkpoint
from service.features.proofs.signer import Signer
from service.features.proofs.status import Status, read_status
from tests.support.account import Violations
from tests.support.connections import OK, Connections, get
from tests.support.waiting import until_async

LOOK_SECONDS: Final = 0.2
RESTART_REASON: Final = "the harness lost commits"

Command = Callable[..., Awaitable[tuple[int, str]]]


class Checkpoints:
    """Follows the signed history as an auditor does.

    Args:
        port: the service's port.
        state_dir: the folder with the key.
    """

    def __init__(self, port: int, state_dir: Path) -> None:
        self._connections = Connections(port)
        self._signer = Signer(state_dir / "history.key")
        # The notes that were served, by their text.
        self.seen: dict[str, None] = {}

    async def watch(self) -> None:
        """Read the checkpoint until cancelled."""
        try:
            while True:
                response = await self._connections.request(get("/history/checkpoint"))
                if response is not None and response.status == OK:
                    self.seen[response.body.decode()] = None
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._connections.close()

    async def account(self, dsn: str, command: Command, violations: Violations, *, may_halt: bool) -> None:
        """Compare the tree with the log and with every checkpoint that was seen.

        Args:
            dsn: the database.
            command: runs a command of the service.
            violations: the broken promises.
            may_halt: whether the fault has lost commits, and perhaps signed entries with them.
        """
        status = await self._until_settled(dsn)
        if status.halted is not None:
            violations.expect(may_halt, f"the history is halted, but no commit was lost: {status.halted}")
            code, output = await command("check")
            is_found = code == 1 and "the history is not signed any more" in output
            violations.expect(is_found, "check does not find that the history is halted")
            code, output = await command("history", "restart", RESTART_REASON)
            violations.expect(code == 0, f"the history cannot be restarted: {output}")
            self.seen.clear()
            await self._until_settled(dsn)
        async with connected(dsn) as connection:
            tree = await storage.read_tree(connection)
            if tree is None:
                violations.expect(not await storage.count_events(connection), "the history has not begun")
                return
            violations.expect(
                tree.size == tree.head + 1,
                f"the history has {tree.size} entries, the log's head is {tree.head}",
            )
            for note in self.seen:
                checkpoint = read_checkpoint(open_note(note, self._signer.find_verifiers(tree)))
                is_continued = checkpoint.size <= tree.size and [checkpoint.root] == await storage.read_roots(
                    connection, tree.number, checkpoint.size
                )
                violations.expect(is_continued, f"checkpoint {checkpoint.size} is not continued")
            checked = await check_history(connection, self._signer, whole=True)
        violations.add(
            "entries that differ from the log",
            [f"{position}: {problem}" for position, problem in checked.differences],
        )
        violations.add("tiles that do not fit", [str(tile) for tile in checked.tiles])

    async def _until_settled(self, dsn: str) -> Status:
        """Wait until the history is signed up to the log's head, or halted."""
        found: list[Status] = []

        async def is_settled() -> bool:
            async with connected(dsn) as connection:
                tree = await storage.read_tree(connection)
                status = await read_status(self._signer, connection)
                found.append(status)
                if tree is None:
                    return not await storage.count_events(connection)
            return status.halted is not None or status.signed == tree.head + 1

        await until_async(is_settled)
        return found[-1]
