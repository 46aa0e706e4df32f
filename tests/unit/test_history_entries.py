"""The entries: the known answer of the format, and the same bytes from memory and from the log."""

import json

import pytest
from hypothesis import given

from domain.order import Order
from service.event_log.codec import encode_event as encode_state
from service.features.proofs.entries import (
    ENTRY_BYTES_MAX,
    EventPlace,
    Leaf,
    commit,
    encode_gap,
    encode_header,
    encode_recorded,
    read_members,
)
from service.features.proofs.tree import hash_leaf
from tests.support.properties import EVENTS, MANY

BODY = '{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
SALT = bytes(range(0x10, 0x20))
ENTRY = (
    '{"body":"7NXkdbwldJ9tovt4U/jNhPhThWmbsy3QNpBOdN+kU6g=","event":{"cnote":"AWB1","leg":null,"occurred_at":null,'
    '"previous_since":"2026-11-24T14:02:06.319079+00:00","previous_status":"submitted","quarantine_id":null,'
    '"reason":null,"recognised":"in_transit","repeats":null,"report_id":"7f8bc9f0-2a0e-4b3e-b1c8-6b4ab2b51c0e",'
    '"reported_cnote":"AWB1","reported_status":"Dikirim","skipped":["packed","picked_up"],"status":"in_transit",'
    '"status_version":2,"timestamp":"2026-11-24T14:02:07.319079+00:00","verdict":"advanced"},"order_no":"KOM1",'
    '"position":2,"topic":"order.status_reported","version":2}'
)
PLACE = EventPlace(2, "KOM1", 2, "order.status_reported")


def stored(**changed: object) -> bytes:
    """Return the state of the event of the known answer, as the log has it."""
    members = json.loads(ENTRY)["event"] | {"body": BODY, "remote": "10.0.0.1"}
    for name in ("timestamp", "previous_since"):
        members[name] = {"_type_": "datetime_iso", "_data_": members[name]}
    return json.dumps(members | changed).encode()


def test_the_known_answer() -> None:
    """The commitment, the entry and its hash are those of the format's description."""
    commitment = commit(SALT, BODY.encode())
    assert commitment.hex() == "ecd5e475bc25749f6da2fb7853f8cd84f85385699bb32dd036904e74dfa453a8"
    entry = Leaf.of(PLACE, stored()).encode(commitment)
    assert entry.decode() == ENTRY
    assert hash_leaf(entry).hex() == "016bddd4bea734f58c80e9b9300822b169c8ad2bf9d3ec39cea52ac3643cff33"


def test_an_erasure_changes_no_entry() -> None:
    """What an erasure empties is not in the entry."""
    for verdict in ("advanced", "unrecognised"):
        erased = {"body": "", "remote": None} | ({"reported_status": ""} if verdict == "unrecognised" else {})
        before = Leaf.of(PLACE, stored(verdict=verdict)).encode(SALT)
        assert Leaf.of(PLACE, stored(verdict=verdict, **erased)).encode(SALT) == before
    assert b"reported_status" not in before


@MANY
@given(EVENTS)
def test_memory_and_the_log_give_the_same_entry(event: Order.StatusReported) -> None:
    """An event that this process has just recorded has the entry that its bytes in the log have."""
    place = EventPlace(7, event.originator_id, event.originator_version, event.TOPIC)
    logged = Leaf.of(place, encode_state(event))
    assert logged.content == event.body.encode()
    assert logged.encode(commit(SALT, event.body.encode())) == encode_recorded(7, event, SALT)


@pytest.mark.parametrize("state", [b"\xff", b"[]", b'"body"', b"{}", b'{"body":1}', b'{"body":"\\ud800"}'])
def test_a_state_without_a_text_body_is_committed_whole(state: bytes) -> None:
    """The entry then has a commitment to the state alone."""
    assert read_members(state) is None
    leaf = Leaf.of(PLACE, state)
    assert leaf.content == state
    assert set(json.loads(leaf.encode(SALT))) == {"order_no", "position", "raw", "topic", "version"}


def test_a_long_event_is_committed_whole() -> None:
    """An entry's length has two bytes, so a longer one has the short form."""
    leaf = Leaf.of(PLACE, stored(reason="x" * ENTRY_BYTES_MAX))
    assert "raw" in json.loads(leaf.encode(SALT))


def test_gaps_and_headers() -> None:
    """Both are canonical JSON."""
    assert encode_gap(12) == b'{"gap":12}'
    assert encode_header("shop.example", "key", 3, {"reason": "r", "note": "n"}) == (
        b'{"continues":{"note":"n","reason":"r"},"existing":3,"key":"key","log":"order-tracking.history.v1",'
        b'"origin":"shop.example"}'
    )
