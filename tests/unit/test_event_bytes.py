"""The bytes of an event are the library's own, and come back as the event they were made of."""

import dataclasses
import json
from datetime import timedelta, timezone
from typing import Any, get_args

import orjson
import pytest
from eventsourcing.persistence import DatetimeAsISO, JSONTranscoder, Mapper, StoredEvent
from hypothesis import given
from hypothesis import strategies as st

from domain.order import Order
from domain.statuses import STATUSES
from domain.transitions import Leg, Verdict
from service.event_log.store import MAPPER, OrjsonTranscoder, UndecodableEventError, decode_event, plain_fields
from tests.support.examples import ORDER_NO, SENT_EVENT, SENT_STATE
from tests.support.properties import MANY

LIBRARY_TRANSCODER = JSONTranscoder()
LIBRARY_TRANSCODER.register(DatetimeAsISO())
LIBRARY_MAPPER: Mapper[str] = Mapper(LIBRARY_TRANSCODER)

# Where JSON writers like to differ: controls, quotes, line separators, DEL, byte order marks, beyond the BMP.
ODD = (
    '\x00\x01\b\t\n\f\r\x1b\x1f"\\/\x7f\x80\x85\x9f\u00a0\u2028\u2029\u202e\ufeff\ufffe\uffff'
    "😀👩‍🚀\U0010ffff<&'"
)
TEXT = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=40)
TIMES = st.datetimes(
    timezones=st.builds(
        lambda seconds: timezone(timedelta(seconds=seconds)), st.integers(-86399, 86399) | st.just(0)
    )
)

STATUS = st.none() | st.sampled_from(STATUSES)
BIGINT = st.integers(1, 2**63 - 1)
EVENTS = st.builds(
    Order.StatusReported,
    originator_id=TEXT,
    originator_version=BIGINT,
    timestamp=TIMES,
    report_id=st.uuids().map(str),
    body=TEXT,
    reported_status=TEXT,
    reported_cnote=st.none() | TEXT,
    occurred_at=st.none() | TIMES,
    remote=st.none() | TEXT,
    quarantine_id=st.none() | BIGINT,
    verdict=st.sampled_from(get_args(Verdict)),
    recognised=STATUS,
    previous_status=STATUS,
    previous_since=st.none() | TIMES,
    status=STATUS,
    status_version=st.none() | BIGINT,
    leg=st.none() | st.sampled_from(get_args(Leg)),
    cnote=st.none() | TEXT,
    skipped=st.lists(st.sampled_from(STATUSES), max_size=4),
    repeats=st.none() | BIGINT,
    reason=st.none() | TEXT,
)
TOPIC = "order.status_reported"


def changed_state(**changes: Any) -> bytes:
    """SENT_STATE with some of its fields changed."""
    return orjson.dumps({**orjson.loads(SENT_STATE), **changes})


def test_the_bytes_of_the_first_release() -> None:
    """The event of the examples is written as it was when the log was new."""
    stored = MAPPER.to_stored_event(SENT_EVENT)
    assert stored == StoredEvent(ORDER_NO, 1, TOPIC, SENT_STATE)


@MANY
@given(EVENTS)
def test_the_bytes_are_the_librarys(event: Order.StatusReported) -> None:
    """Our transcoder and the library's write the same bytes, and each reads them as the same event."""
    ours, theirs = MAPPER.to_stored_event(event), LIBRARY_MAPPER.to_stored_event(event)
    assert ours == theirs
    assert LIBRARY_MAPPER.to_domain_event(ours) == event
    assert MAPPER.to_domain_event(theirs) == event


def test_every_character_is_written_as_the_library_writes_it() -> None:
    """All of Unicode, but for the surrogates, which are no characters."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    assert OrjsonTranscoder().encode(every) == LIBRARY_TRANSCODER.encode(every)


@pytest.mark.parametrize("surrogate", [chr(0xD800), chr(0xDFFF), f"a{chr(0xDC80)}b"])
def test_a_lone_surrogate_is_refused_as_the_library_refuses_it(surrogate: str) -> None:
    """What is no text is written by neither."""
    event = dataclasses.replace(SENT_EVENT, body=surrogate)
    with pytest.raises(UnicodeEncodeError):
        LIBRARY_MAPPER.to_stored_event(event)
    with pytest.raises(TypeError):
        MAPPER.to_stored_event(event)


@MANY
@given(EVENTS)
def test_decoding_returns_what_was_encoded(event: Order.StatusReported) -> None:
    """decode_event is the inverse of the mapper, and its fast way gives what the mapper's slow one does."""
    stored = MAPPER.to_stored_event(event)
    decoded = decode_event(event.originator_id, event.originator_version, stored.topic, stored.state)
    assert decoded == event
    slowly = MAPPER.to_domain_event(stored)
    assert vars(decoded) == vars(slowly)
    assert list(map(type, vars(decoded).values())) == [type(vars(slowly)[name]) for name in vars(decoded)]


