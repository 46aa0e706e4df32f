"""The operator's key, its guard, and the signatures.

The key is a file outside the database. Beside it is the guard: the last checkpoint that the key has signed.
Only a tree that continues the guard is signed. So a history that was changed, or that a restore or a failover
has made shorter, stays without a signature until an operator restarts it with a reason.
"""

import asyncio
import fcntl
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from projections.postgres import Connection
from service.errors import OperatorError
from service.features.proofs import storage
from service.features.proofs.notes import (
    Checkpoint,
    NoteError,
    SigningKey,
    VerifierKey,
    make_key,
    open_note,
    read_checkpoint,
    read_signing_key,
    sign_note,
)
from service.features.proofs.settings import ProofsSettings
from service.features.proofs.storage import RESTART, HistoryHaltedError, Tree

KEY_SUFFIX: Final = ".key"
GUARD_SUFFIX: Final = ".signed"
LOCK_SUFFIX: Final = ".lock"
# The guard of a key that has signed nothing yet.
NOTHING: Final = ""
DEFAULT_ORIGIN: Final = "order-tracking.invalid/{}"
ORIGIN_BYTES: Final = 8
LAST: Final = "order-tracking.last.v1"


class NotSigningError(OperatorError):
    """This process does not sign the history: it has no key, or another one. ``str()`` is the reason."""


class KeyFileError(OperatorError):
    """The key's file or its guard cannot be read, written or used. ``str()`` is the reason, and what to do."""


class Signed(NamedTuple):
    """A signed checkpoint: its tree, itself, and its note."""

    tree: Tree
    checkpoint: Checkpoint
    note: str


