"""The HTTP contract, tested over real sockets with the whole application."""

import asyncio
import base64
import gzip
import json
from datetime import UTC, datetime, timedelta

import pytest

from domain.statuses import STATUSES
from projections.postgres import Connection
from projections.views import VIEWS
from service.http.connections import Limits
from service.projecting.locks import HOLD_VIEW_LOCK
from service.version import build_info
from tests.support.client import Client, serving_client
from tests.support.waiting import PATIENCE_SECONDS

RECEIPT = {
    "outcome",
    "report_id",
    "order_no",
    "version",
    "position",
    "status",
    "reported_status",
    "skipped",
    "reason",
    "quarantine_id",
    "ignored",
}


# The requests of the samples in the sender's documentation. All of them use PUT, and their bytes differ.
CURL_BODY = b'{\n"order_no": "KOM1",\n"cnote": "AWB1",\n"status": "Dikirim"\n}'
COMPACT_BODY = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
_JSON = b"Accept: application/json\r\nContent-Type: application/json\r\n"
DOCUMENTED = {
    "curl": (b"User-Agent: curl/7.88.1\r\n" + _JSON, CURL_BODY),
    "javascript fetch": (b"Accept-Language: *\r\nSec-Fetch-Mode: cors\r\n" + _JSON, COMPACT_BODY),
    "php curl": (b"Accept-Encoding: deflate, gzip, br\r\n" + _JSON, CURL_BODY),
    "go net/http": (b"User-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n" + _JSON, CURL_BODY),
    "node axios": (b"User-Agent: axios/1.7.9\r\nConnection: keep-alive\r\n" + _JSON, COMPACT_BODY),
}


@pytest.mark.parametrize("sample", DOCUMENTED)
async def test_every_documented_sender_is_understood(client: Client, sample: str) -> None:
    """Each sample of the sender's documentation becomes an event that keeps the body unchanged."""
    headers, body = DOCUMENTED[sample]
    request = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\n" + headers
    answer = await client.talk(request + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    receipt = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    assert receipt["outcome"] == "advanced"
    (event,) = (await client.get("/orders/KOM1/events"))["events"]
    assert event["data"]["body"] == body.decode()


@pytest.mark.parametrize("method", ["PUT", "POST"])
async def test_a_report_gets_the_receipt_of_the_contract(client: Client, method: str) -> None:
    """PUT and POST get 200 with a complete receipt, and the event is already in the log."""
    receipt = await client.raw(COMPACT_BODY, method)
    report_id = receipt.pop("report_id")
    assert receipt == {
        "outcome": "advanced",
        "order_no": "KOM1",
        "version": 1,
        "position": 1,
        "status": "in_transit",
        "reported_status": "Dikirim",
        "skipped": [],
        "reason": None,
        "quarantine_id": None,
        "ignored": [],
    }
    (event,) = (await client.get("/events"))["events"]
    assert event["data"]["report_id"] == report_id


@pytest.mark.parametrize(
    ("body", "order_no"),
    [
        (b"", None),
        (b"not json", None),
        (b"[1]", None),
        (b'"text"', None),
        (b"\xff\xfe", None),
        (b'{"cnote":"A","status":"Sent"}', None),
        (b'{"order_no":7.5,"status":"Sent"}', None),
        (b'{"order_no":"KOM1"}', "KOM1"),
        (b'{"order_no":"KOM1","status":3}', "KOM1"),
        (b'{"order_no":"KOM1","status":"Sent","order_no":"KOM2"}', None),
        (b"order_no=KOM1&status=Sent", None),
    ],
)
async def test_an_unparseable_body_is_kept_byte_for_byte(
    client: Client, connection: Connection, body: bytes, order_no: str | None
) -> None:
    """An unparseable body gets a 200 receipt with the outcome quarantined, and has no event.

    The sender would retry a 4xx response in vain.
    """
    first, second = await client.raw(body), await client.raw(body)
    assert set(first) == RECEIPT
    assert (first["outcome"], first["order_no"], first["ignored"]) == ("quarantined", order_no, [])
    assert first["reason"]
    assert second["quarantine_id"] == first["quarantine_id"]
    entry = await client.get(f"/quarantine/{first['quarantine_id']}")
    assert base64.b64decode(entry.pop("body_base64")) == body
    assert (await client.get("/quarantine"))["entries"] == [entry]
    assert (entry["state"], entry["times_seen"], entry["reason"]) == ("open", 2, first["reason"])
    kept = await connection.fetch("SELECT body, times_seen, reason FROM quarantine")
    assert [tuple(row) for row in kept] == [(body, 2, first["reason"])]
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0


async def test_a_report_on_an_unreadable_order_is_quarantined(client: Client, connection: Connection) -> None:
    """A report that cannot be judged is quarantined with a 200 response, and its neighbours are recorded."""
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state)"
        " VALUES ('KOM2', 1, 'order.not_known_yet', '{}')"
    )
    receipts = await asyncio.gather(*(client.webhook(f"KOM{number}") for number in range(5)))
    assert [receipt["outcome"] for receipt in receipts] == [
        "advanced", "advanced", "quarantined", "advanced", "advanced",
    ]  # fmt: skip
    assert receipts[2]["order_no"] == "KOM2"


