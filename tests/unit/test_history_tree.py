"""The Merkle tree against RFC 6962: its known answers, and its recursive definition."""

from base64 import b64encode
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from service.features.proofs import verify
from service.features.proofs.tree import (
    HASH_BYTES,
    TILE_HASHES,
    Edge,
    Range,
    TileId,
    consistency_ranges,
    edge_tiles,
    hash_leaf,
    hash_ranges,
    inclusion_ranges,
    root_of,
    tiles_of,
    width_of,
)
from tests.support.properties import MANY

# The leaves and the roots of the test vectors of Certificate Transparency, for 0 to 8 leaves.
LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
SIZE_MAX = 1_200
ENTRIES = [b"%d" % number for number in range(SIZE_MAX)]

sizes = st.integers(1, SIZE_MAX) | st.sampled_from([255, 256, 257, 511, 512, 513, 1024])


def split_at(count: int) -> int:
    """Return the largest power of two below a number, as RFC 6962 words it."""
    power = 1
    while power * 2 < count:
        power *= 2
    return power


def merkle_tree_hash(entries: list[bytes]) -> bytes:
    """RFC 6962, 2.1."""
    if not entries:
        return sha256().digest()
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0]).digest()
    at = split_at(len(entries))
    return sha256(b"\x01" + merkle_tree_hash(entries[:at]) + merkle_tree_hash(entries[at:])).digest()


def path(index: int, entries: list[bytes]) -> list[bytes]:
    """RFC 6962, 2.1.1."""
    if len(entries) == 1:
        return []
    at = split_at(len(entries))
    if index < at:
        return [*path(index, entries[:at]), merkle_tree_hash(entries[at:])]
    return [*path(index - at, entries[at:]), merkle_tree_hash(entries[:at])]


def subproof(old: int, entries: list[bytes], *, is_known: bool) -> list[bytes]:
    """RFC 6962, 2.1.2."""
    if old == len(entries):
        return [] if is_known else [merkle_tree_hash(entries)]
    at = split_at(len(entries))
    if old <= at:
        return [*subproof(old, entries[:at], is_known=is_known), merkle_tree_hash(entries[at:])]
    return [*subproof(old - at, entries[at:], is_known=False), merkle_tree_hash(entries[:at])]


def build(batches: list[int]) -> dict[TileId, bytes]:
    """Build the tree of all entries, in batches of these sizes, and begin again from its tiles after each."""
    tiles: dict[TileId, bytes] = {}
    size = turn = 0
    while size < SIZE_MAX:
        edge = Edge(size, {tile: tiles[tile] for tile in edge_tiles(size) if tile in tiles})
        batch = ENTRIES[size : size + batches[turn % len(batches)]]
        for tile, added in edge.append([hash_leaf(entry) for entry in batch]).items():
            tiles[tile] = tiles.get(tile, b"") + added
        size, turn = edge.size, turn + 1
    return tiles


TILES = build([SIZE_MAX])


def test_the_known_answers() -> None:
    """The roots of the first leaves are those of the test vectors."""
    leaves = [hash_leaf(bytes.fromhex(leaf)) for leaf in LEAVES]
    assert [root_of(leaves[:size]).hex() for size in range(len(ROOTS))] == ROOTS


@MANY
@given(st.lists(st.integers(1, 600), min_size=1, max_size=8))
def test_batches_and_restarts_make_the_same_tiles(batches: list[int]) -> None:
    """However the entries arrive, and whenever the builder begins again, the tiles are the same."""
    assert build(batches) == TILES
    assert {tile: width_of(tile, SIZE_MAX) for tile in TILES} == {
        tile: len(hashes) // HASH_BYTES for tile, hashes in TILES.items()
    }


def test_the_tiles_are_those_of_the_format() -> None:
    """A hash of level 1 is the root of a full tile, and partial tiles have no hash above (tlog-tiles)."""
    assert {tile: len(hashes) // 32 for tile, hashes in TILES.items()} == {
        **{TileId(0, number): TILE_HASHES for number in range(4)},
        TileId(0, 4): SIZE_MAX - 4 * TILE_HASHES,
        TileId(1, 0): 4,
    }
    assert TILES[TileId(1, 0)][:32] == merkle_tree_hash(ENTRIES[:TILE_HASHES])


@MANY
@given(sizes)
def test_a_root_is_that_of_the_definition(size: int) -> None:
    """The root at any size is read from the tiles of the larger tree."""
    assert tiles_of([Range(0, size)]) <= TILES.keys()
    leaves = Range(0, size)
    assert hash_ranges([leaves], TILES) == {leaves: merkle_tree_hash(ENTRIES[:size])}


@MANY
@given(st.data(), sizes)
def test_an_inclusion_proof_is_that_of_the_definition(data: st.DataObject, size: int) -> None:
    """The hashes are those of RFC 6962, and the verifier accepts them for this entry alone."""
    index = data.draw(st.integers(0, size - 1))
    ranges = inclusion_ranges(index, size)
    hashes = hash_ranges(ranges, TILES)
    proof = [hashes[leaves] for leaves in ranges]
    assert proof == path(index, ENTRIES[:size])
    root = merkle_tree_hash(ENTRIES[:size])
    assert verify.climb(index, size - 1, [hash_leaf(ENTRIES[index])], proof) == [root]
    assert verify.climb(index, size - 1, [hash_leaf(b"another")], proof) != [root]


@MANY
@given(st.data(), sizes)
def test_a_consistency_proof_is_that_of_the_definition(data: st.DataObject, size: int) -> None:
    """The hashes are those of RFC 6962, and the verifier accepts them for these two trees alone."""
    old = data.draw(st.integers(1, size))
    ranges = consistency_ranges(old, size)
    hashes = hash_ranges(ranges, TILES)
    proof = [hashes[leaves] for leaves in ranges]
    assert proof == subproof(old, ENTRIES[:size], is_known=True)
    before = verify.Checkpoint("log", old, merkle_tree_hash(ENTRIES[:old]))
    after = verify.Checkpoint("log", size, merkle_tree_hash(ENTRIES[:size]))
    since = {"size": old, "proof": [b64encode(one).decode() for one in proof]}
    newer = verify.Proof("KOM1", after, {"continues": None}, {}, {}, (), since)
    verify.require_continued(before, newer)
    changed = before._replace(root=merkle_tree_hash([b"another", *ENTRIES[1:old]]))
    try:
        verify.require_continued(changed, newer)
    except ValueError as error:
        assert "does not continue" in str(error)  # noqa: PT017 - both outcomes are compared
    else:
        raise AssertionError("a changed history was accepted")
