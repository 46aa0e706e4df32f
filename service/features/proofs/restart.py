"""The restart of the history by an operator, after a restore or a failover has lost signed entries."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from projections.postgres import Connection
from service.database.operations import Actor, record_operation
from service.features.proofs import storage
from service.features.proofs.entries import encode_header
from service.features.proofs.follower import begin
from service.features.proofs.notes import (
    Checkpoint,
    NoteError,
    VerifierKey,
    open_note,
    read_checkpoint,
    sign_note,
)
from service.features.proofs.signer import NotSigningError, Signer
from service.features.proofs.storage import HistoryHaltedError, Tree

ACTION: Final = "history_restarted"


async def restart(connection: Connection, signer: Signer, reason: str, actor: Actor) -> Checkpoint:
    """Begin another tree, whose first entry has the last signed checkpoint and the reason.

    Args:
        connection: a connection outside any transaction.
        signer: the key, which is made if there is none. Its guard then begins again.
        reason: why.
        actor: who restarts it.

    Raises:
        NotSigningError: there is no history.
        KeyFileError: the key or its guard cannot be used.
    """
    async with connection.transaction():
        await storage.lock(connection)
        tree = await storage.read_tree(connection)
        if tree is None:
            raise NotSigningError("the history has not begun yet, so there is nothing to restart: run 'serve'")
        keys = signer.make_keys()
        key = keys[0].verifier
        continues = {"note": _last_note(signer, tree), "reason": reason}
        existing = await storage.count_events(connection)
        header = encode_header(key.name, str(key), existing, continues).decode()
        new = tree._replace(number=tree.number + 1, header=header, size=0, note=None)
        checkpoint = await begin(connection, new)
        note = sign_note(checkpoint.text, keys)
        await storage.set_checkpoint(connection, new.number, checkpoint, note)
        await record_operation(connection, actor, ACTION, key.name, reason)
        # Before the commit: if that fails, the guard refuses the old tree too, until another restart.
        async with signer.locked():
            await signer.write_guard(note)
    return checkpoint


def _last_note(signer: Signer, tree: Tree) -> str:
    """Return the last checkpoint that was signed: the guard's, or else the published one, or else nothing."""
    verifiers = [tree.key, *signer.find_verifiers(None)]
    with suppress(HistoryHaltedError):
        if _is_signed(note := signer.read_guard(), verifiers):
            return note or ""
    return tree.note or "" if _is_signed(tree.note, verifiers) else ""


def _is_signed(note: str | None, verifiers: Sequence[VerifierKey]) -> bool:
    try:
        read_checkpoint(open_note(note or "", verifiers))
    except NoteError:
        # It is missing or damaged, or another key signed it.
        return False
    return True
