"""The Merkle tree over the log: hashes and proofs as in RFC 6962, tiles as in C2SP tlog-tiles. No I/O.

A tile holds up to 256 hashes of one level. Level 0 has the leaves' hashes; each hash of a higher level is the
root of a full tile below it. A proof is a list of the roots of ranges of leaves, so a proof is built in three
steps: name its ranges, read the tiles that they need, and hash.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from itertools import islice
from typing import Final, NamedTuple

HASH_BYTES: Final = 32
# A tile has this many levels of the tree, and so this many hashes.
TILE_LEVELS: Final = 8
TILE_HASHES: Final = 1 << TILE_LEVELS

_LEAF: Final = b"\x00"
# A copy of a begun hash costs a quarter less than a new one.
_NODE: Final = hashlib.sha256(b"\x01")


class TileId(NamedTuple):
    """A tile: its level, and its number within the level."""

    level: int
    number: int


class Range(NamedTuple):
    """The leaves from ``start`` up to but not including ``end``, where RFC 6962 splits a tree."""

    start: int
    end: int


class _Subtree(NamedTuple):
    """A complete subtree of 2 ** ``height`` leaves, and its number among those of this height."""

    height: int
    number: int

    @property
    def tile(self) -> TileId:
        level, levels = divmod(self.height, TILE_LEVELS)
        return TileId(level, (self.number << levels) // TILE_HASHES)


class _Tile:
    """The complete subtrees within a tile. Each level is hashed once, and only if it is needed."""

    def __init__(self, hashes: bytes) -> None:
        self._levels = [split(hashes)]

    def root(self, subtree: _Subtree) -> bytes:
        level = subtree.height % TILE_LEVELS
        while len(self._levels) <= level:
            below = self._levels[-1]
            self._levels.append([*map(hash_children, below[::2], below[1::2])])
        return self._levels[level][subtree.number % (TILE_HASHES >> level)]


def hash_leaf(entry: bytes) -> bytes:
    """Return the hash of an entry."""
    return hashlib.sha256(_LEAF + entry).digest()


def hash_children(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node."""
    node = _NODE.copy()
    node.update(left)
    node.update(right)
    return node.digest()


def split(hashes: bytes) -> list[bytes]:
    """Return the hashes of a tile."""
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def root_of(hashes: Sequence[bytes]) -> bytes:
    """Return the root over some leaves, or over complete subtrees of one height, by their hashes."""
    if not hashes:
        return hashlib.sha256().digest()
    while len(hashes) > 1:
        above = [*map(hash_children, hashes[::2], hashes[1::2])]
        # An odd last one moves up unchanged.
        hashes = above if len(hashes) % 2 == 0 else [*above, hashes[-1]]
    return hashes[0]


def _split_at(count: int) -> int:
    """Return the largest power of two below ``count``: so many leaves are on the left."""
    return 1 << (count - 1).bit_length() - 1


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Return the ranges of an inclusion proof (RFC 6962, 2.1.1): the leaf's sibling first.

    Args:
        index: the leaf's index.
        size: the number of leaves of the tree, above ``index``.
    """
    ranges: list[Range] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split_at(end - start)
        if index < middle:
            ranges.append(Range(middle, end))
            end = middle
        else:
            ranges.append(Range(start, middle))
            start = middle
    return ranges[::-1]


def consistency_ranges(old: int, size: int) -> list[Range]:
    """Return the ranges of a consistency proof (RFC 6962, 2.1.2).

    Args:
        old: the number of leaves of the older tree, at least 1.
        size: that of the newer tree, at least ``old``.
    """
    ranges: list[Range] = []
    start, end, is_known = 0, size, True
    while start + (rest := old - start) != end:
        middle = start + _split_at(end - start)
        if rest <= middle - start:
            ranges.append(Range(middle, end))
            end = middle
        else:
            ranges.append(Range(start, middle))
            start, is_known = middle, False
    # The verifier knows the older root, unless it is made of several subtrees.
    last = [] if is_known else [Range(start, end)]
    return [*last, *ranges[::-1]]


def _subtrees(leaves: Range) -> Iterator[_Subtree]:
    """Yield the complete subtrees of a range, from the largest to the smallest."""
    start, end = leaves
    while start < end:
        height = (end - start).bit_length() - 1
        yield _Subtree(height, start >> height)
        start += 1 << height


def tiles_of(ranges: Iterable[Range]) -> set[TileId]:
    """Return the tiles that have the hashes of some ranges."""
    return {subtree.tile for leaves in ranges for subtree in _subtrees(leaves)}


def hash_ranges(ranges: Iterable[Range], tiles: Mapping[TileId, bytes]) -> dict[Range, bytes]:
    """Return the root over each range of leaves.

    Args:
        ranges: the ranges.
        tiles: the tiles that ``tiles_of`` names, and perhaps more.
    """
    # Ranges share tiles: those of two sizes of a tree, say, or of two leaves.
    tile_of = cache(lambda tile: _Tile(tiles[tile]))
    return {
        leaves: reduce(
            lambda right, left: hash_children(left, right),
            [tile_of(subtree.tile).root(subtree) for subtree in _subtrees(leaves)][::-1],
        )
        for leaves in {*ranges}
    }


def width_of(tile: TileId, size: int) -> int:
    """Return how many hashes a tile has in a tree of so many leaves."""
    count = size >> TILE_LEVELS * tile.level
    return max(0, min(TILE_HASHES, count - tile.number * TILE_HASHES))


def edge_tiles(size: int) -> list[TileId]:
    """Return the tile of each level to which the next hash is added."""
    edges: list[TileId] = []
    while count := size >> TILE_LEVELS * len(edges):
        edges.append(TileId(len(edges), count // TILE_HASHES))
    return edges


class Edge:
    """The right edge of a tree, to which leaves are appended.

    Args:
        size: the number of leaves.
        tiles: those tiles that ``edge_tiles`` names and that have a hash.
    """

    def __init__(self, size: int, tiles: Mapping[TileId, bytes]) -> None:
        self.size = size
        self._hashes = {tile.level: split(tiles.get(tile, b"")) for tile in edge_tiles(size)}

    def append(self, leaves: Sequence[bytes]) -> dict[TileId, bytes]:
        """Append leaves, by their hashes, and return the hashes that are added to each tile."""
        added: dict[TileId, bytes] = {}
        level, count, hashes = 0, self.size, iter(leaves)
        self.size += len(leaves)
        roots: list[bytes] = [*leaves]
        while roots:
            index, tile, hashes, roots = count // TILE_HASHES, self._hashes.get(level, []), iter(roots), []
            while part := [*islice(hashes, TILE_HASHES - len(tile))]:
                added[TileId(level, index)] = b"".join(part)
                tile = [*tile, *part]
                if len(tile) == TILE_HASHES:
                    roots.append(root_of(tile))
                    index, tile = index + 1, []
            self._hashes[level] = tile
            level, count = level + 1, count // TILE_HASHES
        return added
