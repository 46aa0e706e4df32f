"""Hostile inputs as bytes to a real service process.

``owed`` also checks every response, and no input may leave a line in the service's log.
"""

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import Any, Final
from urllib.parse import quote

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings

from tests.integration.hostile_inputs import (
    BAD_PARAMETERS,
    BADLY_CODED,
    BADLY_FRAMED,
    BESIDE_THE_WEBHOOK,
    BODIES,
    BODY_BYTES_MAX,
    BYTE_ORDER_MARK,
    DOCUMENTED,
    ENDLESS,
    INJECTIONS,
    LARGE,
    LENGTH,
    QUARANTINED,
    SENT,
    SILENT,
    SLOW,
    SMUGGLED,
    STRANGE_ORDER_NOS,
    UNDERSTOOD,
    VERDICTS,
    WELL_CODED,
    Wire,
    body,
    chunked,
    head,
    request,
    split_answers,
)
from tests.support.databases import TestServer
from tests.support.folders import temporary_folder
from tests.support.processes import running_service
from tests.support.waiting import PATIENCE_SECONDS, until

# Enough connections for a crowd, and few enough for one process to open at once.
SLOW_CONNECTIONS: Final = 60


@pytest.fixture(scope="module")
def wire(server: TestServer) -> Iterator[Wire]:
    """One service process for all tests of this module, as a user runs it."""
    with (
        temporary_folder() as folder,
        server.database() as dsn,
        running_service(folder, DATABASE_URL=dsn, LOG_FORMAT="json") as service,
    ):
        wire = Wire(service)
        yield wire


@pytest.fixture(autouse=True)
def _quiet(wire: Wire) -> Iterator[None]:
    """No input leaves a line in the service's log, but for one of each limit that it exceeds."""
    before = len(wire.service.output)
    yield
    lines = [json.loads(line) for line in wire.service.output[before:].splitlines()]
    assert {line["event"] for line in lines} <= {"a connection is closed: it exceeds a limit"}
    assert len({line["limit"] for line in lines}) == len(lines)


# Valid bodies


@pytest.mark.parametrize("raw", UNDERSTOOD.values(), ids=UNDERSTOOD)
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_body_is_kept_as_it_was_written(wire: Wire, method: str, raw: bytes) -> None:
    """The event of a valid report keeps the exact text of the body, including spaces, numbers and key order."""
    answer = wire.exchange(request(method, "/webhook", raw))
    receipt, _ = wire.seen_recorded(raw, answer)
    assert (receipt["order_no"], receipt["reported_status"]) == ("KOM1", "Dikirim")


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "x", ";;;", "", "multipart/form-data"])
def test_the_content_type_is_ignored(wire: Wire, kind: str) -> None:
    """An unusual Content-Type does not make valid JSON invalid; the bodies above had none."""
    wire.recorded(DOCUMENTED, f"Content-Type: {kind}")


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        pytest.param({"cnote": None}, None, id="null"),
        pytest.param({"cnote": ""}, None, id="empty"),
        pytest.param({"cnote": 1234567890}, "1234567890", id="an integer"),
        pytest.param({"cnote": True}, None, id="a boolean"),
        pytest.param({"cnote": 1.5}, None, id="a float"),
        pytest.param({"cnote": ["AWB1"]}, None, id="a list"),
        pytest.param({"cnote": {"no": "AWB1"}}, None, id="an object"),
        pytest.param({"cnote": "x" * 128}, "x" * 128, id="128 characters"),
        pytest.param({"cnote": "x" * 129}, None, id="129 characters"),
        pytest.param({"cnote": "a\nb"}, None, id="a line feed"),
        pytest.param({"cnote": "a\x00b"}, None, id="a NUL"),
    ],
)
def test_an_unusable_cnote_is_null(wire: Wire, fields: dict[str, Any], taken: str | None) -> None:
    """An unusable cnote is recorded as null, and the event's body keeps it."""
    _, event = wire.recorded(body(**fields))
    assert event["reported_cnote"] == taken


