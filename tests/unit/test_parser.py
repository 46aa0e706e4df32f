"""The parser reads any body as a report, or refuses it with a reason, and never raises another error."""

import json
import unicodedata
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from domain.order import Arrival, Report
from service.ingest import parser
from service.ingest.parser import UnreadableError, ignored_members
from tests.support.examples import CNOTE, ORDER_NO, RECEIVED_AT, SENT, SENT_BODY
from tests.support.properties import MANY

ARRIVAL = Arrival("the report_id", RECEIVED_AT)


def body(**fields: Any) -> bytes:
    """Return a valid body with some fields changed."""
    return json.dumps({"order_no": ORDER_NO, "cnote": CNOTE, "status": "Sent", **fields}).encode()


def parse(raw: bytes) -> Report:
    return parser.parse(raw, ARRIVAL)


def reason_of(raw: bytes) -> str:
    with pytest.raises(UnreadableError) as raised:
        parse(raw)
    return str(raised.value)


# Valid bodies


def test_the_documented_body() -> None:
    """Each field of the documented body is read, and the body is kept as text."""
    assert parse(SENT_BODY.encode()) == Report(ARRIVAL, ORDER_NO, "Sent", CNOTE, SENT_BODY)


@pytest.mark.parametrize(
    "text",
    [
        '{"status":"Sent","cnote":"JX1234567890","order_no":"KOM20260131-0001"}',
        ' \r\n\t{ "order_no" : "KOM20260131-0001",\n"cnote": "JX1234567890", "status": "Sent" }\n\n',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","weight":1.10,"rows":[{"a":null}]}',
        '{"__proto__":{"x":1},"":"","order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent"}',
        r'{"order_no":"KOM20260131\u002d0001","cnote":"JX1234567890","st\u0061tus":"S\u0065nt"}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","ORDER_NO":"x","Status":"y"}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","x":[{"status":"y"},{"status":1}]}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","x":"\\"status\\""}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","x":1,"x":2}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","n":123456789012345678901234567890}',
        '{"order_no":"KOM20260131-0001","cnote":"JX1234567890","status":"Sent","n":' + "9" * 300 + ',"\\n":0}',
    ],
    ids=[
        "keys in another order",
        "white space",
        "unknown fields",
        "__proto__ and an empty key",
        "escaped spellings",
        "keys of another case",
        "the keys again, further inside",
        "a key's spelling in a value",
        "another key twice",
        "an integer of 30 digits",
        "an integer of 300 digits, where doubled keys are looked for",
    ],
)
def test_the_same_report_in_other_words(text: str) -> None:
    """Other spellings of the same JSON give the same report, with the body's text unchanged."""
    assert parse(text.encode()) == Report(ARRIVAL, ORDER_NO, "Sent", CNOTE, text)


def test_a_byte_order_mark_is_removed() -> None:
    """A byte order mark before the body is removed, and a second one is not valid JSON."""
    mark = "\ufeff".encode()
    assert parse(mark + SENT_BODY.encode()) == parse(SENT_BODY.encode())
    assert reason_of(mark + mark + SENT_BODY.encode()).startswith("not JSON")


@pytest.mark.parametrize(
    "order_no",
    [
        " KOM1 ",
        "a/b?c#d",
        "%2F",
        "..%2F..",
        "...",
        "😀",
        "\u202eKOM1",
        "K\u00d6M",
        unicodedata.normalize("NFD", "K\u00d6M"),
        "КОМ1",  # noqa: RUF001 - Cyrillic look-alikes are the point
        "'; DROP TABLE order_events; --",
        "<script>alert(1)</script>",
        "=1+1",
        "\u00a0KOM1",
        "x" * 128,
        "😀" * 128,
    ],
)
def test_an_order_number_is_taken_as_it_is(order_no: str) -> None:
    """An order number is not trimmed, folded or normalised: distinct order numbers stay distinct."""
    assert parse(body(order_no=order_no)).order_no == order_no


@pytest.mark.parametrize("number", [0, 7, 10**17, 10**18 - 1])
def test_an_order_number_written_as_a_number(number: int) -> None:
    """A number of up to 18 digits is accepted as its decimal string."""
    assert parse(body(order_no=number)).order_no == str(number)


