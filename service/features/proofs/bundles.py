"""Proofs: the bundle of an order's timeline, and the proof of one event (C2SP tlog-proof)."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, NotRequired

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection
from service.event_log import store
from service.event_log.store import RecordedEvent
from service.features.proofs import storage
from service.features.proofs.entries import NO_SALT, EventPlace, Leaf, commit, encode_gap, encode_raw
from service.features.proofs.signer import Signer
from service.features.proofs.storage import Commitments, Tree
from service.features.proofs.tree import (
    TILE_HASHES,
    TileId,
    consistency_ranges,
    hash_leaf,
    inclusion_ranges,
    split,
)

FORMAT: Final = "order-tracking.proof.v1"
TLOG_PROOF: Final = "c2sp.org/tlog-proof@v1"
EVENTS_MAX: Final = 1_000
# A bundle ends after the event with which it has more bytes of bodies.
BODIES_BYTES_MAX: Final = 8 * 1024 * 1024

# An order's events below an index: the first and the last one's, and their number.
# With the size as a condition, the planner might also read all positions below it.
SUMMARY: Final = """
    SELECT min(notification_id) FILTER (WHERE notification_id < $2),
        max(notification_id) FILTER (WHERE notification_id < $2),
        count(*) FILTER (WHERE notification_id < $2)
    FROM order_events WHERE originator_id = $1
"""


class NotInHistoryError(Exception):
    """The history has no signed entry of this order, or of this version of it."""


class NotSignedYetError(Exception):
    """The signed history has not reached a position yet.

    Attributes:
        position: the last one that it has.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"the signed history has reached position {position}")
        self.position = position


class SinceError(ValueError):
    """A proof of consistency cannot begin at this size. ``str()`` is the reason."""


class Opened(TypedDict):
    """What a commitment commits to: the salt, in base64, and the report's body."""

    salt: str
    body: str


class ProvenEvent(TypedDict):
    """An entry of the history, with its inclusion proof: hashes in base64, the leaf's sibling first."""

    index: int
    entry: str
    proof: list[str]
    opened: NotRequired[Opened]


class ProvenHeader(TypedDict):
    """The history's first entry, with its inclusion proof."""

    entry: str
    proof: list[str]


class ProvenSize(TypedDict):
    """A consistency proof from an earlier size of the history."""

    size: int
    proof: list[str]


class Bundle(TypedDict):
    """The proof of an order's timeline.

    ``checkpoint`` is a signed note with the size and the root of the history. ``last`` is a signed statement of
    the order's first and last entry below that size, and of their number.
    """

    format: str
    origin: str
    order_no: str
    checkpoint: str
    last: str
    log: ProvenHeader
    events: list[ProvenEvent]
    since: NotRequired[ProvenSize]


class Entry(NamedTuple):
    """An entry as the log has it now, whether or not the tree agrees.

    Attributes:
        position: its index, the position of its event.
        data: its bytes.
        opened: the salt and the body of its commitment; None after an erasure, or if there is no body.
    """

    position: int
    data: bytes
    opened: Opened | None


async def make_bundle(  # noqa: PLR0913 - the parameters of the request
    connection: Connection,
    signer: Signer,
    order_no: str,
    *,
    with_bodies: bool,
    since: int | None = None,
    from_version: int = 1,
    after_position: int | None = None,
    events_max: int | None = EVENTS_MAX,
) -> Bundle:
    """Return the proof of an order's timeline.

    Args:
        connection: a connection outside any transaction.
        signer: signs the statement of the last event.
        order_no: the order.
        with_bodies: whether to open the commitments to the bodies that were not erased.
        since: prove that the history continues that of this size.
        from_version: begin with this version of the order.
        after_position: require that the signed history has this position; None for no requirement.
        events_max: the most events; None for all.

    Raises:
        NotInHistoryError: the order has no signed entry, or none from that version on.
        NotSignedYetError: the signed history ends before ``after_position``.
        SinceError: the history never had the size ``since``, or has not yet.
        HistoryHaltedError, NotSigningError: see ``Signer.read_signed``.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        signed = await signer.read_signed(connection)
        size = signed.checkpoint.size
        if after_position is not None and after_position >= size:
            raise NotSignedYetError(size - 1)
        if since is not None and not 1 <= since <= size:
            raise SinceError(f"the history has {size} signed entries: expected a size from 1 to {size}")
        ((first, last, count),) = await connection.fetch(SUMMARY, order_no, size)
        if count < from_version:
            raise NotInHistoryError(order_no)
        entries = await _read_order(
            connection, signed.tree, order_no, from_version, last, events_max, with_bodies=with_bodies
        )
        header, *proofs = await storage.read_proofs(
            connection,
            signed.tree.number,
            inclusion_ranges(0, size),
            *(inclusion_ranges(entry.position, size) for entry in entries),
            *([] if since is None else [consistency_ranges(since, size)]),
        )
    bundle: Bundle = {
        "format": FORMAT,
        "origin": signed.checkpoint.origin,
        "order_no": order_no,
        "checkpoint": signed.note,
        "last": signer.state_last(signed, first, last, count),
        "log": {"entry": signed.tree.header, "proof": _encode(header)},
        "events": [],
    }
    for entry, proof in zip(entries, proofs, strict=False):
        proven: ProvenEvent = {
            "index": entry.position,
            "entry": entry.data.decode(),
            "proof": _encode(proof),
        }
        if entry.opened is not None:
            proven["opened"] = entry.opened
        bundle["events"].append(proven)
    if since is not None:
        bundle["since"] = {"size": since, "proof": _encode(proofs[-1])}
    return bundle


def is_last(bundle: Bundle) -> bool:
    """Return whether a bundle has the last event that its statement names."""
    last = int(bundle["last"].partition("\n\n")[0].split()[-2])
    return bundle["events"][-1]["index"] == last


async def make_event_proof(connection: Connection, signer: Signer, order_no: str, version: int) -> str:
    """Return the proof of one event, as C2SP tlog-proof.

    Raises:
        NotInHistoryError: the event does not exist, or is not signed yet.
        HistoryHaltedError, NotSigningError: see ``Signer.read_signed``.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        signed = await signer.read_signed(connection)
        size = signed.checkpoint.size
        events = await store.read_stream(connection, order_no, version - 1, 1)
        if not events or events[0].version != version or events[0].position >= size:
            raise NotInHistoryError(f"{order_no} version {version}")
        (entry,) = await read_entries(connection, signed.tree, events)
        ranges = inclusion_ranges(entry.position, size)
        (proof,) = await storage.read_proofs(connection, signed.tree.number, ranges)
    lines = [TLOG_PROOF, f"extra {b64encode(entry.data).decode()}", f"index {entry.position}", *_encode(proof)]
    return "\n".join([*lines, "", signed.note])


