"""The growing log: server-sent events, NDJSON, and lists as CSV."""

import asyncio
import contextlib
import csv
import io
import json
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]  # it brings no types
import pytest
import structlog
import structlog.testing

from projections.postgres import Connection
from projections.windows import POSITION_MAX
from service.database.api_keys import create_key, revoke_key
from service.http.connections import Limits
from service.http.endpoints import NDJSON
from service.http.pagination import encode_cursor
from tests.support.client import Client, StreamReader, serving_client
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async


async def report_many(client: Client, count: int, order_no: str = "KOM{}") -> int:
    receipts = await asyncio.gather(*(client.webhook(order_no.format(number)) for number in range(count)))
    return max(int(receipt["position"]) for receipt in receipts)


async def test_events_come_as_they_are_recorded(client: Client) -> None:
    """A stream sends new events with their positions as ids, and each equals the event of GET /events."""
    await report_many(client, 3)
    async with client.reading("/events/stream") as reader:
        assert reader.response.headers["Content-Type"] == "text/event-stream"
        position = (await client.webhook("KOM9"))["position"]
        message = await reader.message()
    (event,) = (await client.get(f"/events?after={position - 1}"))["events"]
    assert (message["id"], message["event"]) == (str(position), "status_reported")
    assert json.loads(message["data"]) == event


@pytest.mark.parametrize("by", ["header", "parameter"])
async def test_a_reader_goes_on_where_it_was(client: Client, by: str) -> None:
    """A stream from an old position continues to new events without gaps or duplicates."""
    last = await report_many(client, 30)
    path, headers = (
        ("/events/stream", {"Last_Event_ID": "10"}) if by == "header" else ("/events/stream?after=10", {})
    )
    async with client.reading(path, **headers) as reader:
        assert await reader.positions(last - 10) == list(range(11, last + 1))
        now = await report_many(client, 5)
        assert await reader.positions(5) == list(range(now - 4, now + 1))


async def test_a_reader_goes_on_after_a_restart(dsn: str) -> None:
    """A stream ends when the service stops, and continues after the last id with the next service."""
    seen = [0]
    for count in (4, 3):
        async with contextlib.AsyncExitStack() as stack:
            async with serving_client(dsn) as client:
                # The stream outlives the block of the service, so its session must outlive it, too.
                session = await stack.enter_async_context(aiohttp.ClientSession())
                headers = {"Last-Event-ID": str(seen[-1])}
                response = await session.get(client.url("/events/stream"), headers=headers)
                stack.callback(response.close)
                await report_many(client, count)
                seen += await StreamReader(response).positions(count)
            with pytest.raises((EOFError, aiohttp.ClientError)):
                await StreamReader(response).message()
    assert seen == list(range(8))


async def test_an_order_has_a_stream_of_its_own(client: Client) -> None:
    """The stream of an order has only this order's events, old and new, even if the order is new."""
    await client.webhook("KOM/1", "Diajukan")
    await report_many(client, 5)
    async with client.reading("/orders/KOM%2F1/stream?after=0") as reader:
        await report_many(client, 5)
        await client.webhook("KOM/1", "Dikirim")
        events = [json.loads((await reader.message())["data"]) for _ in range(2)]
    assert [(event["order_no"], event["version"]) for event in events] == [("KOM/1", 1), ("KOM/1", 2)]
    async with client.reading("/orders/NEW/stream") as reader:
        await client.webhook("NEW")
        assert json.loads((await reader.message())["data"])["order_no"] == "NEW"


async def test_a_brief_stream_sends_the_head_of_the_log(client: Client) -> None:
    """A brief stream sends only the head of the log, once for several events."""
    head = await report_many(client, 30)
    async with client.reading("/events/stream?brief=true&after=10") as reader:
        caught_up = await reader.message()
        position = (await client.webhook("KOM9"))["position"]
        grown = await reader.message()
    assert caught_up == {"id": str(head), "event": "log_grown", "data": f'{{"position":{head}}}'}
    assert grown == {"id": str(position), "event": "log_grown", "data": f'{{"position":{position}}}'}
    assert position == head + 1