@pytest.mark.parametrize(
    "status", ["PICK_UP", "  dikirim ", "Transit Jakarta", "😀", "a\nb", "x" * 128, "\u202e"]
)
def test_any_text_is_a_status(status: str) -> None:
    """The parser accepts any text as a status, even outside the vocabulary."""
    assert parse(body(status=status)).reported_status == status


@pytest.mark.parametrize(
    ("cnote", "taken"),
    [
        (CNOTE, CNOTE),
        (" a b ", " a b "),
        (1234567890, "1234567890"),
        (-5, "-5"),
        (0, "0"),
        ("x" * 128, "x" * 128),
        ("=cmd()", "=cmd()"),
        (None, None),
        ("", None),
        ("  \u00a0", None),
        (True, None),
        (1.5, None),
        ([CNOTE], None),
        ({"no": CNOTE}, None),
        ("x" * 129, None),
        ("a\nb", None),
        ("a\x00b", None),
        ("a\x7fb", None),
        ("a\x85b", None),
    ],
)
def test_a_cnote_is_text_an_integer_or_none(cnote: Any, taken: str | None) -> None:
    """An unusable cnote is read as None and does not make the report invalid; the body keeps it."""
    raw = body(cnote=cnote)
    read = parse(raw)
    assert read.reported_cnote == taken
    assert read.body == raw.decode()


def test_a_missing_cnote_is_none() -> None:
    """A report without a cnote is valid, because the airway bill often comes later."""
    assert parse(b'{"order_no":"KOM1","status":"Sent"}').reported_cnote is None


def test_the_report_contains_the_arrival() -> None:
    """The report contains the given arrival unchanged."""
    assert parser.parse(SENT_BODY.encode(), SENT.arrival) == SENT._replace(occurred_at=None)


# Invalid bodies


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b" ",
        b"null",
        b"5",
        b'"x"',
        b"[]",
        b"[" + SENT_BODY.encode() + b"]",
        b"{}",
        SENT_BODY.encode() + b"x",
        SENT_BODY.encode() * 2,
        SENT_BODY.encode() + b"\n" + SENT_BODY.encode(),
        b"/* */" + SENT_BODY.encode(),
        SENT_BODY.encode() + b" // x",
        SENT_BODY.replace('"', "'").encode(),
        SENT_BODY[:-1].encode(),
        SENT_BODY[:-1].encode() + b",}",
        b"order_no=KOM1&status=Sent",
        b'--x\r\nContent-Disposition: form-data; name="status"\r\n\r\nSent\r\n--x--\r\n',
        b'{"order_no":"KOM1","status":"Sent","n":NaN}',
        b'{"order_no":"KOM1","status":"Sent","n":Infinity}',
        b'{"order_no":"KOM1","status":"Sent","n":-Infinity}',
        b'{"order_no":"KOM1","status":"Sent","n":01}',
        b'{"order_no":"KOM1","status":"Sent","n":"\\ud800"}',
        b'{"order_no":"KOM1","status":"\\udc00Sent"}',
        b'{"order_no":"KOM1","status":"Sent","n":"\xed\xa0\x80"}',
        b'{"order_no":"KOM1","status":"Sent","n":"\xff"}',
        b'{"order_no":"KOM1","status":"Sent","n":"\xc0\xaf"}',
        '{"order_no":"KOM1","status":"Sent","n":"é"}'.encode("latin-1"),
        SENT_BODY.encode("utf-16"),
        SENT_BODY.encode("utf-16-le"),
        SENT_BODY.encode("utf-32"),
        b'{"order_no":"KOM1","status":"a\nb"}',
        b'{"order_no":"KOM1","status":"Sent","x":' + b"[" * 60_000 + b"]" * 60_000 + b"}",
        b'{"order_no":"KOM1","status":"Sent\\n","x":' + b'{"":' * 60_000 + b"1" + b"}" * 60_000 + b"}",
        b"[" * 60_000,
        b'{"x":' * 60_000,
    ],
)
def test_a_body_that_is_not_a_json_object_in_utf_8_is_refused(raw: bytes) -> None:
    """A body that is not a JSON object in UTF-8 is refused with a one-line reason that does not contain the
    body.
    """
    reason = reason_of(raw)
    assert reason.startswith(("not JSON", "not a JSON object", "order_no is missing"))
    assert "\n" not in reason
    assert len(reason) < 200