async def test_a_report_that_a_constraint_rejects_fails_alone(client: Client, connection: Connection) -> None:
    """A report that the database rejects without its fault gets 503, and its neighbours are recorded."""
    await connection.execute("ALTER TABLE order_events ADD CHECK (originator_id <> 'KOM2')")
    bodies = [b'{"order_no":"KOM%d","status":"Dikirim"}' % number for number in range(5)]
    statuses = await asyncio.gather(*(client.status("PUT", "/webhook", body) for body in bodies))
    assert statuses == [200, 200, 503, 200, 200]
    assert (await client.get("/quarantine"))["entries"] == []


async def test_an_order_as_it_is_now(client: Client) -> None:
    """An order has all members of the contract, and is sent again only if it has changed."""
    await client.webhook("KOM1", "Diajukan", "")
    last = await client.webhook("KOM1", "Dikirim", "AWB7")
    order, headers = await client.get_with_headers(f"/orders/KOM1?after_position={last['position']}")
    names = ("status_since", "first_reported_at", "last_reported_at", "submitted_at", "shipped_at")
    times = [order.pop(name) for name in names]
    assert all(datetime.fromisoformat(time).tzinfo is not None for time in times)
    assert order == {
        "order_no": "KOM1",
        "cnote": "AWB7",
        "status": "in_transit",
        "status_label": {"id": "Dikirim", "en": "In transit"},
        "reported_status": "Dikirim",
        "settled": False,
        "version": 2,
        "position": 2,
        "picked_up_at": None,
        "delivered_at": None,
        "delivery_attempts": 0,
        "counts": {"advanced": 2, "repeated": 0, "late": 0, "refused": 0, "unrecognised": 0},
        "rejudgements": 0,
        "parked": None,
    }
    tag = headers["ETag"]
    for tags in (tag, f"W/{tag}", f'"1", {tag}', "*"):
        _, headers = await client.get_with_headers("/orders/KOM1", 304, {"If-None-Match": tags})
        assert headers["ETag"] == tag
    await client.get("/orders/KOM1", 200, {"If-None-Match": '"1"'})


async def test_an_order_without_a_status_yet(client: Client) -> None:
    """Until a report advances an order, its status, label, status_since and reported_status are null."""
    last = await client.webhook("KOM1", "Antar Ulang", None)
    order = await client.get(f"/orders/KOM1?after_position={last['position']}")
    assert [order[name] for name in ("status", "status_label", "status_since", "reported_status", "cnote")] == (
        [None] * 5
    )
    assert (order["settled"], order["counts"]["unrecognised"]) == (False, 1)


