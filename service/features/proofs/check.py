"""The check of the history: every entry from its row against its tile, and the tiles against each other."""

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from projections.postgres import Connection
from service.features.proofs import storage
from service.features.proofs.bundles import read_range
from service.features.proofs.entries import encode_gap
from service.features.proofs.signer import Signed, Signer
from service.features.proofs.status import Status, read_status
from service.features.proofs.storage import HistoryHaltedError, Tree
from service.features.proofs.tree import TILE_HASHES, TILE_LEVELS, TileId, hash_leaf, root_of, split, width_of

# Without --history, so many tiles are checked: the newest ones, and others at random.
NEWEST_TILES: Final = 16
RANDOM_TILES: Final = 64
# Entries that are compared at a time.
BATCH_TILES: Final = 8
# Events that the tree cannot have.
BELOW: Final = "SELECT notification_id FROM public.order_events WHERE notification_id < 1 LIMIT $1"
# More differences are counted, but not named.
NAMED_MAX: Final = 20


class Difference(NamedTuple):
    """A position at which the log is not what the history has."""

    position: int
    problem: str


class Checked(NamedTuple):
    """The result.

    Attributes:
        status: the state of the history.
        compared: how many entries were compared.
        differences: where the log differs, at most NAMED_MAX of them.
        differing: how many differences there are.
        tiles: the tiles that do not fit the tiles below them.
        fits_checkpoint: whether the tree has the root of its last checkpoint, if that is signed.
    """

    status: Status
    compared: int
    differences: list[Difference]
    differing: int
    tiles: list[TileId]
    fits_checkpoint: bool = True


async def check_history(
    connection: Connection,
    signer: Signer,
    *,
    whole: bool,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Checked:
    """Compare the log with the history.

    Args:
        connection: a connection outside any transaction.
        signer: the key and its guard.
        whole: whether to compare every entry.
        progress: called with the number of entries that are done, and that of all.
    """
    status = await read_status(signer, connection)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        tree = await storage.read_tree(connection)
        if tree is None:
            return Checked(status, 0, [], 0, [])
        total = -(-tree.size // TILE_HASHES)
        numbers = range(total) if whole else sorted(_choose(total))
        differences: list[Difference] = []
        differing = done = 0
        for batch in _runs(numbers):
            found, compared = await _compare(connection, tree, batch)
            differing += len(found)
            differences += found[: NAMED_MAX - len(differences)]
            done += compared
            progress(done, tree.size)
        for (position,) in await connection.fetch(BELOW, NAMED_MAX):
            differing += 1
            differences.append(Difference(position, "no position of the log is below 1"))
        tiles = [tile async for tile in _misfits(connection, tree, whole=whole)]
        fits = await _fits_checkpoint(connection, status.published)
    return Checked(status, done, differences, differing, tiles, fits_checkpoint=fits)


async def _fits_checkpoint(connection: Connection, published: Signed | None) -> bool:
    """Compare the tree with its published checkpoint, which needs no private key."""
    if published is None or published.checkpoint.size == 0:
        return True
    _, size, root = published.checkpoint
    try:
        return await storage.read_roots(connection, published.tree.number, size) == [root]
    except HistoryHaltedError:
        return False


def _choose(total: int) -> set[int]:
    """Return the newest tiles and some at random, out of so many."""
    newest = range(max(0, total - NEWEST_TILES), total)
    return {*newest, *(secrets.randbelow(total) for _ in range(min(RANDOM_TILES, total)))}


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Yield adjacent numbers together, at most BATCH_TILES of them."""
    start = end = None
    for number in numbers:
        if start is not None and end is not None and (number != end or end - start == BATCH_TILES):
            yield range(start, end)
            start = None
        start = number if start is None else start
        end = number + 1
    if start is not None and end is not None:
        yield range(start, end)


async def _compare(connection: Connection, tree: Tree, numbers: range) -> tuple[list[Difference], int]:
    """Compare the entries of some adjacent tiles; return the differences, and how many were compared."""
    start, end = numbers.start * TILE_HASHES, min(numbers.stop * TILE_HASHES, tree.size)
    tiles = await storage.read_tiles(connection, tree.number, [TileId(0, number) for number in numbers])
    leaves: list[bytes | None] = []
    for number in numbers:
        hashes = split(tiles.get(TileId(0, number), b""))
        leaves += [*hashes, *[None] * (TILE_HASHES - len(hashes))]
    entries = await read_range(connection, tree, start, end)
    differences = [
        Difference(position, _describe(position, entry, leaf))
        for position, (entry, leaf) in enumerate(zip(entries, leaves, strict=False), start)
        if hash_leaf(entry) != leaf
    ]
    return differences, len(entries)


def _describe(position: int, entry: bytes, leaf: bytes | None) -> str:
    if leaf is None:
        return "its hash is missing from the history"
    if position == 0:
        return "the header of the history was changed"
    gap = encode_gap(position)
    if entry == gap:
        return "its event was removed"
    return "its event was added" if leaf == hash_leaf(gap) else "its event was changed"


async def _misfits(connection: Connection, tree: Tree, *, whole: bool) -> AsyncIterator[TileId]:
    """Yield the tiles above level 0 that have another hash than the root of the full tile below."""
    level = 1
    while count := tree.size >> TILE_LEVELS * level:
        total = -(-count // TILE_HASHES)
        for number in range(total) if whole else sorted(_choose(total)):
            tile = TileId(level, number)
            hashes = split((await storage.read_tiles(connection, tree.number, [tile])).get(tile, b""))
            expected = width_of(tile, tree.size)
            # Each hash costs a tile, so a part of the tiles is enough unless everything is to be checked.
            chosen: Sequence[int] = range(expected) if whole else [secrets.randbelow(expected)]
            below = [TileId(level - 1, number * TILE_HASHES + at) for at in chosen]
            full = await storage.read_tiles(connection, tree.number, below)
            roots = [root_of(split(full.get(one, b""))) for one in below]
            if len(hashes) != expected or [hashes[at] for at in chosen] != roots:
                yield tile
        level += 1