@pytest.mark.parametrize("depth", [10, 900, 1_000, 1_100])
@pytest.mark.parametrize("escape", ["", "\\n"])
def test_nesting_is_read_or_refused(depth: int, escape: str) -> None:
    """Any depth of nesting is read or refused, even where the two JSON readers have different limits."""
    raw = f'{{"order_no":"KOM1","status":"Sent{escape}","x":{"[" * depth}{"]" * depth}}}'.encode()
    if depth < 500:
        assert parse(raw).body == raw.decode()
    else:
        assert_read_or_refused(raw)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"order_no": None}, "order_no is missing"),
        ({"order_no": ""}, "order_no is blank"),
        ({"order_no": " \t\u00a0\u3000"}, "order_no is blank"),
        ({"order_no": "x" * 129}, "order_no has more than 128 characters"),
        ({"order_no": "a\x00b"}, "order_no has control characters"),
        ({"order_no": "a\nb"}, "order_no has control characters"),
        ({"order_no": "a\x1fb"}, "order_no has control characters"),
        ({"order_no": "a\x7fb"}, "order_no has control characters"),
        ({"order_no": "a\x9fb"}, "order_no has control characters"),
        ({"order_no": "."}, "order_no is a path segment that clients remove"),
        ({"order_no": ".."}, "order_no is a path segment that clients remove"),
        ({"order_no": -1}, "order_no is negative or has more than 18 digits"),
        ({"order_no": 10**18}, "order_no is negative or has more than 18 digits"),
        ({"order_no": 10**30}, "order_no is not text"),
        ({"order_no": 1.0}, "order_no is not text"),
        ({"order_no": True}, "order_no is not text"),
        ({"order_no": False}, "order_no is not text"),
        ({"order_no": ["KOM1"]}, "order_no is not text"),
        ({"order_no": {"no": "KOM1"}}, "order_no is not text"),
        ({"status": None}, "status is missing"),
        ({"status": ""}, "status is blank"),
        ({"status": " \n"}, "status is blank"),
        ({"status": 5}, "status is not text"),
        ({"status": True}, "status is not text"),
        ({"status": ["Sent"]}, "status is not text"),
        ({"status": {"": "Sent"}}, "status is not text"),
        ({"status": "x" * 129}, "status has more than 128 characters"),
        ({"status": "a\x00b"}, "status has a NUL character"),
    ],
)
def test_a_field_that_cannot_be_used(fields: dict[str, Any], reason: str) -> None:
    """The reason names the unusable field and its fault."""
    assert reason_of(body(**fields)) == reason


@pytest.mark.parametrize("missing", ["order_no", "status"])
def test_a_missing_field(missing: str) -> None:
    """An absent order number or status is reported as missing, as a null one is."""
    fields = {name: value for name, value in json.loads(SENT_BODY).items() if name != missing}
    assert reason_of(json.dumps(fields).encode()) == f"{missing} is missing"


