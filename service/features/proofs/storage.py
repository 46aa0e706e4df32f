"""The history in the database: trees, tiles, salts, commitments to erased bodies, and checkpoints.

Every function takes a connection. Those that write need a transaction that holds the lock, as erasures do.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import orjson

from projections.postgres import Connection
from service.errors import OperatorError
from service.features.proofs.entries import SALT_BYTES
from service.features.proofs.notes import Checkpoint, VerifierKey, read_verifier_key
from service.features.proofs.tree import (
    HASH_BYTES,
    TILE_HASHES,
    Edge,
    Range,
    TileId,
    edge_tiles,
    hash_ranges,
    tiles_of,
    width_of,
)

# More ranges are hashed in a thread, so that the event loop is not held: so many take up to 3 ms.
INLINE_RANGES_MAX: Final = 200
RESTART: Final = "if a restore or a failover is the cause, run 'history restart REASON'"
DAMAGED: Final = (
    "the history's hashes or salts were changed: 'check --history' says where; put them back, or run "
    "'history restart --force REASON'"
)

LOCK: Final = "SELECT lock_history()"
BEGIN_LOCKED: Final = f"BEGIN; {LOCK}"
# The last tree, its size and its last hash, how many positions have salts, whether an event above the tree's
# size has a commitment or a mark, the log's head, and the last checkpoint.
STATE: Final = f"""
    SELECT tree, header, coalesce(size, 0) AS size, coalesce(last_leaf, '') AS last_leaf,
        coalesce((
            SELECT tile * {TILE_HASHES} + length(salts) / {SALT_BYTES}
            FROM public.history_salts ORDER BY tile DESC LIMIT 1), 0) AS salted,
        EXISTS (SELECT FROM public.history_commitments WHERE position >= size) AS has_commitments,
        (SELECT max(notification_id) FROM public.order_events) AS head,
        (SELECT note FROM public.history_checkpoints AS published WHERE published.tree = last.tree) AS note
    FROM (SELECT tree, header FROM public.history_trees ORDER BY tree DESC LIMIT 1) AS last
    LEFT JOIN LATERAL (
        SELECT tile * {TILE_HASHES} + length(hashes) / {HASH_BYTES} AS size,
            substr(hashes, length(hashes) - {HASH_BYTES} + 1) AS last_leaf
        FROM public.history_tiles AS tiles
        WHERE tiles.tree = last.tree AND level = 0 ORDER BY tile DESC LIMIT 1
    ) AS leaves ON true
"""  # noqa: S608 - numbers
INSERT_TREE: Final = "INSERT INTO history_trees (tree, header) VALUES ($1, $2)"
COUNT_EVENTS: Final = "SELECT count(*) FROM order_events"
# Returns the new length of each tile, and of those with salts, whose level is null.
GROW: Final = """
    WITH salted AS (
        INSERT INTO history_salts AS kept (tile, salts) SELECT * FROM unnest($5::bigint[], $6::bytea[])
        ON CONFLICT (tile) DO UPDATE SET salts = kept.salts || excluded.salts
        RETURNING tile, length(salts) AS bytes
    ), grown AS (
        INSERT INTO history_tiles AS tiles (tree, level, tile, hashes)
        SELECT $1, * FROM unnest($2::smallint[], $3::bigint[], $4::bytea[])
        ON CONFLICT (tree, level, tile) DO UPDATE SET hashes = tiles.hashes || excluded.hashes
        RETURNING level, tile, length(hashes) AS bytes
    )
    SELECT NULL AS level, tile, bytes FROM salted UNION ALL SELECT level, tile, bytes FROM grown
"""
SET_COMMITMENTS: Final = """
    UPDATE history_commitments AS kept SET commitment = given.commitment, raw = given.commitment
    FROM unnest($1::bigint[], $2::bytea[]) AS given (position, commitment)
    WHERE kept.position = given.position AND kept.commitment IS NULL
"""
TILES: Final = """
    SELECT level, tile, hashes FROM public.history_tiles JOIN unnest($2::smallint[], $3::bigint[])
        AS wanted (level, tile) USING (level, tile)
    WHERE tree = $1
"""
SALTS: Final = "SELECT tile, salts FROM public.history_salts WHERE tile = ANY($1::bigint[])"
COMMITMENTS: Final = """
    SELECT position, commitment, raw FROM public.history_commitments WHERE position = ANY($1::bigint[])
"""
SET_CHECKPOINT: Final = """
    INSERT INTO history_checkpoints (tree, size, note) VALUES ($1, $2, $3)
    ON CONFLICT (tree) DO UPDATE SET size = excluded.size, note = excluded.note
"""


class HistoryHaltedError(OperatorError):
    """The tree is not the one that was signed, so it proves nothing more. ``str()`` is the reason."""


class Tree(NamedTuple):
    """The tree in use.

    Attributes:
        number: its number; a restart begins another one.
        header: its entry at index 0.
        size: the number of its entries.
        last_leaf: the hash of the last one; empty if it has none.
        salted: how many positions have salts; more than ``size`` while a tree is built after a restart.
        has_commitments: whether there is a commitment or a mark for an event that the tree does not have yet.
        head: the log's head.
        note: its last signed checkpoint; None before the first.
    """

    number: int
    header: str
    size: int
    last_leaf: bytes
    salted: int
    has_commitments: bool
    head: int
    note: str | None

    @property
    def origin(self) -> str:
        """The log's name."""
        origin: str = orjson.loads(self.header)["origin"]
        return origin

    @property
    def key(self) -> VerifierKey:
        """The key that signs the tree."""
        return read_verifier_key(orjson.loads(self.header)["key"])


async def lock(connection: Connection) -> None:
    """Wait until no other transaction writes to the history, and keep others from it."""
    await connection.execute(LOCK)


