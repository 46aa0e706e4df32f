"""The bytes of an event equal those of the eventsourcing library, and decode to the same event."""

import dataclasses
import re
import sys
from typing import Any

import orjson
import pytest
from eventsourcing.persistence import StoredEvent
from hypothesis import given

from domain.order import Order
from service.event_log.codec import (
    MAPPER,
    StatusReported,
    UndecodableEventError,
    decode_event,
    encode_event,
    read_fields,
    read_status_reported,
)
from tests.support.examples import GOLDEN_EVENTS, ORDER_NO, SENT_EVENT, SENT_STATE
from tests.support.folders import ROOT
from tests.support.properties import EVENTS, MANY

TOPIC = "order.status_reported"


def changed_state(**changes: Any) -> bytes:
    """Return SENT_STATE with some fields changed."""
    return orjson.dumps({**orjson.loads(SENT_STATE), **changes})


def test_the_bytes_of_the_first_release() -> None:
    """The example event still has the bytes of the first release."""
    assert encode_event(SENT_EVENT) == SENT_STATE
    assert MAPPER.to_stored_event(SENT_EVENT) == StoredEvent(ORDER_NO, 1, TOPIC, SENT_STATE)


@pytest.mark.parametrize("version", range(1, len(GOLDEN_EVENTS) + 1))
def test_the_bytes_of_every_shape(version: int) -> None:
    """Each shape of an event that a release has ever written decodes, and encodes to the same bytes."""
    state = GOLDEN_EVENTS[version - 1]
    event = decode_event(ORDER_NO, version, TOPIC, state)
    assert encode_event(event) == state
    assert vars(MAPPER.to_domain_event(StoredEvent(ORDER_NO, version, TOPIC, state))) == vars(event)
    shown = read_status_reported(TOPIC, state, with_bodies=True)
    assert shown is not None
    assert shown.keys() >= StatusReported.__required_keys__


def test_every_member_has_a_golden_event() -> None:
    """A member that a release adds gets a golden event, so that its bytes stay readable."""
    members = {name for state in GOLDEN_EVENTS for name in orjson.loads(state)}
    declared = {field.name for field in dataclasses.fields(Order.StatusReported)}
    assert members == declared - {"originator_id", "originator_version"}


def test_an_older_reader_ignores_members() -> None:
    """A member that this release does not know is ignored, so that an older process can read a newer log."""
    event = decode_event(ORDER_NO, 1, TOPIC, changed_state(added_later={"a": 1}))
    assert vars(event) == vars(SENT_EVENT)


@MANY
@given(EVENTS)
def test_the_bytes_are_the_librarys(event: Order.StatusReported) -> None:
    """Our transcoder and the library's write the same bytes, and each decodes the other's."""
    stored = MAPPER.to_stored_event(event)
    assert encode_event(event) == stored.state
    decoded = decode_event(event.originator_id, event.originator_version, stored.topic, stored.state)
    assert decoded == event
    theirs = MAPPER.to_domain_event(stored)
    assert vars(decoded) == vars(theirs)
    assert list(map(type, vars(decoded).values())) == [type(vars(theirs)[name]) for name in vars(decoded)]


def test_every_character_is_written_as_the_library_writes_it() -> None:
    """All Unicode characters except surrogates encode to the library's bytes."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    event = dataclasses.replace(SENT_EVENT, body=every)
    assert encode_event(event) == MAPPER.to_stored_event(event).state


@pytest.mark.parametrize("surrogate", [chr(0xD800), chr(0xDFFF), f"a{chr(0xDC80)}b"])
def test_a_lone_surrogate_is_refused_as_the_library_refuses_it(surrogate: str) -> None:
    """Neither transcoder encodes a string with a lone surrogate."""
    event = dataclasses.replace(SENT_EVENT, body=surrogate)
    with pytest.raises(UnicodeEncodeError):
        MAPPER.to_stored_event(event)
    with pytest.raises(TypeError):
        encode_event(event)


def test_a_body_that_looks_like_a_typed_value_stays_text() -> None:
    """The decoder does not mistake a sender's text for the transcoder's notation of typed values."""
    body = '{"_type_":"datetime_iso","_data_":"2026-01-31T08:30:00+00:00"}'
    event = dataclasses.replace(SENT_EVENT, body=body, reported_status=body)
    stored = MAPPER.to_stored_event(event)
    assert decode_event(ORDER_NO, 1, TOPIC, stored.state) == event
    fields = read_fields(stored.state)
    assert fields is not None
    assert fields["body"] == body


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
def test_unreadable_events_raise(topic: str, state: bytes) -> None:
    """Unknown topics, invalid bytes, invalid times and unknown class versions are errors."""
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, topic, state)


def test_a_newer_class_version_raises() -> None:
    """An event of a newer class version may have another meaning, so the decoder refuses it."""
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, TOPIC, changed_state(class_version=2))


@pytest.mark.parametrize("name", sorted(orjson.loads(SENT_STATE).keys() - {"timestamp", "occurred_at"}))
def test_an_event_that_lacks_a_field_raises(name: str) -> None:
    """An incomplete event fails when it is decoded, not with an AttributeError later."""
    fields = orjson.loads(SENT_STATE)
    del fields[name]
    with pytest.raises(UndecodableEventError):
        decode_event(ORDER_NO, 1, TOPIC, orjson.dumps(fields))


@pytest.mark.parametrize(
    "topic", ["order.unknown", "domain.order:Order.Event", "this:s", "unittest.__main__:x", f"{TOPIC}.X", ""]
)
def test_another_topic_is_refused_before_the_library_sees_it(topic: str) -> None:
    """Only the topic of an order's event is resolved: the library would import the module of any other one."""
    imported = {*sys.modules}
    with pytest.raises(UndecodableEventError, match=re.escape(f"the topic {topic!r} is not one")):
        decode_event(ORDER_NO, 1, topic, changed_state(class_version=1))
    assert {*sys.modules} == imported