async def test_an_order_as_it_was_known(client: Client) -> None:
    """A past state, by version or by time, is folded from the events; before and beyond them it is unknown."""
    for status in ("Diajukan", "Dikirim", "mystery", "Diterima"):
        await client.webhook("KOM1", status)
    events = (await client.get("/orders/KOM1/events"))["events"]
    for event in events:
        by_version = await client.get(f"/orders/KOM1?version={event['version']}")
        by_time = await client.get(f"/orders/KOM1?as_of={event['data']['timestamp']}")
        assert by_version == by_time
        assert by_version["version"] == event["version"]
        assert by_version["status"] == event["data"]["status"]
        assert sum(by_version["counts"].values()) == event["version"]
    assert await client.get("/orders/KOM1?version=4") == await client.get("/orders/KOM1?after_position=4")
    before = (datetime.fromisoformat(events[0]["data"]["timestamp"]) - timedelta(seconds=1)).astimezone(UTC)
    for query in ("version=5", f"as_of={before.isoformat()[:19]}Z"):
        assert (await client.get(f"/orders/KOM1?{query}", 404))["title"] == "No such version"
    await client.get("/orders/KOM1?version=1&as_of=2026-01-01T00:00:00Z", 400)
    await client.get("/orders/ABSENT?version=1", 404)


async def test_a_timeline_folds_repeats_and_shows_contradictions(client: Client) -> None:
    """A repeat is counted in the entry that it repeats, unless it has a new cnote; every other report has an
    entry.
    """
    for status, cnote in [
        ("Diajukan", "A1"), ("Diajukan", "A1"), ("Diajukan", "A2"), ("Batal", "A2"), ("Diterima", "A2"),
        ("Diajukan", "A2"),
    ]:  # fmt: skip
        last = await client.webhook("KOM1", status, cnote)
    timeline = await client.get(f"/orders/KOM1/timeline?after_position={last['position']}")
    assert (timeline["order_no"], timeline["status"], timeline["next"]) == ("KOM1", "cancelled", None)
    shown = [
        (entry["version"], entry["verdict"], entry["reported_cnote"], entry["repeats"])
        for entry in timeline["entries"]
    ]
    assert shown == [
        (1, "advanced", "A1", 1),
        (3, "repeated", "A2", 0),
        (4, "advanced", "A2", 0),
        (5, "refused", "A2", 0),
        (6, "late", "A2", 0),
    ]
    first, refused = timeline["entries"][0], timeline["entries"][3]
    assert first["last_repeated_at"] > first["received_at"]
    assert refused["reason"] == "delivered contradicts cancelled, which was reported before it"
    assert set(first) == {
        "version", "verdict", "status", "previous_status", "reported_status", "recognised", "status_label",
        "reported_cnote", "skipped", "reason", "received_at", "occurred_at", "repeats", "last_repeated_at",
        "rejudges", "reported_at",
    }  # fmt: skip
    assert (refused["status"], refused["recognised"]) == ("cancelled", "delivered")
    assert refused["status_label"] == {"id": "Diterima", "en": "Delivered"}


async def test_a_receipt_names_what_was_not_taken(client: Client) -> None:
    """A receipt has all members, and names each that was sent but not taken; a replay of its key does too."""
    receipt = await client.webhook("KOM1", cnote={"no": 1}, timestamp="soon")
    assert set(receipt) == RECEIPT
    assert (receipt["outcome"], receipt["ignored"]) == ("advanced", ["cnote", "timestamp"])
    for _ in range(2):
        body = b'{"order_no":"KOM1","status":"Dikirim","cnote":"A","timestamp":{}}'
        receipt = await client.raw(body, **{"Idempotency-Key": "k1"})
        assert (receipt["version"], receipt["ignored"]) == (2, ["timestamp"])
    assert (await client.webhook("KOM1", cnote=""))["ignored"] == []


async def test_an_event_names_the_version_that_it_repeats(client: Client) -> None:
    """Wherever an event is shown, ``repeats_version`` is a version, and its times end in Z."""
    await client.webhook("KOM1", timestamp="2026-01-31T15:30:00+07:00")
    await client.webhook("KOM1")
    events = await client.walk("/events", "events")
    assert [event["data"]["repeats_version"] for event in events] == [None, 1]
    assert all("repeats" not in event["data"] for event in events)
    assert events[0]["data"]["occurred_at"] == "2026-01-31T08:30:00Z"
    assert all(event["data"]["timestamp"].endswith("Z") for event in events)
    of_order = (await client.get("/orders/KOM1/events"))["events"]
    lines = (await client.text("/events.ndjson")).splitlines()
    async with client.reading("/events/stream?after=0") as reader:
        live = [json.loads((await reader.message())["data"]) for _ in events]
    for shown in (of_order, [json.loads(line) for line in lines], live):
        assert [one["data"] for one in shown] == [event["data"] for event in events]