async def read_tree(connection: Connection) -> Tree | None:
    """Return the tree in use, None before the first."""
    row = await connection.fetchrow(STATE)
    return None if row is None else Tree(*row)._replace(head=row["head"] or 0)


async def begin_tree(connection: Connection, number: int, header: bytes) -> None:
    """Begin a tree without any entry. ``grow`` adds the header as the first one."""
    await connection.execute(INSERT_TREE, number, header.decode())


async def count_events(connection: Connection) -> int:
    """Return the number of events in the log. This reads all of them."""
    count: int = await connection.fetchval(COUNT_EVENTS)
    return count


async def grow(connection: Connection, tree: Tree, edge: Edge, leaves: Sequence[bytes], salts: bytes) -> None:
    """Add leaves to a tree and to its edge, and salts to those that there are.

    Args:
        connection: a connection in a transaction, which the caller must undo after an error.
        tree: the tree.
        edge: its right edge.
        leaves: the hashes of the next entries.
        salts: the salts of the first positions that have none, joined.

    Raises:
        HistoryHaltedError: a tile is longer or shorter than the tree's size says. It was changed.
    """
    added, start = edge.append(leaves), max(tree.salted, tree.size)
    salted: dict[int, bytes] = {}
    at = 0
    while at < len(salts):
        tile, first = divmod(start + at // SALT_BYTES, TILE_HASHES)
        salted[tile] = salts[at : at + (TILE_HASHES - first) * SALT_BYTES]
        at += len(salted[tile])
    levels, numbers = [tile.level for tile in added], [tile.number for tile in added]
    grown = await connection.fetch(
        GROW, tree.number, levels, numbers, [*added.values()], [*salted], [*salted.values()]
    )
    ends = start + len(salts) // SALT_BYTES
    for level, tile, length in grown:
        if level is None:
            expected = width_of(TileId(0, tile), ends) * SALT_BYTES
        else:
            expected = width_of(TileId(level, tile), edge.size) * HASH_BYTES
        if length != expected:
            raise HistoryHaltedError(DAMAGED)


async def set_commitments(connection: Connection, commitments: Mapping[int, bytes]) -> None:
    """Fill in the commitments of marked positions."""
    await connection.execute(SET_COMMITMENTS, [*commitments], [*commitments.values()])


async def read_tiles(connection: Connection, number: int, tiles: Iterable[TileId]) -> dict[TileId, bytes]:
    """Return those of the tiles that exist."""
    wanted = [*tiles]
    rows = await connection.fetch(TILES, number, [one.level for one in wanted], [one.number for one in wanted])
    return {TileId(level, index): hashes for level, index, hashes in rows}


async def read_tile(connection: Connection, number: int, tile: TileId, width: int) -> bytes:
    """Return the first ``width`` hashes of a tile.

    Raises:
        HistoryHaltedError: the tree lacks some of them.
    """
    hashes = (await read_tiles(connection, number, [tile])).get(tile, b"")[: width * HASH_BYTES]
    if len(hashes) < width * HASH_BYTES:
        raise HistoryHaltedError(DAMAGED)
    return hashes


async def read_edge(connection: Connection, tree: Tree) -> Edge:
    """Return the right edge of a tree. If its tiles are damaged, ``grow`` notices."""
    return Edge(tree.size, await read_tiles(connection, tree.number, edge_tiles(tree.size)))


async def read_proofs(connection: Connection, number: int, *proofs: Sequence[Range]) -> list[list[bytes]]:
    """Return the hashes of one or more proofs.

    Raises:
        HistoryHaltedError: the tree lacks hashes that it should have.
    """
    ranges = {leaves for proof in proofs for leaves in proof}
    tiles = await read_tiles(connection, number, tiles_of(ranges))
    try:
        if len(ranges) <= INLINE_RANGES_MAX:
            hashes = hash_ranges(ranges, tiles)
        else:
            hashes = await asyncio.to_thread(hash_ranges, ranges, tiles)
    except LookupError:
        raise HistoryHaltedError(DAMAGED) from None
    return [[hashes[leaves] for leaves in proof] for proof in proofs]


async def read_roots(connection: Connection, number: int, *sizes: int) -> list[bytes]:
    """Return the roots that a tree had at some sizes, each at least 1.

    Raises:
        HistoryHaltedError: see ``read_proofs``.
    """
    (roots,) = await read_proofs(connection, number, [Range(0, size) for size in sizes])
    return roots


async def read_salts(connection: Connection, positions: Iterable[int]) -> dict[int, bytes]:
    """Return the salts of those positions that have one."""
    wanted = [*positions]
    tiles = sorted({position // TILE_HASHES for position in wanted})
    salts: dict[int, bytes] = dict(map(tuple, await connection.fetch(SALTS, tiles)))
    found = {}
    for position in wanted:
        at = position % TILE_HASHES * SALT_BYTES
        if salt := salts.get(position // TILE_HASHES, b"")[at : at + SALT_BYTES]:
            found[position] = salt
    return found


class Commitments(NamedTuple):
    """The commitments of an erased event: to its body, and to its whole state. Both are None in a mark."""

    body: bytes | None
    state: bytes | None


async def read_commitments(connection: Connection, positions: Iterable[int]) -> dict[int, Commitments]:
    """Return the commitments of those of the positions that were erased."""
    rows = await connection.fetch(COMMITMENTS, [*positions])
    return {position: Commitments(body, state) for position, body, state in rows}


async def set_checkpoint(connection: Connection, number: int, checkpoint: Checkpoint, note: str) -> None:
    """Publish a signed checkpoint."""
    await connection.execute(SET_CHECKPOINT, number, checkpoint.size, note)