def test_only_the_codec_lets_the_library_decode() -> None:
    """No other module of the product uses the library's decoder, which resolves every topic."""
    names = ("eventsourcing.persistence", "eventsourcing.application", "resolve_topic", "MAPPER")
    files = [file for folder in ("service", "projections", "domain") for file in (ROOT / folder).rglob("*.py")]
    using = {
        str(file.relative_to(ROOT)) for file in files if any(name in file.read_text("utf-8") for name in names)
    }
    assert using == {"service/event_log/codec.py"}


def test_the_present_class_version_may_be_spelt_out() -> None:
    """The default class version is 1. A written class version does not become a field of the event."""
    assert vars(decode_event(ORDER_NO, 1, TOPIC, changed_state(class_version=1))) == vars(SENT_EVENT)


def test_read_fields() -> None:
    """The result has the fields as in JSON, with times as text in UTC, and without the log's columns."""
    fields = read_fields(SENT_STATE)
    assert fields is not None
    assert fields["timestamp"] == "2026-01-31T08:30:00.123456Z"
    assert fields["occurred_at"] == "2026-01-31T08:29:58Z"
    assert fields["body"] == SENT_EVENT.body
    assert fields["skipped"] == []
    names = vars(SENT_EVENT).keys() - {"originator_id", "originator_version", "repeats"}
    assert fields.keys() == names | {"repeats_version"}


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("2026-01-31T15:30:00+07:00", "2026-01-31T08:30:00Z"),
        ("2026-01-31T08:30:00.5-00:30", "2026-01-31T09:00:00.500000Z"),
        ("yesterday", "yesterday"),
        ("0001-01-01T00:00:00+07:00", "0001-01-01T00:00:00+07:00"),
    ],
)
def test_a_time_of_another_writer_is_shown_in_utc(stored: str, shown: str) -> None:
    """A time with any offset ends in Z; text that is not a valid time stays unchanged."""
    fields = read_fields(changed_state(occurred_at={"_type_": "datetime_iso", "_data_": stored}))
    assert fields is not None
    assert fields["occurred_at"] == shown


def test_an_event_is_shown_with_its_documented_members() -> None:
    """The type of an event's data has the event's fields, and those that may be absent are optional."""
    fields = dataclasses.fields(Order.StatusReported)
    names = {"repeats_version" if field.name == "repeats" else field.name for field in fields}
    assert StatusReported.__annotations__.keys() == names - {"originator_id", "originator_version"}
    added = {field.name for field in fields if field.default is not dataclasses.MISSING}
    assert StatusReported.__optional_keys__ == added
    assert read_status_reported(TOPIC, SENT_STATE, with_bodies=True) == read_fields(SENT_STATE)


@pytest.mark.parametrize(
    ("topic", "state"), [("order.unknown", SENT_STATE), (TOPIC, b"{}"), (TOPIC, b"[]"), (TOPIC, b"\xff")]
)
def test_an_event_that_this_release_does_not_know_has_no_data(topic: str, state: bytes) -> None:
    """An event of another type, or without the documented members, is shown without data."""
    assert read_status_reported(topic, state, with_bodies=True) is None


@pytest.mark.parametrize("state", [b"", b"state4", b"[]", b"null", b'"x"', b"\xff"])
def test_read_fields_of_bytes_that_are_not_a_json_object(state: bytes) -> None:
    """read_fields returns None for bytes that are not a JSON object, and raises no error."""
    assert read_fields(state) is None
