"""The follower: it adds each event to the tree, a moment after its commit, and signs the tree at rest.

Any process may add to the tree; they take turns. Only one that has the key signs. Neither delays a webhook.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from time import monotonic
from typing import Final, NamedTuple, NoReturn, TypeVar

import structlog

from projections.postgres import Connection
from service.background import wait_for_event
from service.database.connections import DedicatedConnection
from service.event_log import store
from service.event_log.follow import AwaitedPosition, Memory, Place, follow, has_place
from service.features.proofs import storage
from service.features.proofs.entries import (
    NO_SALT,
    SALT_BYTES,
    EventPlace,
    Leaf,
    commit,
    encode_gap,
    encode_header,
    encode_recorded,
)
from service.features.proofs.notes import Checkpoint
from service.features.proofs.signer import KeyFileError, NotSigningError, Signer
from service.features.proofs.storage import Commitments, HistoryHaltedError, Tree
from service.features.proofs.tree import Edge, hash_leaf

# A batch shares a transaction. Memory keeps at least twice as many events.
BATCH_LEAVES_MAX: Final = 1_000
# The event loop is held while so many leaves are made or hashed: about 0.3 ms.
SLICE_LEAVES: Final = 50
# The pause after a batch ends when memory has a full one, or else after so long. The next batch then shares the
# cost of a transaction and of a signature.
IDLE_SECONDS: Final = 1.0
POLL_SECONDS: Final = 1.0
SIGN_SECONDS_MIN: Final = 1.0

T = TypeVar("T")


class _Entries(NamedTuple):
    """The next entries of a tree.

    Attributes:
        hashes: their hashes.
        salts: the salts of those positions that had none, joined.
        commitments: the commitments of positions that an erasure has marked.
    """

    hashes: list[bytes]
    salts: bytes
    commitments: Mapping[int, bytes]


logger = structlog.get_logger()


class Follower:
    """Adds events to the tree, and signs it.

    Args:
        dedicated: the connection, whose commits wait for the disk.
        memory: the events of this process that are still in memory.
        signer: the key and its guard.

    Attributes:
        wake: set when the log has grown.
        reach: the last position that is signed, as far as this process knows.
    """

    def __init__(self, dedicated: DedicatedConnection, memory: Memory, signer: Signer) -> None:
        self._dedicated = dedicated
        self._memory = memory
        self._signer = signer
        self.wake = asyncio.Event()
        self.reach = AwaitedPosition(self.wake.set)
        # The right edge of the tree, as this connection to the database has seen it.
        self._edge = Edge(0, {})
        self._edge_of = (0, 0)
        # The hash of its last entry. After a restore, a tree of the same size may have another one.
        self._last_leaf = b""
        # Whether the last batch was full, so that there may be another one.
        self._is_full = False
        # The last position of the next batch if that is full, and whether memory has the batch.
        self._full_at = 0
        self._has_full_batch = asyncio.Event()
        self._signed: tuple[int, ...] | None = None
        self._sign_at = 0.0
        self._problem = ""

    def notice(self, position: int) -> None:
        """End the rest if memory has a full batch by now.

        Args:
            position: that of the last event in memory.
        """
        if position >= self._full_at and self._memory.recall(self._edge.size - 1, 1):
            self._has_full_batch.set()

    async def run(self) -> NoReturn:
        """Follow the log. Run this under ``supervise``."""
        await follow(self.step, self.wake, poll_seconds=POLL_SECONDS, rest=self._rest)

    async def _rest(self, added: int) -> None:
        """Let events gather in memory after a batch, but not so many that memory drops them."""
        if added == BATCH_LEAVES_MAX and not self._memory.recall(self._edge.size - 1, 1):
            # The log may have more.
            return
        self._full_at = self._edge.size + BATCH_LEAVES_MAX - 1
        self._has_full_batch.clear()
        if not self._memory.recall(self._full_at - 1, 1):
            await wait_for_event(self._has_full_batch, IDLE_SECONDS)

    async def step(self) -> int:
        """Add the next events, or sign those that were added; return the number of entries that were added."""
        added = 0
        await self._memory.hear_in_time()
        if self._is_full or self._memory.recall(self._edge.size - 1, 1) or await self._has_events():
            # Until the commit, this process does not know the edge.
            edge, self._edge = self._edge, Edge(0, {})
            try:
                async with self._dedicated.transaction(storage.BEGIN_LOCKED) as connection:
                    added, edge = await self._add(connection, edge)
            except HistoryHaltedError as error:
                # Nothing was added. Each webhook wakes this task, but an operator must act first.
                self._is_full = False
                self._report(str(error))
                await asyncio.sleep(POLL_SECONDS)
                return 0
            self._edge = edge
        self._is_full = added >= BATCH_LEAVES_MAX
        if not self._is_full or monotonic() > self._sign_at:
            self._sign_at = monotonic() + SIGN_SECONDS_MIN
            await self._sign(is_grown=added > 0)
        return added

    async def _has_events(self) -> bool:
        async with self._dedicated.connection() as connection:
            tree = await storage.read_tree(connection)
        return tree is None or tree.head >= tree.size

    async def _sign(self, *, is_grown: bool) -> None:
        if not is_grown:
            async with self._dedicated.connection() as connection:
                tree = await storage.read_tree(connection)
            if tree is None or (*self._state_of(tree), self._signer.key_changed_at) == self._signed:
                return
        async with self._dedicated.transaction(storage.BEGIN_LOCKED) as connection:
            try:
                tree = (await self._signer.sign(connection)).tree
            except (HistoryHaltedError, NotSigningError, KeyFileError) as error:
                self._report(str(error))
                return
        self._signed = *self._state_of(tree), self._signer.key_changed_at
        self._report("")
        self.reach.move(tree.size - 1)

    def _state_of(self, tree: Tree) -> tuple[int, int, int]:
        # After a reconnect, the database may be another one.
        return self._dedicated.times_opened, tree.number, tree.size

    async def _add(self, connection: Connection, edge: Edge) -> tuple[int, Edge]:
        """Add the next events; return the number of entries that were added, and the new edge."""
        tree = await storage.read_tree(connection)
        if tree is None:
            return await self._begin(connection), edge
        state = self._state_of(tree)
        if self._edge_of[1] not in {0, tree.number}:
            logger.info("the history was restarted", tree=tree.number, header=tree.header)
        if (*state, tree.last_leaf) != (*self._edge_of, edge.size, self._last_leaf):
            self._edge_of, edge = state[:2], await storage.read_edge(connection, tree)
        entries = await self._recall(connection, tree) or await _read(connection, tree)
        if entries is None:
            return 0, edge
        await storage.grow(connection, tree, edge, entries.hashes, entries.salts)
        self._last_leaf = entries.hashes[-1]
        if entries.commitments:
            await storage.set_commitments(connection, entries.commitments)
        return len(entries.hashes), edge

    async def _begin(self, connection: Connection) -> int:
        """Begin the first tree with the first event, and make the key before, unless there is one."""
        try:
            key = self._signer.make_keys()[0].verifier
        except KeyFileError as error:
            self._report(str(error))
            return 0
        # Until then, an import may bring its own tree.
        if not await store.head_position(connection):
            return 0
        # If this process recorded the first event a moment ago, it has followed the log from the beginning.
        existing = 0 if self._memory.recall(0, 1) else await storage.count_events(connection)
        header = encode_header(key.name, str(key), existing, None).decode()
        tree = Tree(1, header, size=0, last_leaf=b"", salted=0, has_commitments=False, head=0, note=None)
        await begin(connection, tree)
        logger.info("the history has begun", origin=key.name, key=str(key), existing=existing)
        return 1

    async def _recall(self, connection: Connection, tree: Tree) -> _Entries | None:
        """Make the next entries from memory; return None if only the log has their events for certain."""
        recalled = self._memory.recall(tree.size - 1, BATCH_LEAVES_MAX)
        # Memory may still have the body of an erased event. After a restart, there are salts already.
        if not recalled or tree.has_commitments or tree.salted > tree.size:
            return None
        # If the database has the last of these events, it has the others: they were committed before it.
        position, event = recalled[-1]
        if not await has_place(connection, Place(position, event.report_id)):
            return None
        salts = _split(os.urandom(SALT_BYTES * len(recalled)))
        hashes: list[bytes] = []
        async for part in _slices(recalled):
            salted = zip(salts[len(hashes) :], part, strict=False)
            hashes += [hash_leaf(encode_recorded(position, event, salt)) for salt, (position, event) in salted]
        return _Entries(hashes, b"".join(salts), {})

    def _report(self, problem: str) -> None:
        """Log why the history is not signed, once."""
        if problem not in {"", self._problem}:
            logger.warning("the history is not signed", reason=problem)
        elif self._problem and not problem:
            logger.info("the history is signed again")
        self._problem = problem


async def _slices(items: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Yield the items in slices, between which other tasks run."""
    for start in range(0, len(items), SLICE_LEAVES):
        yield items[start : start + SLICE_LEAVES]
        await asyncio.sleep(0)