async def read_entries(
    connection: Connection, tree: Tree, events: Sequence[RecordedEvent], *, with_bodies: bool = False
) -> list[Entry]:
    """Return the entries of some events, in their order."""
    positions = [event.position for event in events]
    salts = await storage.read_salts(connection, positions)
    commitments: Mapping[int, Commitments] = {}
    leaves: dict[int, bytes] = {}
    # An erasure leaves a commitment in the place of each salt.
    if erased := [position for position in positions if salts.get(position, NO_SALT) == NO_SALT]:
        commitments = await storage.read_commitments(connection, erased)
        # An erased event does not show which of two forms its entry has: the tree does.
        tiles = {TileId(0, position // TILE_HASHES) for position in commitments}
        for tile, hashes in (await storage.read_tiles(connection, tree.number, tiles)).items():
            leaves |= {tile.number * TILE_HASHES + at: one for at, one in enumerate(split(hashes))}
    entries = []
    for event in events:
        position, leaf = event.position, _leaf_of(event)
        salt = salts.get(position, NO_SALT)
        kept = commitments.get(position)
        # Only an erased event has lost what its commitment is to.
        if kept is not None and kept.body is not None and kept.state is not None and leaf.is_erased:
            raw, data = encode_raw(leaf.place, kept.state), leaf.encode(kept.body)
            entries.append(Entry(position, raw if leaves.get(position) == hash_leaf(raw) else data, None))
            continue
        opened: Opened | None = None
        if with_bodies and leaf.members is not None:
            opened = {"salt": b64encode(salt).decode(), "body": leaf.content.decode()}
        entries.append(Entry(position, leaf.encode(commit(salt, leaf.content)), opened))
    return entries


async def read_range(connection: Connection, tree: Tree, start: int, end: int) -> list[bytes]:
    """Return the entries from one index up to another, as the log has them now.

    Args:
        connection: a connection to the log, in a transaction that sees one state of it.
        tree: the tree.
        start: the first index.
        end: the index after the last one, at most the tree's size.
    """
    by_index: dict[int, bytes] = {}
    after = max(start, 1) - 1
    # Batch by batch, since the bodies may be large.
    while after < end - 1 and (batch := await store.read_log(connection, after, end - 1 - after)):
        events = [event for event in batch if event.position < end]
        by_index |= {entry.position: entry.data for entry in await read_entries(connection, tree, events)}
        after = batch[-1].position
    entries = [by_index.get(index) or encode_gap(index) for index in range(start, end)]
    if start == 0:
        entries[0] = tree.header.encode()
    return entries


async def _read_order(  # noqa: PLR0913, PLR0917 - as above
    connection: Connection,
    tree: Tree,
    order_no: str,
    from_version: int,
    last: int,
    events_max: int | None,
    *,
    with_bodies: bool,
) -> list[Entry]:
    """Return an order's entries from a version up to a position, the last of the order that is signed."""
    entries: list[Entry] = []
    body_bytes = 0
    version = from_version - 1
    while events_max is None or (len(entries) < events_max and body_bytes <= BODIES_BYTES_MAX):
        limit = EVENTS_MAX if events_max is None else events_max - len(entries)
        batch = [
            event
            for event in await store.read_stream(connection, order_no, version, limit)
            if event.position <= last
        ]
        if not batch:
            break
        added = await read_entries(connection, tree, batch, with_bodies=with_bodies)
        entries += added
        version = batch[-1].version
        if batch[-1].position == last:
            break
        body_bytes += sum(len(entry.opened["body"]) for entry in added if entry.opened is not None)
    return entries


def _leaf_of(event: RecordedEvent) -> Leaf:
    return Leaf.of(EventPlace(event.position, event.order_no, event.version, event.topic), event.state)


def _encode(hashes: Sequence[bytes]) -> list[str]:
    return [b64encode(one).decode() for one in hashes]