async def test_a_reader_behind_the_memory_reads_the_database(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers that are behind the memory get every event once, however small the memory is."""
    monkeypatch.setattr("service.event_log.tail.MEMORY_EVENTS_MAX", 4)
    monkeypatch.setattr("service.http.streaming.BATCH_EVENTS_MAX", 3)
    monkeypatch.setattr("service.event_log.tail.IDLE_SECONDS", 0.01)
    await report_many(client, 20)
    async with (
        client.reading("/events/stream?after=0") as one,
        client.reading("/orders/KOM7/stream?after=0") as other,
    ):
        last = await report_many(client, 20)
        assert await one.positions(last) == list(range(1, last + 1))
        assert len(await other.positions(2)) == 2


async def test_a_slow_reader_is_cut_off(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not read for too long is disconnected, and its place becomes free."""
    monkeypatch.setattr("service.http.budgets.STREAMS_MAX", 1)
    body = "x" * 30_000
    async with (
        serving_client(dsn, limits=Limits(stall_seconds_max=0.5, sweep_seconds=0.1)) as client,
        client.session.get(client.url("/events/stream?after=0")) as response,
    ):
        for _ in range(12):
            await asyncio.gather(*(client.webhook(f"KOM{number}", more=body) for number in range(40)))
        await until_async(lambda: takes_another_reader(client))
        with pytest.raises((aiohttp.ClientError, EOFError)):
            await StreamReader(response).positions(1_000)


async def test_a_silent_stream_has_heartbeats(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent stream sends heartbeats, so that proxies and readers keep the connection."""
    monkeypatch.setattr("service.api.events.HEARTBEAT_SECONDS", 0.1)
    async with client.reading("/events/stream") as reader:
        received = await asyncio.wait_for(reader.response.content.readuntil(b": heartbeat"), PATIENCE_SECONDS)
    assert b"retry: 2000" in received


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9999999999999999999", "9" * 5_000, ""])
async def test_an_invalid_last_event_id_is_refused(client: Client, given: str) -> None:
    """An invalid Last-Event-ID gets 400 with a problem that names it."""
    problem = await client.get("/events/stream", 400, {"Last-Event-ID": given})
    assert problem["parameter"] == "Last-Event-ID"


async def test_only_so_many_live_readers(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader above the limit gets 429, until another reader leaves."""
    monkeypatch.setattr("service.http.budgets.STREAMS_MAX", 1)
    async with serving_client(dsn) as client:
        async with client.reading("/events/stream"):
            await client.get("/events/stream", 429)
        await until_async(lambda: takes_another_reader(client))


async def takes_another_reader(client: Client) -> bool:
    return await client.status("GET", "/events/stream") == 200


def is_logged(lines: list[Any], event: str) -> bool:
    return event in [line["event"] for line in lines]


async def test_the_whole_log_in_one_answer(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """NDJSON has every event up to the head, one a line, equal to the events of the pages."""
    monkeypatch.setattr("service.http.streaming.BATCH_EVENTS_MAX", 7)
    await report_many(client, 30)
    url = client.url("/events.ndjson?after=2")
    async with client.session.get(url) as response:
        assert response.headers["Content-Type"] == NDJSON
        lines = (await response.text()).splitlines()
    assert [json.loads(line) for line in lines] == (await client.get("/events?after=2"))["events"]


async def test_half_an_answer_is_cut_off(dsn: str) -> None:
    """A response that is cut off has no proper end, and nothing follows it on the connection."""
    async with serving_client(dsn, limits=Limits(stall_seconds_max=0.3, sweep_seconds=0.1)) as client:
        for _ in range(8):
            await asyncio.gather(*(client.webhook(f"KOM{number}", more="x" * 60_000) for number in range(40)))
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=2**16)
        writer.write(b"GET /events.ndjson HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await writer.drain()
        own_port = writer.get_extra_info("sockname")[1]

        def is_cut_off() -> bool:
            connections = psutil.Process().net_connections("tcp4")
            ports = {(one.laddr.port, one.raddr.port) for one in connections if one.status == "ESTABLISHED"}
            return (client.port, own_port) not in ports

        await until_async(condition(is_cut_off))
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(reader.read(2**20), PATIENCE_SECONDS):
                received += part
        writer.close()
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert received.count(b"HTTP/1.1") == 1
    assert not received.endswith(b"0\r\n\r\n")


async def test_half_an_answer_that_fails_is_logged(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that fails after its 200 status is logged, because its status does not show the failure."""
    monkeypatch.setattr("service.http.streaming.BATCH_EVENTS_MAX", 10)
    for _ in range(8):
        await asyncio.gather(*(client.webhook(f"KOM{number}", more="x" * 60_000) for number in range(40)))
    url = client.url("/events.ndjson")
    with structlog.testing.capture_logs() as logged:
        async with client.session.get(url) as response:
            assert response.status == 200
            await connection.execute("ALTER TABLE order_events RENAME TO moved_away")
            with pytest.raises(aiohttp.ClientError):
                await response.read()
        await connection.execute("ALTER TABLE moved_away RENAME TO order_events")
    assert ("response cut off", "/events.ndjson") in [(line["event"], line.get("route")) for line in logged]


@pytest.mark.parametrize("path", ["/events.ndjson", "/events/stream"])
async def test_a_client_without_chunked_encoding_gets_no_endless_response(
    client: Client, connection: Connection, path: str
) -> None:
    """A client without chunked encoding gets 505, because it could not distinguish a cut response from a whole
    one.
    """
    key = await create_key(connection, "one", "read", None)
    request = f"GET {path} HTTP/1.0\r\nAuthorization: Bearer {key}\r\n\r\n"
    assert (await client.talk(request.encode())).split(b" ", 2)[1] == b"505"


@pytest.mark.parametrize("path", ["/events.ndjson", "/events/stream"])
async def test_an_answer_without_an_end_has_the_callers_id_too(client: Client, path: str) -> None:
    """Endless responses also return the caller's request id."""
    url = client.url(path)
    async with client.session.get(url, headers={"X-Request-Id": "ours-1"}) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (200, "ours-1")


async def test_erased_bodies_are_not_sent_from_memory(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Erased bodies disappear from the readers' shared memory after a short time."""
    monkeypatch.setattr("service.event_log.tail.MEMORY_SECONDS_MAX", 0.2)
    async with client.reading("/events/stream") as stays:
        await client.webhook("KOM1", more="a name")
        assert "a name" in (await stays.message())["data"]
        await connection.execute("SET ROLE order_tracking_owner; CALL erase_order('KOM1', 'asked for')")

        async def is_forgotten() -> bool:
            async with client.reading("/events/stream?after=0") as late:
                return "a name" not in (await late.message())["data"]

        await until_async(is_forgotten)
        await client.webhook("KOM2")
        assert json.loads((await stays.message())["data"])["order_no"] == "KOM2"


async def test_live_readers_outlive_any_trouble_of_the_database(client: Client, connection: Connection) -> None:
    """A stream continues after a failure of the database, such as a table that was moved for a moment."""
    async with client.reading("/events/stream") as reader:
        with structlog.testing.capture_logs() as logged:
            await connection.execute("ALTER TABLE order_events RENAME TO moved_away")
            trouble = "background task failed and is restarted"
            await until_async(condition(lambda: is_logged(logged, trouble)))
        await connection.execute("ALTER TABLE moved_away RENAME TO order_events")
        position = (await client.webhook("KOM1"))["position"]
        assert await reader.positions(1) == [position]


async def test_a_stream_ends_with_its_key(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running stream ends when its key is revoked."""
    monkeypatch.setattr("service.api.events.KEY_SECONDS", 0.2)
    key = await create_key(connection, "one", "read", None)

    async def asks_for_keys() -> bool:
        return await client.status("GET", "/orders") == 401

    # The service checks for new keys once a second.
    await until_async(asks_for_keys)
    async with client.reading("/events/stream", Authorization=f"Bearer {key}") as reader:
        await client.webhook("KOM1")
        await reader.message()
        await revoke_key(connection, "one")
        with pytest.raises((EOFError, aiohttp.ClientError)):
            await asyncio.wait_for(endless(client, reader), PATIENCE_SECONDS)


async def endless(client: Client, reader: StreamReader) -> None:
    while True:
        await client.webhook("KOM1")
        await reader.message()


async def test_lists_as_csv(client: Client) -> None:
    """Lists are available as CSV, with nested members as columns and a link to the next page."""
    for number in range(3):
        await client.webhook(f"KOM{number}", "Diajukan", "AWB,1")
    last = await client.webhook("KOM2", "Dikirim")
    await client.get(f"/orders?after_position={last['position']}")
    await client.get(f"/audit/transitions?after_position={last['position']}")
    rows, headers = await table(client, "/orders.csv?limit=2")
    assert [row["order_no"] for row in rows] == ["KOM2", "KOM1"]
    assert (rows[0]["status_label.id"], rows[0]["counts.advanced"], rows[0]["settled"]) == (
        "Dikirim",
        "2",
        "false",
    )
    assert rows[1]["cnote"] == "AWB,1"
    following = headers["Link"].partition(">")[0].strip("<")
    rows, _ = await table(client, following)
    assert [row["order_no"] for row in rows] == ["KOM0"]
    rows, _ = await table(client, "/orders/KOM2/timeline.csv")
    assert [(row["version"], row["skipped"]) for row in rows] == [("1", ""), ("2", "packed picked_up")]
    assert [row["recognised"] for row in rows] == ["submitted", "in_transit"]
    rows, _ = await table(client, "/audit/transitions.csv?order_no=KOM2")
    assert [(row["from"], row["to"]) for row in rows] == [("", "submitted"), ("submitted", "in_transit")]
    # The path without a suffix has the format that a request prefers.
    for path in (
        "/orders?format=csv&limit=2",
        "/orders/KOM2/timeline?format=csv",
        "/audit/transitions?format=csv",
    ):
        rows, headers = await table(client, path)
        assert len(rows) > 1
        assert headers["Vary"] == "Accept"
        assert "Link" not in headers or headers["Link"].startswith("</orders.csv?limit=2&cursor=")
    rows, _ = await table(client, "/orders", {"Accept": "text/csv"})
    assert len(rows) == 3
    for accept in ("application/json", "text/csv, application/json;q=0.5", "*/*"):
        assert len((await client.get("/orders", 200, {"Accept": accept}))["orders"]) == 3
    assert len((await client.get("/orders?format=json", 200, {"Accept": "text/csv"}))["orders"]) == 3
    problem = await client.get("/orders?format=xml", 400)
    assert problem["detail"] == "format: it must be json or csv"
    await client.get("/quarantine?format=csv", 400)
    async with client.session.get(
        client.url("/events"), headers={"Accept": "application/x-ndjson"}
    ) as response:
        assert response.headers["Content-Type"] == "application/x-ndjson"
        assert len((await response.text()).splitlines()) == 4
    await client.get("/orders/KOM3/timeline.csv", 404)


async def table(client: Client, path: str, headers: dict[str, str] | None = None) -> tuple[list[Any], Any]:
    async with client.session.get(client.url(path), headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
        text = (await response.read()).decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text))), response.headers


# A spreadsheet may drop the spaces, or run a program after the bar.
LATE_FORMULAS = [" =1+1", "\u00a0=1", "\u3000 @SUM(1)", "|calc", " |calc", "\uff5ccalc"]


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\uff1d1", '=HYPERLINK("http://x")', *LATE_FORMULAS]
)
async def test_no_cell_is_a_formula(client: Client, text: str) -> None:
    """A cell that a spreadsheet would compute gets an apostrophe in front."""
    await client.raw(json.dumps({"order_no": "".join(text.split()), "status": text, "cnote": "-2"}).encode())
    rows, _ = await table(client, "/audit/transitions.csv?after_position=1")
    assert rows[0]["reported_status"] == f"'{text}"


async def test_statistics(client: Client) -> None:
    """The statistics count orders by status, moves with durations, reports by day, and unrecognised
    statuses.
    """
    for order_no, statuses in {
        "A": ("Diajukan", "Dikirim", "Diterima", "Dikirim"),
        "B": ("Diajukan", "Dikirim", "Dikirim"),
        "C": ("Antar Ulang", "Antar Ulang"),
        "D": ("Diajukan",),
    }.items():
        for status in statuses:
            last = await client.webhook(order_no, status)
    counted = await client.get(f"/statistics?after_position={last['position']}")
    assert counted["position"] >= last["position"]
    assert [(one["status"], one["orders"]) for one in counted["statuses"]] == [
        (None, 1), ("submitted", 1), ("in_transit", 1), ("delivered", 1),
    ]  # fmt: skip
    moves = {(move["from"], move["to"]): move["times"] for move in counted["moves"]}
    assert moves == {("submitted", "in_transit"): 2, ("in_transit", "delivered"): 1}
    assert all(0 < move["seconds_p50"] <= move["seconds_p99"] for move in counted["moves"])
    (day,) = counted["days"]
    assert day["reports"] == {"advanced": 6, "repeated": 1, "late": 1, "refused": 0, "unrecognised": 2}
    assert [(one["reported_status"], one["reports"]) for one in counted["unrecognised"]] == [("Antar Ulang", 2)]
    assert (await client.get("/statistics?days=1"))["days"] == counted["days"]
    await client.get("/statistics?days=0", 400)


async def test_orders_by_every_filter(client: Client, connection: Connection) -> None:
    """The filters by verdict, last report and time without a move work alone and together."""
    await client.webhook("OLD", "Dikirim")
    await client.webhook("SETTLED", "Diterima")
    await client.webhook("ODD", "Antar Ulang")
    last = await client.webhook("SETTLED", "Diajukan")
    await client.get(f"/orders?after_position={last['position']}")
    await connection.execute("""
        UPDATE current_status.orders SET last_reported_at = now() - interval '4 days'
        WHERE order_no IN ('OLD', 'SETTLED')
    """)

    async def found(query: str) -> list[str]:
        return [order["order_no"] for order in (await client.get(f"/orders?{query}"))["orders"]]

    yesterday = await connection.fetchval(
        "SELECT to_char(now() - interval '1 day', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')"
    )
    assert await found("unmoved_for=P3D") == ["OLD"]
    assert await found("unmoved_for=P5D") == []
    assert await found("unmoved_for=PT0S") == ["ODD", "OLD"]
    assert await found("verdict=refused") == []
    assert await found(f"updated_after={yesterday}") == ["ODD"]
    assert await found(f"updated_before={yesterday}") == ["SETTLED", "OLD"]
    assert await found(f"updated_before={yesterday}&status=delivered") == ["SETTLED"]
    for bad in ("verdict=late", "unmoved_for=3", "updated_after=yesterday"):
        await client.get(f"/orders?{bad}", 400)


async def test_the_last_cursor_of_the_audit_is_an_empty_page(client: Client) -> None:
    """A cursor at the highest position is valid, for each walk of the audit."""
    await client.webhook("KOM1")
    cursor = encode_cursor(POSITION_MAX)
    for query in ("", "&order_no=KOM1", "&verdict=advanced", "&since=2026-01-01T00:00:00Z"):
        page = await client.get(f"/audit/transitions?cursor={cursor}{query}")
        assert (page["transitions"], page["next"]) == ([], None)


async def test_the_audit_shows_reports_that_this_release_does_not_know(
    client: Client, connection: Connection
) -> None:
    """A report with a status of a later release is found by its verdict."""
    receipt = await client.webhook("KOM1", "Dikirim")
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        "SELECT 'KOM2', 1, topic, convert_to(replace(convert_from(state, 'UTF8'), 'in_transit', 'teleported'), "
        "'UTF8') FROM order_events"
    )
    path = f"/audit/transitions?verdict=advanced&after_position={receipt['position'] + 1}"
    assert [row["order_no"] for row in (await client.get(path))["transitions"]] == ["KOM1", "KOM2"]


async def test_a_search_finds_an_airway_bill_of_many_orders(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If more orders have an airway bill than a page walks, some of them are shown."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", 3)
    monkeypatch.setattr("service.features.pages.orders.ROWS_SHOWN_MAX", 2)
    for number in range(5):
        receipt = await client.webhook(f"KOM{number}", cnote="SAME")
    for number in range(5):
        receipt = await client.webhook(f"OTHER{number}", cnote="OTHER")
    shown = await client.text(f"/track?q=SAME&after_position={receipt['position']}")
    assert "KOM1" in shown