async def test_the_feed_can_always_be_followed(client: Client) -> None:
    """``next`` of the log is never null: it leads to the events after the last one, also from an empty page."""
    empty, headers = await client.get_with_headers("/events?limit=2")
    log = f"log={headers['X-Order-Tracking-Log']}"
    assert empty == {"events": [], "next": f"/events?limit=2&after=0&{log}"}
    for _ in range(3):
        receipt = await client.webhook("KOM1")
    first = await client.get(empty["next"])
    second = await client.get(first["next"])
    assert [event["position"] for event in (*first["events"], *second["events"])] == [1, 2, 3]
    end, headers = await client.get_with_headers(second["next"])
    place = f"/events?limit=2&after=3&last={receipt['report_id']}&{log}"
    assert end == {"events": [], "next": place}
    assert headers["Link"] == f'<{place}>; rel="next"'
    await client.webhook("KOM1")
    assert [event["position"] for event in (await client.get(place))["events"]] == [4]


async def test_an_orders_events_are_paged_by_version(client: Client) -> None:
    """An order's events are paged by ``after_version``, and the last page has no next."""
    await client.webhook("KOM2")
    for _ in range(3):
        await client.webhook("KOM1")
    page = await client.get("/orders/KOM1/events?after_version=1&limit=1")
    assert [event["version"] for event in page["events"]] == [2]
    assert page["next"].startswith("/orders/KOM1/events?limit=1&after_version=2&last=")
    last = await client.get(page["next"])
    assert ([event["version"] for event in last["events"]], last["next"]) == ([3], None)


async def test_every_list_is_paged_completely(client: Client) -> None:
    """Following the links returns every item once and in order, with any page size and any filter."""
    for number in range(7):
        last = await client.webhook(f"KOM {number}", "Diajukan", "AWB" if number % 2 else "")
    for status in ("Dikirim", "Diantar", "Diterima"):
        last = await client.webhook("KOM 3", status)
    at = f"after_position={last['position']}"
    await client.get(f"/orders?{at}")
    await client.get(f"/audit/transitions?{at}")

    orders = await client.walk("/orders?limit=2", "orders")
    assert [order["order_no"] for order in orders] == [f"KOM {number}" for number in range(6, -1, -1)]
    submitted = await client.walk("/orders?limit=2&status=submitted&cnote=AWB", "orders")
    assert [order["order_no"] for order in submitted] == ["KOM 5", "KOM 1"]
    assert await client.walk("/orders?cnote=ABSENT", "orders") == []

    entries = await client.walk("/orders/KOM%203/timeline?limit=3", "entries")
    assert [entry["version"] for entry in entries] == [1, 2, 3, 4]
    events = await client.walk("/orders/KOM%203/events?limit=3", "events")
    assert [event["version"] for event in events] == [1, 2, 3, 4]
    log = await client.walk("/events?limit=4", "events")
    assert [event["position"] for event in log] == list(range(1, 11))
    assert set(log[0]) == {"position", "order_no", "version", "type", "recorded_at", "data"}

    transitions = await client.walk("/audit/transitions?limit=4&verdict=advanced", "transitions")
    assert [transition["position"] for transition in transitions] == list(range(1, 11))
    assert set(transitions[0]) == {
        "position", "order_no", "version", "verdict", "from", "to", "reported_status", "reason", "skipped",
        "received_at", "rejudges",
    }  # fmt: skip
    moved = await client.walk("/audit/transitions?from=submitted&to=in_transit", "transitions")
    assert [(one["order_no"], one["skipped"]) for one in moved] == [("KOM 3", ["packed", "picked_up"])]
    since = transitions[7]["received_at"]
    assert len(await client.walk(f"/audit/transitions?since={since}&limit=1", "transitions")) == 3
    assert len(await client.walk(f"/audit/transitions?until={since}&order_no=KOM%203", "transitions")) == 1


STRANGE_ORDER_NOS = (
    "KOM/1",
    "a?b#c",
    "..%2F",
    "%41",
    "KOM 1 ",
    "😀",
    "\u202egnp",
    "é",
    "e\u0301",
    "\u041a\u041e\u041c1",
    "a+b&c=d",
)