def test_a_cnote_may_come_late(wire: Wire) -> None:
    """The cnote of an order is null until a report brings one."""
    receipt, _ = wire.recorded(b'{"order_no":"CNOTE LATE","status":"Diajukan"}')
    order = wire.read(f"/orders/CNOTE%20LATE?after_position={receipt['position']}")
    assert order["cnote"] is None
    receipt, _ = wire.recorded(body(order_no="CNOTE LATE", cnote="AWB LATE"))
    order = wire.read(f"/orders/CNOTE%20LATE?after_position={receipt['position']}")
    assert order["cnote"] == "AWB LATE"


def test_a_cnote_may_change_and_be_of_two_orders(wire: Wire) -> None:
    """The timeline shows every cnote of an order, and a look-up finds every order that ever had a cnote."""
    for order_no, status, cnote in [
        ("CNOTES 1", "Diajukan", "AWB A"), ("CNOTES 1", "Dikirim", "AWB B"), ("CNOTES 2", "Diajukan", "AWB B"),
    ]:  # fmt: skip
        receipt, _ = wire.recorded(body(order_no=order_no, status=status, cnote=cnote))
    at = f"after_position={receipt['position']}"
    entries = wire.read(f"/orders/CNOTES%201/timeline?{at}")["entries"]
    assert [entry["reported_cnote"] for entry in entries] == ["AWB A", "AWB B"]
    for cnote, order_nos in [("AWB%20A", ["CNOTES 1"]), ("AWB%20B", ["CNOTES 2", "CNOTES 1"])]:
        orders = wire.read(f"/orders?cnote={cnote}&{at}")["orders"]
        assert [order["order_no"] for order in orders] == order_nos


@pytest.mark.parametrize(
    ("status", "recognised"),
    [
        ("DIKIRIM", "in_transit"),
        ("  dikirim  ", "in_transit"),
        ("In_Transit", "in_transit"),
        ("in   transit", "in_transit"),
        ("Transit Jakarta", None),
        ("x" * 128, None),
        ("😀", None),
        ("a\nb", None),
    ],
)
def test_a_status_in_any_dress(wire: Wire, status: str, recognised: str | None) -> None:
    """Case, spaces and underscores make no difference, and an unknown status is recorded unchanged."""
    receipt, event = wire.recorded(body(status=status))
    assert receipt["reported_status"] == status
    assert event["recognised"] == recognised
    assert (receipt["outcome"] == "unrecognised") == (recognised is None)


@pytest.mark.parametrize("number", [0, 7, 10**18 - 1])
def test_an_order_number_written_as_a_number(wire: Wire, number: int) -> None:
    """An integer of up to 18 digits is recorded as its decimal text."""
    receipt, _ = wire.recorded(body(order_no=number))
    assert receipt["order_no"] == str(number)
    assert wire.read(f"/orders/{number}?version=1")["order_no"] == str(number)


def test_strange_order_numbers_are_kept_distinct_and_found(wire: Wire) -> None:
    """Unusual order numbers stay distinct and unchanged, and each has its own percent-encoded path."""
    for order_no in STRANGE_ORDER_NOS.values():
        receipt, _ = wire.recorded(body(order_no=order_no))
        assert receipt["order_no"] == order_no
    for order_no in STRANGE_ORDER_NOS.values():
        path = f"/orders/{quote(order_no, safe='')}"
        assert wire.read(f"{path}?after_position={receipt['position']}")["order_no"] == order_no
        assert wire.read(f"{path}?version=1")["order_no"] == order_no
        assert wire.read(f"{path}/timeline?after_position={receipt['position']}")["order_no"] == order_no
        bodies = [event["data"]["body"] for event in wire.read(f"{path}/events")["events"]]
        assert {json.loads(text)["order_no"] for text in bodies} == {order_no}


@pytest.mark.parametrize("injection", INJECTIONS.values(), ids=INJECTIONS)
@pytest.mark.parametrize("field", ["order_no", "cnote", "status", "note", "timestamp"])
def test_an_injection_is_only_text(wire: Wire, field: str, injection: str) -> None:
    """An injection in any field is kept and shown unchanged."""
    receipt, event = wire.recorded(body(**{field: injection}))
    shown = {
        "order_no": receipt["order_no"],
        "cnote": event["reported_cnote"],
        "status": event["reported_status"],
    }
    assert shown.get(field, injection) == injection