def test_a_body_that_looks_like_a_typed_value_stays_text() -> None:
    """Nothing that a sender writes is mistaken for the transcoder's own notation."""
    body = '{"_type_":"datetime_iso","_data_":"2026-01-31T08:30:00+00:00"}'
    event = dataclasses.replace(SENT_EVENT, body=body, reported_status=body)
    stored = MAPPER.to_stored_event(event)
    assert decode_event(ORDER_NO, 1, TOPIC, stored.state) == event
    fields = plain_fields(stored.state)
    assert fields is not None
    assert fields["body"] == body


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXT | TIMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@MANY
@given(VALUES)
def test_the_transcoder_alone(value: Any) -> None:
    """Nested values, with times at any depth, are written as the library does and restored."""
    encoded = OrjsonTranscoder().encode(value)
    assert encoded == LIBRARY_TRANSCODER.encode(value)
    assert OrjsonTranscoder().decode(encoded) == value


@pytest.mark.parametrize(
    "value", [{"_type_": "datetime_iso"}, {"_type_": 1, "_data_": 2, "x": 3}, {"a": 1, "b": 2}]
)
def test_a_dictionary_is_typed_only_with_both_keys_and_no_other(value: dict[str, Any]) -> None:
    """As in the library: anything else is a plain dictionary."""
    encoded = json.dumps(value).encode()
    assert OrjsonTranscoder().decode(encoded) == value == LIBRARY_TRANSCODER.decode(encoded)


def test_a_value_of_no_known_type_is_not_written() -> None:
    """A set has no place in an event; nor has a tuple of them."""
    with pytest.raises(TypeError):
        OrjsonTranscoder().encode({"skipped": {"packed"}})


def test_a_value_of_an_unknown_type_is_not_read() -> None:
    """Typed notation of a kind that we do not write is an error, not a dictionary."""
    with pytest.raises(TypeError, match="uuid_hex"):
        OrjsonTranscoder().decode(b'{"id":{"_type_":"uuid_hex","_data_":"00"}}')


@pytest.mark.parametrize(
    ("topic", "state"),
    [
        ("order.unknown", SENT_STATE),
        ("", SENT_STATE),
        (TOPIC, b""),
        (TOPIC, b"{"),
        (TOPIC, b"null"),
        (TOPIC, b"[]"),
        (TOPIC, b"state4"),
        (TOPIC, SENT_STATE[:-1]),
        (TOPIC, b"\xff"),
        (TOPIC, b"{}"),
        (TOPIC, changed_state(timestamp=None)),
        (TOPIC, changed_state(timestamp={"_type_": "datetime_iso", "_data_": "yesterday"})),
        (TOPIC, changed_state(occurred_at="2026-01-31T08:30:00Z")),
        (TOPIC, changed_state(class_version=0)),
        (TOPIC, changed_state(class_version="1")),
    ],
)
def test_what_is_not_ours_to_read_raises(topic: str, state: bytes) -> None:
    """Unknown topics, broken bytes, broken times and class versions that never were are errors, not events."""
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, topic, state)


def test_a_newer_class_version_raises() -> None:
    """What a later release wrote may mean something else: it is refused, not read as if it were of today."""
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, TOPIC, changed_state(class_version=2))


@pytest.mark.parametrize("name", sorted(orjson.loads(SENT_STATE).keys() - {"timestamp", "occurred_at"}))
def test_an_event_that_lacks_a_field_raises(name: str) -> None:
    """Bytes that make no whole event are an error here, not an AttributeError in whatever reads it later."""
    fields = orjson.loads(SENT_STATE)
    del fields[name]
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, TOPIC, orjson.dumps(fields))


def test_an_unknown_topic_is_named() -> None:
    """The error says which topic nobody knows."""
    with pytest.raises(UndecodableEventError, match=r"order\.unknown"):
        decode_event(ORDER_NO, 1, "order.unknown", SENT_STATE)


def test_a_topic_of_something_else_is_refused() -> None:
    """A topic that resolves to a class of another kind makes no event of an order."""
    with pytest.raises(UndecodableEventError, match="is not an event of an order"):
        decode_event(ORDER_NO, 1, "domain.order:Order.Event", SENT_STATE)


def test_the_present_class_version_may_be_spelt_out() -> None:
    """Version 1 is meant where none is written; where it is written, it is not a field of the event."""
    assert vars(decode_event(ORDER_NO, 1, TOPIC, changed_state(class_version=1))) == vars(SENT_EVENT)


def test_plain_fields() -> None:
    """The fields as JSON has them, times as text; the log's own columns are not among them."""
    fields = plain_fields(SENT_STATE)
    assert fields is not None
    assert fields["timestamp"] == "2026-01-31T08:30:00.123456+00:00"
    assert fields["occurred_at"] == "2026-01-31T08:29:58+00:00"
    assert fields["body"] == SENT_EVENT.body
    assert fields["skipped"] == []
    assert fields.keys() == vars(SENT_EVENT).keys() - {"originator_id", "originator_version"}


@pytest.mark.parametrize("state", [b"", b"state4", b"[]", b"null", b'"x"', b"\xff"])
def test_plain_fields_of_what_is_no_json_object(state: bytes) -> None:
    """Bytes that some other program left in the log have no fields, and raise nothing."""
    assert plain_fields(state) is None