async def test_any_order_number_is_readable_at_its_percent_encoded_path(client: Client) -> None:
    """Unusual order numbers stay distinct and unchanged, and are readable at their percent-encoded paths."""
    receipts = {order_no: await client.webhook(order_no) for order_no in STRANGE_ORDER_NOS}
    for order_no, receipt in receipts.items():
        assert receipt["order_no"] == order_no
        escaped = "".join(f"%{byte:02X}" for byte in order_no.encode())
        for query in (f"after_position={receipt['position']}", "version=1"):
            assert (await client.get(f"/orders/{escaped}?{query}"))["order_no"] == order_no
        timeline = await client.get(f"/orders/{escaped}/timeline?after_position={receipt['position']}&limit=1")
        assert timeline["order_no"] == order_no
        assert len((await client.get(f"/orders/{escaped}/events"))["events"]) == 1


BAD_PARAMETERS = (
    ("/orders?limit=0", "limit"),
    ("/orders?limit=1001", "limit"),
    ("/orders?limit=x", "limit"),
    ("/orders?limit=-1", "limit"),
    ("/orders?status=sent", "status"),
    ("/orders?cursor=%25", "cursor"),
    ("/orders?cursor=LTE", "cursor"),
    ("/orders?colour=red", "colour"),
    ("/orders?limit=1&limit=2", "limit"),
    ("/orders?cnote=%00", "cnote"),
    ("/orders/KOM1?as_of=yesterday", "as_of"),
    ("/orders/KOM1?as_of=2026-01-01T00:00:00", "as_of"),
    ("/orders/KOM1?version=0", "version"),
    ("/orders/KOM1?version=99999999999999999999", "version"),
    ("/orders/KOM1?after_position=-1", "after_position"),
    ("/orders/KOM1/events?after_version=x", "after_version"),
    ("/orders/KOM1/events?after=1", "after"),
    ("/audit/transitions?verdict=postponed", "verdict"),
    ("/audit/transitions?from=nowhere", "from"),
    ("/audit/transitions?since=0", "since"),
    ("/events?after=9223372036854775808", "after"),
)


async def test_a_bad_parameter_is_named(client: Client) -> None:
    """An invalid parameter gets 400 with a problem that names it."""
    for path, parameter in BAD_PARAMETERS:
        problem = await client.get(path, 400)
        assert (problem["title"], problem["parameter"]) == ("Bad parameter", parameter), path
        assert problem["status"] == 400