def test_the_order_number_is_kept_where_it_could_be_read() -> None:
    """The error has the order number if it is readable, so that the quarantine can show it, and
    None otherwise.
    """
    with pytest.raises(UnreadableError) as raised:
        parse(body(status=None))
    assert raised.value.order_no == ORDER_NO
    with pytest.raises(UnreadableError) as raised:
        parse(body(order_no=None))
    assert raised.value.order_no is None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"order_no":"A","status":"Sent","order_no":"B"}', "order_no"),
        ('{"order_no":"A","status":"Sent","order_no":"A"}', "order_no"),
        ('{"order_no":"A","status":"Sent","status":"Packed"}', "status"),
        ('{"order_no":"A","cnote":"1","cnote":"2","status":"Sent"}', "cnote"),
        (r'{"order_no":"A","status":"Sent","st\u0061tus":"Packed"}', "status"),
        (r'{"order_no":"A","st\u0061tus":"Sent","\u0073tatus":"Packed"}', "status"),
        (r'{"order_no":"A","status":"Sent","order\u005Fno":"B"}', "order_no"),
        (r'{"order_no":"A","status":"Sent","cnot\u0065":"B","cnote":null}', "cnote"),
        ('{"order_no":"A","status":"Sent","x":{"status":1},"status":"Packed"}', "status"),
        ('{"order_no":"A","status":"Sent","status":"Packed","x":[{}]}', "status"),
        ('{"order_no" :"A","order_no"\t:"B","status":"Sent"}', "order_no"),
    ],
)
def test_a_key_that_occurs_twice(text: str, key: str) -> None:
    """A body that contains a key twice is refused, even if both values are equal or the spellings differ.

    Nothing shows which of the two the sender meant.
    """
    assert reason_of(text.encode()) == f"{key} occurs twice"


# The sender's time


@pytest.mark.parametrize(
    ("timestamp", "occurred_at"),
    [
        ("2026-01-31T08:29:58Z", datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)),
        ("2026-01-31T15:29:58+07:00", datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)),
        ("2026-01-31 15:29:58.5+07:00", datetime(2026, 1, 31, 8, 29, 58, 500_000, tzinfo=UTC)),
        (1769848198, datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)),
        (1769848198000, datetime(2026, 1, 31, 8, 29, 58, tzinfo=UTC)),
        (1769848198.5, datetime(2026, 1, 31, 8, 29, 58, 500_000, tzinfo=UTC)),
        ("2000-01-01T00:00:00Z", datetime(2000, 1, 1, tzinfo=UTC)),
        ("2099-12-31T23:59:59Z", datetime(2099, 12, 31, 23, 59, 59, tzinfo=UTC)),
        ("2026-01-31T08:29:58", None),
        ("2026-01-31 08:29:58", None),
        ("2026-01-31", None),
        ("0000-00-00", None),
        ("0000-00-00 00:00:00", None),
        ("0001-01-01T00:00:00+07:00", None),
        ("9999-12-31T23:59:59Z", None),
        ("9999-12-31T23:59:59-07:00", None),
        ("1999-12-31T23:59:59Z", None),
        ("2100-01-01T00:00:00Z", None),
        ("2000-01-01T00:00:00+07:00", None),
        ("2026-02-30T08:29:58Z", None),
        ("2026-01-31T08:29:58+99:00", None),
        ("yesterday", None),
        ("", None),
        ("1769848198", None),
        (0, None),
        (-1, None),
        (2**63, None),
        (10**300, None),
        (1e308, None),
        (-1e308, None),
        (True, None),
        (None, None),
        ([2026], None),
        ({"$date": 1769848198000}, None),
    ],
)
def test_occurred_at(timestamp: Any, occurred_at: datetime | None) -> None:
    """occurred_at is a time with an offset, or seconds or milliseconds since 1970, in a plausible year;
    otherwise None.
    """
    read = parse(body(timestamp=timestamp))
    assert read.occurred_at == occurred_at
    assert read.occurred_at is None or read.occurred_at.tzinfo is UTC


def test_a_time_with_a_tail_is_none() -> None:
    """A text that only begins as a time is read as None."""
    assert parse(body(timestamp="2026-01-31T08:29:58Z\x00junk")).occurred_at is None


def test_a_body_without_a_timestamp_has_no_time() -> None:
    """Without a timestamp, occurred_at is None; the time of arrival does not replace it."""
    assert parse(body()).occurred_at is None


# Arbitrary bodies


def assert_read_or_refused(raw: bytes) -> None:
    try:
        read = parse(raw)
    except UnreadableError:
        return
    fields = orjson.loads(read.body)
    assert read.body.encode() == raw.removeprefix(b"\xef\xbb\xbf")
    assert str(fields["order_no"]) == read.order_no
    assert fields["status"] == read.reported_status


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["order_no", "cnote", "status", "timestamp", "st\\u0061tus", "x"])
PAIRS = st.lists(
    st.tuples(KEYS, st.one_of(JSON, st.text(max_size=140), st.sampled_from(["KOM1", "Sent"]))), max_size=6
)