def _split(salts: bytes) -> list[bytes]:
    return [salts[at : at + SALT_BYTES] for at in range(0, len(salts), SALT_BYTES)]


async def _draw_salts(connection: Connection, tree: Tree, positions: Sequence[int]) -> dict[int, bytes]:
    """Return the salts of some positions. After a restart, some have theirs already."""
    drawn = dict(zip(positions, _split(os.urandom(SALT_BYTES * len(positions))), strict=True))
    if tree.salted > tree.size:
        drawn |= await storage.read_salts(connection, positions)
    return drawn


async def _read(connection: Connection, tree: Tree) -> _Entries | None:
    """Make the next entries from the log; return None at its head. The salt of an erased event is zeros."""
    by_position: dict[int, Leaf] = {}
    async for events in _slices(await store.read_log(connection, tree.size - 1, BATCH_LEAVES_MAX)):
        by_position |= {event.position: Leaf.of(EventPlace(*event[:4]), event.state) for event in events}
    if not by_position:
        return None
    positions = range(tree.size, min(max(by_position) + 1, tree.size + BATCH_LEAVES_MAX))
    salts = await _draw_salts(connection, tree, positions)
    erased: Mapping[int, Commitments] = {}
    if tree.has_commitments:
        erased = await storage.read_commitments(connection, positions)
    hashes, marked = [], {}
    async for part in _slices(positions):
        for position in part:
            leaf = by_position.get(position)
            if leaf is None:
                hashes.append(hash_leaf(encode_gap(position)))
                continue
            commitment = commit(salts[position], leaf.content)
            if (kept := erased.get(position)) is not None:
                salts[position] = NO_SALT
                if kept.body is None:
                    marked[position] = commitment
                elif leaf.is_erased:
                    commitment = kept.body
            hashes.append(hash_leaf(leaf.encode(commitment)))
    new_salts = b"".join(salts[position] for position in positions if position >= tree.salted)
    return _Entries(hashes, new_salts, marked)


async def begin(connection: Connection, tree: Tree) -> Checkpoint:
    """Begin a tree with its header as the only entry, and return its checkpoint.

    Args:
        connection: a connection in a transaction that holds the history's lock.
        tree: the new tree, of size 0.
    """
    header = tree.header.encode()
    leaf = hash_leaf(header)
    await storage.begin_tree(connection, tree.number, header)
    salts = b"" if tree.salted else NO_SALT
    await storage.grow(connection, tree, Edge(0, {}), [leaf], salts)
    return Checkpoint(tree.origin, 1, leaf)
