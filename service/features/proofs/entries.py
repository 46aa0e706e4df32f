"""The entries of the tree: what it proves of each event, as canonical JSON (RFC 8785).

An entry has all stored members of an event except those that an erasure empties. Of these, it has a commitment:
the hash of a random salt and the body. Without the salt, a guess at the body cannot be confirmed.
"""

import hashlib
from base64 import b64encode
from binascii import b2a_base64
from collections.abc import Mapping
from datetime import UTC
from typing import Any, Final, NamedTuple

import orjson

from domain.order import Order
from service.event_log.codec import TIMES

LOG: Final = "order-tracking.history.v1"
SALT_BYTES: Final = 16
NO_SALT: Final = bytes(SALT_BYTES)
# The length of an entry has two bytes (tlog-tiles).
ENTRY_BYTES_MAX: Final = 0xFFFF
# A shorter state has a shorter entry.
STATE_BYTES_SHORT: Final = 0xF000
NESTED_MAX: Final = 8

# An erasure empties this member too if the verdict is unrecognised. The body has it as well.
ERASED_IF_UNRECOGNISED: Final = "reported_status"
TIME_NAMES: Final = ("timestamp", *TIMES)
_TIME_MEMBERS: Final = {"_type_", "_data_"}
_PLAIN: Final = frozenset({str, int, bool, type(None)})


class EventPlace(NamedTuple):
    """Where an event is recorded, and its topic."""

    position: int
    order_no: str
    version: int
    topic: str


def _encode(members: Mapping[str, Any]) -> bytes:
    # orjson escapes as RFC 8785 does, and all names are ASCII, so any order of bytes is that of UTF-16.
    return orjson.dumps(members, option=orjson.OPT_SORT_KEYS)


def encode_header(origin: str, key: str, existing: int, continues: Mapping[str, str] | None) -> bytes:
    """Return the entry at index 0.

    Args:
        origin: the log's name.
        key: the verifier key.
        existing: how many events were recorded before the history began.
        continues: after a restart, the last signed checkpoint (``note``) and the ``reason``; else None.
    """
    return _encode({"continues": continues, "existing": existing, "key": key, "log": LOG, "origin": origin})


def encode_gap(position: int) -> bytes:
    """Return the entry of a position without an event. A later one has an event, so it stays empty."""
    return b'{"gap":%d}' % position


def commit(salt: bytes, content: bytes) -> bytes:
    """Return the commitment to a body, or to the whole state of an event that has none."""
    return hashlib.sha256(salt + content).digest()


def read_members(state: bytes) -> dict[str, Any] | None:
    """Return the stored members of an event, times as text; None if its entry has none of them.

    That is so if the state is not a JSON object with a text body, or if JSON writers could disagree about it.
    """
    try:
        members = orjson.loads(state)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(members, dict) or not isinstance(members.get("body"), str):
        return None
    for name, value in members.items():
        if type(value) in _PLAIN:
            continue
        if type(value) is dict and value.keys() == _TIME_MEMBERS:
            members[name] = value["_data_"]
        elif not _is_plain(value, NESTED_MAX):
            return None
    return members


def _is_plain(value: Any, nested_max: int) -> bool:
    """Return whether a value has no fraction, which an erasure could write in another way, and is not deep."""
    if type(value) in _PLAIN:
        return True
    if isinstance(value, float) or not nested_max:
        return False
    return all(_is_plain(one, nested_max - 1) for one in (value.values() if isinstance(value, dict) else value))


def encode_recorded(position: int, event: Order.StatusReported, salt: bytes) -> bytes:
    """Return the entry of an event that is still in memory: the same as that of its recorded state.

    Args:
        position: where it is recorded.
        event: the event.
        salt: the salt of the commitment to its body.
    """
    members = vars(event).copy()
    order_no, version = members.pop("originator_id"), members.pop("originator_version")
    for name in TIME_NAMES:
        # orjson writes a time in UTC as it is stored.
        if (time := members.get(name)) is not None and time.tzinfo is not UTC:
            members[name] = time.isoformat()
    place = (position, order_no, version, event.TOPIC)
    return encode_event(place, members, commit(salt, event.body.encode()))


def encode_event(place: tuple[int, str, int, str], members: dict[str, Any], commitment: bytes) -> bytes:
    """Return the entry of an event. This changes ``members``.

    Args:
        place: where it is recorded: a EventPlace, or a plain tuple, which takes less time.
        members: its stored members.
        commitment: the commitment to its body.
    """
    position, order_no, version, topic = place
    # What an erasure empties.
    members.pop("body", None)
    members.pop("remote", None)
    if members.get("verdict") == "unrecognised":
        members.pop(ERASED_IF_UNRECOGNISED, None)
    return _encode(
        {
            "body": b2a_base64(commitment, newline=False).decode(),
            "event": members,
            "order_no": order_no,
            "position": position,
            "topic": topic,
            "version": version,
        }
    )


def encode_raw(place: EventPlace, commitment: bytes) -> bytes:
    """Return the entry of an event whose state has no text body.

    Args:
        place: where it is recorded.
        commitment: the commitment to its whole state.
    """
    return _encode({"raw": b64encode(commitment).decode(), **place._asdict()})


class Leaf(NamedTuple):
    """An event that becomes an entry.

    Attributes:
        place: where it is recorded.
        members: its stored members; None if its state has no text body.
        content: the bytes to commit to: its body, or its whole state.
        state: its bytes in the log.
    """

    place: EventPlace
    members: dict[str, Any] | None
    content: bytes
    state: bytes

    @classmethod
    def of(cls, place: EventPlace, state: bytes) -> "Leaf":
        """Return the leaf of a recorded event."""
        members = read_members(state)
        if members is not None and len(state) > STATE_BYTES_SHORT:
            entry = encode_event(place, members.copy(), bytes(hashlib.sha256().digest_size))
            members = members if len(entry) <= ENTRY_BYTES_MAX else None
        return cls(place, members, state if members is None else members["body"].encode(), state)

    @property
    def is_erased(self) -> bool:
        """Whether the recorded event is as an erasure leaves it."""
        try:
            members = orjson.loads(self.state)
        except orjson.JSONDecodeError:
            return False
        if not isinstance(members, dict) or members.get("body") != "" or members.get("remote") is not None:
            return False
        return members.get("verdict") != "unrecognised" or members.get(ERASED_IF_UNRECOGNISED) == ""

    def encode(self, commitment: bytes) -> bytes:
        """Return the entry. This changes ``members``."""
        if self.members is None:
            return encode_raw(self.place, commitment)
        return encode_event(self.place, self.members, commitment)