@pytest.mark.parametrize("timestamp", ["0000-00-00", "0000-00-00 00:00:00", "9999-12-31T23:59:59Z"])
def test_a_placeholder_time_is_null(wire: Wire, timestamp: str) -> None:
    """For a placeholder time, occurred_at is null and the event's body keeps the text."""
    _, event = wire.recorded(body(timestamp=timestamp))
    assert event["occurred_at"] is None


# Invalid bodies


@pytest.mark.parametrize("raw", QUARANTINED.values(), ids=QUARANTINED)
def test_an_unparseable_body_is_kept_byte_for_byte(wire: Wire, raw: bytes) -> None:
    """An unparseable body gets a 200 response and is kept in the quarantine, without an event."""
    wire.quarantined(raw)


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("application/x-www-form-urlencoded", b"order_no=KOM1&status=Dikirim"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--',
        ),
        ("application/json; charset=utf-16", DOCUMENTED.decode().encode("utf-16")),
        ("application/json; charset=no-such", b"not json"),
    ],
)
def test_a_correct_content_type_does_not_make_a_form_valid(wire: Wire, kind: str, raw: bytes) -> None:
    """Forms and other encodings are quarantined, even if the Content-Type names them correctly."""
    wire.quarantined(raw, f"Content-Type: {kind}")


def kept(wire: Wire, raw: bytes) -> str:
    """Send a body, check that the log or the quarantine has it unchanged, and return the outcome."""
    answer = wire.put(raw)
    outcome: str = answer.json["outcome"]
    if outcome == "quarantined":
        wire.seen_quarantined(raw, answer)
    else:
        receipt, _ = wire.seen_recorded(raw, answer)
        fields = orjson.loads(raw.removeprefix(BYTE_ORDER_MARK))
        assert (receipt["order_no"], receipt["reported_status"]) == (str(fields["order_no"]), fields["status"])
    return outcome


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"9" * 30, b"9" * 5_000, b"1e-400", b"-0", b"0.1e1"])
def test_a_number_that_few_can_hold(wire: Wire, number: bytes) -> None:
    """An extreme number is accepted or quarantined as the parser decides, and the body is kept unchanged."""
    kept(wire, SENT + b',"n":' + number + b"}")
    kept(wire, SENT + rb',"\n":' + number + b"}")


@pytest.mark.parametrize("depth", [100, 900, 1_000, 1_022, 1_023, 1_024, 1_100])
def test_nesting_about_the_depth_that_is_too_deep(wire: Wire, depth: int) -> None:
    """Any depth of nesting is accepted or quarantined, even where the two JSON readers have
    different limits.
    """
    for separator in (b',"x":', rb',"\n":'):
        kept(wire, SENT + separator + b"[" * depth + b"]" * depth + b"}")


@pytest.mark.parametrize("raw", LARGE.values(), ids=LARGE)
def test_64_kib_of_anything_are_answered(wire: Wire, raw: bytes) -> None:
    """An expensive body of the largest size is kept like any other.

    ``make bench`` measures that the cost grows in proportion to the size.
    """
    kept(wire, raw)


# Arbitrary bodies