@pytest.mark.parametrize("path", ["/orders/%00", "/orders/%zz", "/orders/%FF", "/orders/a%0Ab/timeline"])
async def test_a_path_with_invalid_text_is_refused(client: Client, path: str) -> None:
    """Broken escapes and control characters in a path get 400."""
    answer = await client.talk(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer


async def test_the_quarantine_is_paged(client: Client) -> None:
    """The list has every entry once, newest first, and an invalid id gets 404."""
    for number in range(5):
        await client.raw(b"not json %d" % number)
    entries = await client.walk("/quarantine?limit=2", "entries")
    assert [entry["quarantine_id"] for entry in entries] == [5, 4, 3, 2, 1]
    for path in ("/quarantine/9", "/quarantine/0", "/quarantine/x", "/quarantine/99999999999999999999"):
        assert (await client.get(path, 404))["title"] == "Unknown entry"


async def test_unknown_orders_paths_and_methods_are_problems(client: Client) -> None:
    """Unknown orders and paths get 404 and other methods 405 with Allow, all as problems."""
    for path in ("/orders/ABSENT", "/orders/ABSENT/timeline", "/orders/ABSENT/events"):
        assert (await client.get(path, 404))["title"] == "Unknown order"
    await client.get("/nothing", 404)
    problem, headers = await client.get_with_headers("/webhook", 405)
    assert (problem["status"], headers["Allow"]) == (405, "POST,PUT")


async def recorded_unseen(client: Client, connection: Connection) -> int:
    """Record a report that no view will show as long as the connection is open, and return its position."""
    for view in VIEWS:
        await connection.execute(HOLD_VIEW_LOCK, view.name)
    receipt = await client.webhook("KOM1")
    return int(receipt["position"])


async def test_a_position_that_does_not_come_is_waited_for_and_refused(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read waits a limited time for its position, and then gets 503 with Retry-After."""
    monkeypatch.setattr("service.api.freshness.AFTER_POSITION_SECONDS_MAX", 0.2)
    position = await recorded_unseen(client, connection)
    for path in ("/orders/KOM1", "/orders", "/orders/KOM1/timeline", "/audit/transitions"):
        problem, headers = await client.get_with_headers(f"{path}?after_position={position}", 503)
        assert problem["view"] in {"current_status", "timeline"}
        assert int(headers["Retry-After"]) > 0


async def test_every_receipt_can_be_read_at_once(client: Client) -> None:
    """A read with the position of a receipt always includes that report."""
    for number in range(50):
        receipt = await client.webhook("KOM1", "Dikirim")
        order = await client.get(f"/orders/KOM1?after_position={receipt['position']}")
        assert order["version"] == number + 1


async def test_every_response_shows_that_an_order_is_parked(client: Client, connection: Connection) -> None:
    """A parked order is shown with ``parked``; a read of its parked event gets 503 at once."""
    await client.webhook("KOM1")
    insert = (
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        "VALUES ($1, $2, 'order.not_known_yet', '{}') RETURNING notification_id"
    )
    at = await connection.fetchval(insert, "KOM1", 2)
    await connection.fetchval(insert, "KOM2", 1)
    after = await client.webhook("KOM3")
    await client.get(f"/orders/KOM3?after_position={after['position']}")
    await client.get(f"/orders/KOM3/timeline?after_position={after['position']}")
    for path in ("/orders/KOM1", "/orders/KOM1/timeline"):
        view = "timeline" if path.endswith("timeline") else "current_status"
        assert (await client.get(path))["parked"]["view"] == view
        assert (await client.get(f"{path}?after_position={at}", 503))["title"] == "Order parked"
    assert (await client.get("/orders/KOM2", 503))["title"] == "Order parked"
    assert (await client.get("/orders/KOM2/timeline", 503))["title"] == "Order parked"
    (listed,) = [one for one in (await client.get("/orders"))["orders"] if one["order_no"] == "KOM1"]
    assert listed["parked"]["since_version"] == 2
    projections = (await client.get("/projections"))["projections"]
    assert [[one["order_no"] for one in view["parked"]] for view in projections[:2]] == [["KOM1", "KOM2"]] * 2
    assert (await client.get("/orders/KOM1/events"))["events"][1]["data"] is None
    await client.get("/orders/KOM1?version=2", 503)


async def test_the_rules_are_served(client: Client) -> None:
    """GET /transitions returns the vocabulary and the whole table, including the row without a status."""
    rules = await client.get("/transitions")
    assert [status["status"] for status in rules["statuses"]] == list(STATUSES)
    assert {(row["from"], row["leg"]) for row in rules["table"]} >= {
        (None, None),
        ("problem", "on_the_way_back"),
    }
    (submitted,) = [row for row in rules["table"] if row["from"] == "submitted"]
    assert submitted["to"]["returned"] == {
        "verdict": "advanced",
        "skipped": ["packed", "picked_up", "in_transit", "returning"],
    }


async def test_projections_have_positions_and_lags(client: Client) -> None:
    """GET /projections returns the head of the log, and each view's position and lag in events and seconds."""
    receipt = await client.webhook("KOM1")
    await client.get(f"/orders/KOM1?after_position={receipt['position']}")
    await client.get(f"/orders/KOM1/timeline?after_position={receipt['position']}")
    await client.get(f"/statistics?after_position={receipt['position']}")
    answer = await client.get("/projections")
    assert answer["head"] == 1
    for view in answer["projections"]:
        assert (view["position"], view["lag_events"], view["lag_seconds"]) == (1, 0, 0.0)


async def test_an_unexpected_error_is_a_problem_without_a_traceback(
    client: Client, connection: Connection
) -> None:
    """After an unexpected error, such as a missing table, a reader gets 500 without details and webhooks
    continue.
    """
    await client.webhook("KOM1")
    await connection.execute("ALTER TABLE timeline.entries RENAME TO elsewhere")
    problem = await client.get("/orders/KOM1/timeline", 500)
    assert problem == {"type": "about:blank", "title": "Internal Server Error", "status": 500, "detail": None}
    assert (await client.webhook("KOM1"))["version"] == 2


async def test_health(client: Client) -> None:
    """A running service is alive and ready."""
    assert await client.get("/livez") == {"status": "alive", **build_info()}
    assert await client.get("/readyz") == {"status": "ready"}


async def test_a_body_over_the_limit_is_refused_and_a_compressed_one_is_read(client: Client) -> None:
    """A body over the limit gets 413, and a gzip body is decompressed."""
    big = b'{"order_no":"KOM1","status":"Sent","x":"' + b"x" * 65_536 + b'"}'
    async with client.session.put(client.url("/webhook"), data=big) as response:
        assert response.status == 413
        assert response.headers["Content-Type"] == "application/problem+json"
    receipt = await client.raw(gzip.compress(COMPACT_BODY), **{"Content-Encoding": "gzip"})
    assert receipt["outcome"] == "advanced"


async def test_a_body_that_cannot_be_read_is_the_senders_mistake(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Corrupt compression gets 400, and a sender that disconnects during its body leaves no line in the log."""
    url = client.url("/webhook")
    corrupt = b"\x1f\x8b" + COMPACT_BODY
    async with client.session.put(url, data=corrupt, headers={"Content-Encoding": "gzip"}) as response:
        assert (response.status, response.headers["Content-Type"]) == (400, "application/problem+json")
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    # When a later report has a response, the service has processed the ends of those connections.
    await client.webhook("KOM1")
    assert "failed" not in capsys.readouterr().out


async def test_an_idempotency_key_beyond_ascii_is_ignored(client: Client) -> None:
    """A key with bytes beyond ASCII is ignored, and the report is recorded as if it had no key."""
    request = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: \xff\r\nContent-Length: %d\r\n\r\n"
    answer = await client.talk(request % len(COMPACT_BODY) + COMPACT_BODY)
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_a_page_is_bounded_by_bytes_as_well(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large bodies shorten a page to as little as one event, and the pages together have every event."""
    monkeypatch.setattr("service.event_log.store.BATCH_BYTES_MAX", 100_000)
    for _ in range(5):
        await client.webhook("KOM1", note="x" * 60_000)
    for path in ("/events", "/orders/KOM1/events"):
        first = await client.get(path)
        assert len(first["events"]) == 2
        assert [event["version"] for event in await client.walk(path, "events")] == [1, 2, 3, 4, 5]


async def test_idempotency_keys_over_http(client: Client, connection: Connection) -> None:
    """A repeated key gets the first receipt again, and a key that is too long is ignored."""
    for name in ("webhook-id", "Idempotency-Key"):
        first = await client.raw(COMPACT_BODY, **{name: f"key of {name}"})
        again = await client.raw(COMPACT_BODY, **{name: f"key of {name}"})
        assert first == again
    before = await connection.fetchval("SELECT count(*) FROM order_events")
    assert before == 2
    await client.raw(COMPACT_BODY, **{"webhook-id": "x" * 257})
    await client.raw(COMPACT_BODY, **{"webhook-id": "x" * 257})
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 4


async def test_a_request_may_take_longer_than_its_head(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit for a head ends neither a running request nor the one behind it."""
    monkeypatch.setattr("service.api.freshness.AFTER_POSITION_SECONDS_MAX", 1.5)
    limits = Limits(head_seconds_max=0.2, sweep_seconds=0.1)
    async with serving_client(dsn, limits=limits) as client:
        position = await recorded_unseen(client, connection)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(b"GET /orders?after_position=%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % position)
        # Longer than the limit for a head, while the first request waits for its position.
        await asyncio.sleep(0.3)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            first = await reader.readuntil(b"\r\n\r\n")
            second = await reader.readuntil(b"alive")
        writer.close()
        await writer.wait_closed()
    assert first.startswith(b"HTTP/1.1 503 ")
    assert b"HTTP/1.1 200 " in second


async def test_a_half_closed_client_gets_its_receipt(client: Client) -> None:
    """A client that closes its side after the body still gets its receipt, and then the connection ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    head = b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(COMPACT_BODY) + COMPACT_BODY)
    writer.write_eof()
    async with asyncio.timeout(PATIENCE_SECONDS):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 200 OK")