class Signer:
    """Signs checkpoints and statements, if this machine has the key of the tree.

    Args:
        key_file: the file with the key.
        origin: the log's name for a new key; empty for a random one.
        is_reader: whether this process only reads, perhaps from a standby that is behind. It signs nothing.
    """

    def __init__(self, key_file: Path, origin: str = "", *, is_reader: bool = False) -> None:
        self.key_file = key_file
        self._is_reader = is_reader
        name = key_file.name.removesuffix(KEY_SUFFIX)
        self.guard_file = key_file.with_name(f"{name}{GUARD_SUFFIX}")
        self._lock_file = key_file.with_name(f"{name}{LOCK_SUFFIX}")
        self._origin = origin

    def read_keys(self) -> list[SigningKey]:
        """Return the keys of the key file, none if there is no such file. Each of them signs.

        Raises:
            KeyFileError: the file cannot be read, or a line is not a key.
        """
        try:
            lines = self.key_file.read_text(encoding="utf-8").splitlines()
            keys = [read_signing_key(line.strip()) for line in lines if line.strip()]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeError) as error:
            raise KeyFileError(f"cannot read the history's key: {error}") from None
        except NoteError as error:
            raise KeyFileError(f"{self.key_file} is not a key file: {error}; put the right one there") from None
        if not keys or len({key.name for key in keys}) > 1:
            raise KeyFileError(f"{self.key_file} must have one key, or several of one name")
        return keys

    @property
    def key_changed_at(self) -> int:
        """When the key file was changed last, in nanoseconds; 0 if there is none."""
        try:
            return self.key_file.stat().st_mtime_ns
        except OSError:
            return 0

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep other processes of this machine from signing, also those that use another database.

        Raises:
            KeyFileError: the file of the lock cannot be made.
        """
        try:
            descriptor = os.open(self._lock_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise KeyFileError(f"cannot make {self._lock_file}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def make_keys(self) -> list[SigningKey]:
        """Return the keys of the key file, which is made with a new key if there is none.

        Raises:
            KeyFileError: the file can be neither read nor made.
        """
        if keys := self.read_keys():
            return keys
        key = make_key(self._origin or DEFAULT_ORIGIN.format(secrets.token_hex(ORIGIN_BYTES)))
        try:
            self.key_file.parent.mkdir(parents=True, exist_ok=True)
            if not self.guard_file.exists():
                # Before the key: a key without a guard may have signed anything.
                _write(self.guard_file, NOTHING, may_replace=False)
            _write(self.key_file, f"{key.text}\n", may_replace=False)
        except FileExistsError:
            # Another process was first.
            return self.read_keys()
        except OSError as error:
            raise KeyFileError(f"cannot make the history's key {self.key_file}: {error.strerror}") from None
        return [key]

    async def sign(self, connection: Connection) -> Signed:
        """Sign the tree at its present size, and publish the checkpoint.

        Args:
            connection: a connection whose transaction holds the lock and has not added to the tree.

        Raises:
            NotSigningError: the history has not begun, or this machine has no key.
            KeyFileError: the key is not the tree's, or cannot be used, or the guard cannot be written.
            HistoryHaltedError: the tree does not continue the guard.
        """
        tree, keys = await self._read_own_tree(connection)
        async with self.locked():
            guard = self.read_guard()
            (root,) = await self._read_roots(connection, tree, keys, guard, tree.size)
            checkpoint = Checkpoint(tree.origin, tree.size, root)
            note = sign_note(checkpoint.text, keys)
            if guard != note:
                await self.write_guard(note)
        await storage.set_checkpoint(connection, tree.number, checkpoint, note)
        return Signed(tree, checkpoint, note)

    async def write_guard(self, note: str) -> None:
        """Record what is signed, before anyone can see it.

        Raises:
            KeyFileError: the file cannot be written.
        """
        try:
            await asyncio.to_thread(_write, self.guard_file, note)
        except OSError as error:
            raise KeyFileError(f"cannot write {self.guard_file}: {error.strerror}") from None

    async def read_signed(self, connection: Connection) -> Signed:
        """Return the last signed checkpoint, from which proofs may be given.

        Args:
            connection: a connection. In a transaction that sees one state of the database, nothing may have
                been read before: the guard must not be newer than that state.

        Raises:
            NotSigningError: nothing is signed yet, or this machine has no key.
            KeyFileError: the key is not the tree's, or cannot be used.
            HistoryHaltedError: the tree does not continue the guard.
        """
        guard = self.read_guard()
        tree, keys = await self._read_own_tree(connection)
        # This raises an error if the tree does not continue the guard.
        await self._read_roots(connection, tree, keys, guard)
        published = self.find_published(tree)
        if published is None:
            raise NotSigningError("nothing is signed yet")
        return published

    def find_published(self, tree: Tree | None) -> Signed | None:
        """Return the last published checkpoint of a tree; None if none of its keys has signed it."""
        if tree is None or tree.note is None:
            return None
        with suppress(NoteError):
            checkpoint = read_checkpoint(open_note(tree.note, self.find_verifiers(tree)))
            if checkpoint.origin == tree.origin and checkpoint.size <= tree.size:
                return Signed(tree, checkpoint, tree.note)
        return None

    def state_last(self, signed: Signed, first: int, last: int, count: int) -> str:
        """Return the signed statement that an order has these events below a checkpoint, and no other.

        Args:
            signed: the checkpoint.
            first: the index of the order's first event.
            last: that of its last one.
            count: the number of its events.
        """
        text = f"{LAST}\n{signed.checkpoint.text}{first} {last} {count}\n"
        return sign_note(text, self._keys_of(signed.tree))

    async def _read_own_tree(self, connection: Connection) -> tuple[Tree, list[SigningKey]]:
        tree = await storage.read_tree(connection)
        if tree is None:
            raise NotSigningError("the history has not begun yet")
        return tree, self._keys_of(tree)

    def find_verifiers(self, tree: Tree | None) -> list[VerifierKey]:
        """Return the public keys that sign a tree: those of the key file if the tree's is one of them.

        Before the first tree, return those of the key file.
        """
        try:
            return [key.verifier for key in (self.read_keys() if tree is None else self._keys_of(tree))]
        except (NotSigningError, KeyFileError):
            return [] if tree is None else [tree.key]

    def _keys_of(self, tree: Tree) -> list[SigningKey]:
        if self._is_reader:
            raise NotSigningError("this process only reads (ORDER_TRACKING_READ_ONLY): ask one that records")
        keys = self.read_keys()
        if not keys:
            raise NotSigningError(
                f"{self.key_file} does not exist: the history's key is on another machine, or must be put back"
            )
        if tree.key not in [key.verifier for key in keys]:
            raise KeyFileError(
                f"{self.key_file} is not the history's key, which is {tree.key}: put that key there, or, if it "
                "is lost, run 'history restart REASON'"
            )
        if self._origin not in {"", tree.origin}:
            raise KeyFileError(
                f"ORDER_TRACKING_HISTORY_ORIGIN is {self._origin}, but the history's origin is {tree.origin}: "
                "remove the setting"
            )
        return keys

    async def _read_roots(
        self, connection: Connection, tree: Tree, keys: Sequence[SigningKey], guard: str | None, *sizes: int
    ) -> list[bytes]:
        """Return the roots at some sizes of a tree that continues the guard.

        Raises:
            HistoryHaltedError: it does not.
        """
        if guard is None:
            raise HistoryHaltedError(
                f"the guard {self.guard_file} is missing, so the last signed checkpoint is unknown: put it "
                "back, or, if it is lost, run 'history restart REASON'"
            )
        if guard == NOTHING:
            if tree.note is not None:
                raise HistoryHaltedError(
                    f"the guard {self.guard_file} is of a key that has signed nothing: put the right one there"
                )
            return await storage.read_roots(connection, tree.number, *sizes)
        try:
            signed = read_checkpoint(open_note(guard, [key.verifier for key in keys]))
        except NoteError as error:
            raise HistoryHaltedError(f"the guard {self.guard_file} cannot be used: {error}") from None
        if signed.size > tree.size:
            raise HistoryHaltedError(
                f"the history has {tree.size} entries, but {signed.size} were signed: {RESTART}"
            )
        guarded, *roots = await storage.read_roots(connection, tree.number, signed.size, *sizes)
        if guarded != signed.root:
            raise HistoryHaltedError(
                f"the first {signed.size} entries are not those that were signed: {RESTART}"
            )
        return roots

    def read_guard(self) -> str | None:
        """Return the last checkpoint's note, NOTHING before the first, None if there is no guard.

        Raises:
            HistoryHaltedError: the file cannot be read.
        """
        try:
            return self.guard_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeError) as error:
            raise HistoryHaltedError(f"the guard {self.guard_file} cannot be read: {error}") from None


def make_signer(settings: ProofsSettings) -> Signer:
    """Return the signer of a configured service."""
    return Signer(settings.history_key, settings.history_origin, is_reader=settings.read_only)


def _write(file: Path, text: str, *, may_replace: bool = True) -> None:
    """Write a private file, whole or not at all, even in a power cut."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as written:
            written.write(text)
            written.flush()
            os.fsync(descriptor)
        if may_replace:
            Path(name).replace(file)
        else:
            file.hardlink_to(name)
    finally:
        Path(name).unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