@settings(
    deadline=None,
    derandomize=True,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(raw=BODIES)
@example(raw=BYTE_ORDER_MARK)
@example(raw=body(order_no="a{b}c"))
@example(raw=BYTE_ORDER_MARK + DOCUMENTED)
def test_any_bytes_are_an_event_or_in_the_quarantine(wire: Wire, raw: bytes) -> None:
    """Every body gets a 200 response, and the log or the quarantine has it unchanged."""
    assert kept(wire, raw) in VERDICTS | {"quarantined"}


# Encodings and sizes of bodies


@pytest.mark.parametrize(("coding", "sent"), WELL_CODED.values(), ids=WELL_CODED)
def test_a_coded_body_is_read(wire: Wire, coding: str, sent: bytes) -> None:
    """A gzip body is decompressed, and the event contains the decompressed text."""
    wire.seen_recorded(DOCUMENTED, wire.put(sent, f"Content-Encoding: {coding}"))


@pytest.mark.parametrize(("status", "sent", "codings"), BADLY_CODED.values(), ids=BADLY_CODED)
@pytest.mark.parametrize("framing", ["by length", "in chunks"])
def test_a_coding_that_cannot_be_undone(
    wire: Wire, framing: str, status: int, sent: bytes, codings: list[str]
) -> None:
    """A corrupt body gets 400, an oversized one 413, and an unknown coding 415; none of them is recorded or
    kept.
    """
    before = wire.state()
    lines = [f"Content-Encoding: {coding}".encode() for coding in codings]
    if framing == "by length":
        raw = head(*lines, b"Content-Length: %d" % len(sent)) + sent
    else:
        raw = head(*lines, b"Transfer-Encoding: chunked") + chunked(sent)
    assert wire.exchange(raw).status == status
    assert wire.state() == before


@pytest.mark.parametrize("length", [BODY_BYTES_MAX + 1, 10**9, 2**63 - 1])
def test_a_body_with_an_oversized_length_is_refused_at_once(wire: Wire, length: int) -> None:
    """A body with an oversized Content-Length gets 413 before any of it arrives."""
    assert wire.exchange(head(b"Content-Length: %d" % length)).status == 413


def test_a_body_that_grows_too_large_is_cut_off(wire: Wire) -> None:
    """A chunked body gets 413 as soon as it exceeds the limit, before its end."""
    raw = head(b"Transfer-Encoding: chunked") + b"4000\r\n%s\r\n" % (b" " * 0x4000) * 5
    assert wire.exchange(raw).status == 413


def is_recorded(wire: Wire, order_no: str) -> bool:
    return wire.get(f"/orders/{order_no}/events").status != 404


def test_a_disconnected_senders_report_is_recorded_once(wire: Wire) -> None:
    """A complete report is recorded although its sender has disconnected, and a retry with its key adds no
    event.
    """
    resetting = struct.pack("ii", 1, 0)
    for number in range(40):
        with wire.connect() as connection:
            raw = body(order_no=f"GONE {number}")
            connection.sendall(request("PUT", "/webhook", raw, f"Idempotency-Key: gone {number}"))
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, resetting)
        with wire.connect() as connection:
            connection.sendall(request("PUT", "/webhook", body(order_no="HALF GONE"))[:-1])
    for number in range(0, 40, 2):
        until(partial(is_recorded, wire, f"GONE%20{number}"))
    for number in range(40):
        receipt, _ = wire.recorded(body(order_no=f"GONE {number}"), f"Idempotency-Key: gone {number}")
        assert receipt["version"] == 1
        assert len(wire.read(f"/orders/GONE%20{number}/events")["events"]) == 1
    assert wire.get("/orders/HALF%20GONE").status == 404


# Malformed HTTP


@pytest.mark.parametrize("raw", BADLY_FRAMED.values(), ids=BADLY_FRAMED)
def test_framing_that_two_readers_could_read_differently(wire: Wire, raw: bytes) -> None:
    """Ambiguous framing gets exactly one response, 400, and the connection closes, so no smuggled request is
    read.
    """
    before = wire.state()
    answers = wire.talk(raw + request("PUT", "/webhook", SMUGGLED))
    assert [(answer.status, answer.headers.get("connection")) for answer in answers] == [(400, "close")]
    assert wire.state() == before


@pytest.mark.parametrize(
    "line",
    [b"PUT /webhook", b"GET /livez", b"PUT /webhook HTTP/0.9", b"PUT /webhook HTTP/2.0", b"PRI * HTTP/2.0"],
)
def test_another_version_of_http(wire: Wire, line: bytes) -> None:
    """HTTP/0.9 and HTTP/2.0 are 400 or 505, and the connection is closed."""
    before = wire.state()
    (answer,) = wire.talk(line + b"\r\n" + LENGTH + b"\r\n\r\n" + SMUGGLED)
    assert answer.status in (400, 505)
    assert answer.headers.get("connection") == "close"
    assert wire.state() == before


@pytest.mark.parametrize("raw", ENDLESS.values(), ids=ENDLESS)
def test_a_head_that_never_ends(wire: Wire, raw: bytes) -> None:
    """An endless head gets 400, or its connection closes, before it uses much time or memory."""
    before = wire.state()
    assert [answer.status for answer in wire.talk(raw)] in ([], [400])
    assert wire.state() == before