@MANY
@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"{")
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    """Arbitrary bytes are read as a report or raise UnreadableError."""
    assert_read_or_refused(raw)


@MANY
@given(PAIRS, st.booleans(), st.booleans())
def test_any_object_is_read_or_refused(pairs: list[tuple[str, Any]], ascii_only: bool, mark: bool) -> None:  # noqa: FBT001
    """Objects with the parser's keys, doubled or escaped, are read or refused, and a read body is
    kept as text.
    """
    members = (f'"{key}":{json.dumps(value, ensure_ascii=ascii_only)}' for key, value in pairs)
    text = f"{{{','.join(members)}}}"
    raw = text.encode("utf-8", "surrogatepass")
    assert_read_or_refused(b"\xef\xbb\xbf" + raw if mark else raw)


@MANY
@given(PAIRS)
def test_an_object_with_a_doubled_key_is_never_read(pairs: list[tuple[str, Any]]) -> None:
    """An object with a doubled key is refused, however its keys are spelt."""
    members = (f'"{key}":{json.dumps(value)}' for key, value in pairs)
    keys = [json.loads(f'"{key}"') for key, _ in pairs if key not in ("x", "timestamp")]
    doubled = '{"order_no":"KOM1","status":"Sent",' + ",".join(members) + "}"
    if set(keys) & {"order_no", "status"} or keys.count("cnote") > 1:
        with pytest.raises(UnreadableError):
            parse(doubled.encode())


@MANY
@given(st.text(min_size=1, max_size=128), st.text(min_size=1, max_size=128))
def test_any_text_stays_as_it_is(order_no: str, status: str) -> None:
    """An accepted order number and status equal the written ones, character for character."""
    raw = json.dumps({"order_no": order_no, "status": status}).encode()
    try:
        read = parse(raw)
    except UnreadableError:
        controls = any(unicodedata.category(character) in ("Cc", "Cs") for character in order_no + status)
        assert controls or not order_no.strip() or not status.strip() or order_no in (".", "..")
    else:
        assert (read.order_no, read.reported_status, read.body) == (order_no, status, raw.decode())


# Members that were not taken


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({}, []),
        ({"timestamp": "2026-01-31T08:30:00Z"}, []),
        ({"timestamp": 1_769_848_200}, []),
        ({"cnote": None}, []),
        ({"cnote": " ", "timestamp": ""}, []),
        ({"cnote": {}}, ["cnote"]),
        ({"cnote": False}, ["cnote"]),
        ({"cnote": "x" * 129}, ["cnote"]),
        ({"timestamp": "yesterday"}, ["timestamp"]),
        ({"timestamp": "2026-01-31T08:30:00"}, ["timestamp"]),
        ({"timestamp": 0}, ["timestamp"]),
        ({"cnote": [], "timestamp": {}, "weight": "heavy"}, ["cnote", "timestamp"]),
    ],
)
def test_a_member_that_is_sent_but_not_taken_is_named(fields: dict[str, Any], ignored: list[str]) -> None:
    """A member counts as ignored if it is not blank and its value is invalid. Unknown members do not count."""
    raw = body(**fields)
    report = parse(raw)
    assert ignored_members(raw.decode(), report.reported_cnote, report.occurred_at) == ignored


def test_an_ignored_member_may_be_spelled_with_escapes() -> None:
    """A member is found even if its name is written with JSON escapes."""
    text = r'{"order_no":"KOM1","status":"Sent","t\u0069mestamp":"soon"}'
    report = parse(text.encode())
    assert ignored_members(text, report.reported_cnote, report.occurred_at) == ["timestamp"]


@pytest.mark.parametrize("text", ["", "a timestamp", '["timestamp"]'])
def test_a_body_of_another_writer_has_no_ignored_members(text: str) -> None:
    """A body that was erased, or recorded by another program, need not be a JSON object."""
    assert ignored_members(text, None, None) == []