# Slow senders


async def trickle(port: int, at_once: bytes, later: bytes) -> bytes:
    """Open a connection, send some bytes, then a byte a second, and return the responses after it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(at_once)
    received = bytearray()

    async def receive() -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(65_536):
                received.extend(piece)

    closing = asyncio.create_task(receive())
    drops = cycle(later[at : at + 1] for at in range(len(later)))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not closing.done():
            if later:
                writer.write(next(drops))
            await asyncio.wait([closing], timeout=1)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return bytes(received)


async def test_slow_senders_are_cut_off_and_others_are_answered(wire: Wire) -> None:
    """A connection that sends a byte a second or no bytes is closed or gets 408, while webhooks are recorded.

    The test takes about 10 s, which is the time limit for a body. ``make faults`` uses 500 such connections.
    """
    kinds = [*SLOW.values(), SILENT]
    slow = [kinds[number % len(kinds)] for number in range(SLOW_CONNECTIONS)]
    ends = asyncio.gather(*(trickle(wire.port, at_once, later) for at_once, later, _ in slow))
    recorded = 0
    while not ends.done():
        answer = await asyncio.to_thread(wire.put, DOCUMENTED)
        assert answer.json["outcome"] in VERDICTS
        recorded += 1
        await asyncio.wait([ends], timeout=0.1)
    assert recorded
    for received, (at_once, _, expected) in zip(await ends, slow, strict=True):
        assert [answer.status for answer in split_answers(received)] in expected, at_once


# Paths and parameters


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
def test_another_method_on_the_webhook(wire: Wire, method: str) -> None:
    """Other methods get 405, and Allow lists the methods of the webhook."""
    answer = wire.exchange(request(method, "/webhook", DOCUMENTED))
    assert answer.status == 405
    assert {name.strip() for name in answer.headers["allow"].split(",")} == {"POST", "PUT"}


@pytest.mark.parametrize("path", BESIDE_THE_WEBHOOK)
def test_a_path_beside_the_webhook(wire: Wire, path: str) -> None:
    """The service does not resolve paths: variants of the webhook's path get 404, and nothing is recorded."""
    before = wire.state()
    assert wire.exchange(request("PUT", path, SMUGGLED)).status == 404
    assert wire.state() == before


@pytest.mark.parametrize("bad", ["%00", "%zz", "%FF", "a%0Ab", "%C0%AF", "%", "a%2"])
@pytest.mark.parametrize("path", ["/orders/{}", "/orders/{}/timeline", "/orders/{}/events", "/quarantine/{}"])
def test_a_read_path_with_invalid_text_is_refused(wire: Wire, path: str, bad: str) -> None:
    """Broken escapes, invalid UTF-8 and control characters in any read path get 400."""
    assert wire.get(path.format(bad)).status == 400


@pytest.mark.parametrize(
    ("path", "parameter"), BAD_PARAMETERS, ids=[quote(path[:40]) for path, _ in BAD_PARAMETERS]
)
def test_a_bad_parameter_is_named(wire: Wire, path: str, parameter: str) -> None:
    """An invalid parameter gets 400 with a problem that names it; no parameter is ignored or clipped."""
    wire.put(DOCUMENTED)
    answer = wire.exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (answer.status, answer.json.get("parameter")) == (400, parameter)


def test_an_order_that_has_not_changed(wire: Wire) -> None:
    """If-None-Match with the current ETag gets 304 without a body; with an older one it gets the order."""
    receipt, _ = wire.recorded(body(order_no="TAGGED"))
    etag = wire.get(f"/orders/TAGGED?after_position={receipt['position']}").headers["etag"]
    answer = wire.get("/orders/TAGGED", f"If-None-Match: {etag}")
    assert (answer.status, answer.headers["etag"], answer.body) == (304, etag, b"")
    receipt, _ = wire.recorded(body(order_no="TAGGED"))
    answer = wire.get(f"/orders/TAGGED?after_position={receipt['position']}", f"If-None-Match: {etag}")
    assert (answer.status, answer.json["version"]) == (200, 2)
