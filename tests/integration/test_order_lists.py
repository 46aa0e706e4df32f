"""The list of orders over HTTP: its search, its filters, its two orders, and the whole list as CSV."""

import csv
import io
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from projections.order_list import LAST_PLACE, ListPlace, orders_page, place_at, prefix_end
from projections.postgres import Connection
from service.database import api_keys
from service.http.pagination import encode_cursor
from tests.support.client import Client
from tests.support.properties import MANY
from tests.support.reports import NOW


async def sent(client: Client, *reports: tuple[str, str, str]) -> None:
    """Send reports with an order number, a status and an airway bill, and wait until the list has them."""
    for report in reports:
        receipt = await client.webhook(*report)
    await client.get(f"/orders?limit=1&after_position={receipt['position']}")


async def found(client: Client, query: str) -> list[str]:
    """Return the numbers of the orders that a list has, page by page."""
    return [order["order_no"] for order in await client.walk(f"/orders?{query}", "orders")]


async def whole_csv(client: Client, query: str = "", **headers: str) -> list[dict[str, str]]:
    """Return the rows of the list that is sent whole as CSV."""
    async with client.session.get(client.url(f"/orders.csv?{query}"), headers=headers) as response:
        assert response.status == 200
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.headers["Content-Disposition"] == 'attachment; filename="orders.csv"'
        return list(csv.DictReader(io.StringIO((await response.read()).decode("utf-8-sig"))))


# The search


async def test_a_search_finds_the_beginning_of_a_number_or_of_any_airway_bill(client: Client) -> None:
    """A search is exact in every character, and also finds an airway bill that the order no longer has."""
    await sent(
        client,
        ("KOM1", "Dikirim", "AWB-1"),
        ("KOM10", "Dikirim", "AWB-2"),
        ("kom2", "Dikirim", "JX1"),
        ("K%_", "Dikirim", "J\\X"),
        ("KOM1", "Diterima", "JX9"),
    )
    assert await found(client, "search=KOM1") == ["KOM10", "KOM1"]
    assert await found(client, "search=KOM10") == ["KOM10"]
    assert await found(client, "search=OM1") == []
    assert await found(client, "search=kom") == ["kom2"]
    assert await found(client, "search=AWB-") == ["KOM10", "KOM1"]
    assert await found(client, "search=AWB-1") == ["KOM1"]
    assert await found(client, "search=JX") == ["kom2", "KOM1"]
    assert await found(client, "search=K%25") == ["K%_"]
    assert await found(client, "search=_") == []
    assert await found(client, "search=J%5C") == ["K%_"]
    assert await found(client, "search=KOM&settled=true&sort=updated") == ["KOM1"]
    for bad in ("search=", "search=" + "x" * 129, "search=%00"):
        assert (await client.get(f"/orders?{bad}", 400))["parameter"] == "search"


async def test_a_search_that_many_orders_match_is_whole_too(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If more orders match than a page walks, the pages still have all of them, in both orders of the list."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", 4)
    await sent(client, *((f"KOM{number}", "Dikirim", f"AWB{number}") for number in range(20)))
    expected = ["KOM1", *(f"KOM{number}" for number in range(10, 20))]
    for query in ("search=KOM1", "search=AWB1"):
        assert sorted(await found(client, f"{query}&limit=3")) == expected
        assert sorted(await found(client, f"{query}&limit=3&sort=updated")) == expected


@MANY
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=4),
    st.text(st.characters(codec="utf-8"), max_size=4),
)
def test_the_end_of_a_prefix_is_above_all_texts_with_it(prefix: str, text: str) -> None:
    """A text is between a prefix and its end, in the order of code points, exactly if it begins with it."""
    end = prefix_end(prefix)
    for other in (text, prefix + text, prefix[:-1] + text):
        is_between = other >= prefix and (end is None or other < end)
        assert is_between == other.startswith(prefix), (other, end)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [("a", "b"), ("KOM9", "KOM:"), ("\ud7ff", "\ue000"), ("a\U0010ffff", "b"), ("\U0010ffff" * 2, None)],
)
def test_the_end_of_a_prefix(prefix: str, end: str | None) -> None:
    """The last character is followed by the next one that UTF-8 can have, if there is one."""
    assert prefix_end(prefix) == end


async def test_the_page_walks_on_while_it_is_not_full(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the newest orders do not match, the page has older ones; if it ends early, it says so and leads on."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", 4)
    await sent(client, *((f"OLD{number}", "Dikirim", "A") for number in range(6)))
    await sent(client, *((f"NEW{number:02}", "Dikirim", "A") for number in range(30)))
    shown = await client.text("/track?search=OLD&lang=en")
    assert "OLD" not in shown.partition("<table")[2]
    assert "Only some of the orders have been searched so far." in shown
    assert 'rel="next"' in shown
    monkeypatch.setattr("service.features.pages.orders.WALKS_MAX", 10)
    shown = await client.text("/track?search=OLD&lang=en")
    assert shown.count("cell-order") == 6
    assert "Only some" not in shown


# The filters


async def test_orders_by_several_statuses_and_by_whether_they_are_settled(client: Client) -> None:
    """A list of statuses, and settled or not, alone and together; an order without a status is not settled."""
    await sent(
        client,
        ("SENT", "Dikirim", "A"),
        ("LOST", "Hilang", "A"),
        ("DONE", "Diterima", "A"),
        ("ODD", "Antar Ulang", "A"),
    )
    for sort in ("first", "updated"):
        assert await found(client, f"sort={sort}&status=lost,in_transit") == ["LOST", "SENT"]
        assert await found(client, f"sort={sort}&status=lost,lost") == ["LOST"]
        assert await found(client, f"sort={sort}&settled=false") == ["ODD", "SENT"]
        assert await found(client, f"sort={sort}&settled=true&limit=1") == ["DONE", "LOST"]
        assert await found(client, f"sort={sort}&settled=false&status=lost,in_transit") == ["SENT"]
        assert await found(client, f"sort={sort}&settled=false&status=lost") == []
        assert await found(client, f"sort={sort}&settled=true&unmoved_for=PT0S") == []
        assert await found(client, f"sort={sort}&unmoved_for=PT0S&status=in_transit,delivered") == ["SENT"]
    for bad in ("status=", "status=lost,", "status=lost,teleported", "status=lost%20,problem"):
        assert (await client.get(f"/orders?{bad}", 400))["parameter"] == "status"
    assert (await client.get("/orders?settled=maybe", 400))["parameter"] == "settled"


async def test_an_unsettled_order_may_have_a_status_of_a_newer_release(
    client: Client, connection: Connection
) -> None:
    """A status that this release lacks is not settled."""
    await sent(client, ("KOM1", "Dikirim", "A"), ("KOM2", "Diterima", "A"))
    await connection.execute("UPDATE current_status.orders SET status = 'teleported' WHERE order_no = 'KOM1'")
    assert await found(client, "settled=false") == ["KOM1"]


async def test_the_list_by_first_report_finds_few_orders_at_once(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter that only old orders match leads to them in one page: the list by last report has an index."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", 6)
    await sent(
        client,
        ("LOST", "Hilang", "A"),
        ("ODD", "Diterima", "A"),
        ("ODD", "Dibatalkan", "A"),
        *((f"KOM{number:02}", "Diajukan", "A") for number in range(30)),
    )
    for query, expected in (("status=lost", "LOST"), ("verdict=refused", "ODD")):
        page = await client.get(f"/orders?{query}&limit=2")
        assert [order["order_no"] for order in page["orders"]] == [expected]
        assert page["next"] is None
        assert await found(client, f"{query}&sort=updated") == [expected]
    assert await found(client, "status=submitted&limit=7") == [
        f"KOM{number:02}" for number in reversed(range(30))
    ]


async def test_a_filter_that_this_release_removed_is_refused(client: Client) -> None:
    """A list must not ignore a filter: it would select other orders than its caller expects."""
    for parameter in ("first_reported_after", "first_reported_before"):
        problem = await client.get(f"/orders?{parameter}=2026-01-01T00:00:00Z", 400)
        assert problem["parameter"] == parameter
    for verdict in ("advanced", "repeated", "late", "unrecognised"):
        assert (await client.get(f"/orders?verdict={verdict}", 400))["parameter"] == "verdict"


# The newest change first


async def test_the_list_by_last_report(client: Client) -> None:
    """The order that changed last comes first, and an order that changes again moves to the front."""
    await sent(client, *((f"KOM{number}", "Diajukan", "A") for number in range(5)), ("KOM1", "Dikirim", "A"))
    newest = ["KOM1", "KOM4", "KOM3", "KOM2", "KOM0"]
    assert await found(client, "sort=updated&limit=2") == newest
    assert await found(client, "limit=2") == ["KOM4", "KOM3", "KOM2", "KOM1", "KOM0"]
    page = await client.get("/orders?sort=updated&limit=2")
    assert [order["order_no"] for order in page["orders"]] == newest[:2]
    await sent(client, ("KOM4", "Dikirim", "A"), ("KOM0", "Dikirim", "A"))
    following = await client.walk(page["next"], "orders")
    assert [order["order_no"] for order in following] == ["KOM3", "KOM2"]
    assert await found(client, "sort=updated") == ["KOM0", "KOM4", "KOM1", "KOM3", "KOM2"]


async def test_reports_of_the_same_time_are_paged_by_position(client: Client, connection: Connection) -> None:
    """If all orders were last reported at the same time, pages by last report neither repeat nor lose one."""
    await sent(client, *((f"KOM{number}", "Diajukan", "A") for number in range(7)))
    await connection.execute("UPDATE current_status.orders SET last_reported_at = $1", NOW)
    assert await found(client, "sort=updated&limit=2") == [f"KOM{number}" for number in reversed(range(7))]


async def test_a_cursor_belongs_to_one_order_of_the_list(client: Client) -> None:
    """A cursor of the other order gets 400, and a cursor beyond every time is valid."""
    await sent(client, *((f"KOM{number}", "Diajukan", "A") for number in range(3)))
    first, updated = encode_cursor(2), encode_cursor(ListPlace(1_000, 2))
    assert (await client.get(f"/orders?cursor={updated}", 400))["parameter"] == "cursor"
    assert (await client.get(f"/orders?sort=updated&cursor={first}", 400))["parameter"] == "cursor"
    assert (await client.get("/orders?sort=updated&cursor=MS4yLjM", 400))["parameter"] == "cursor"
    assert (await client.get("/audit/transitions?cursor=" + updated, 400))["parameter"] == "cursor"
    late = encode_cursor(ListPlace(9 * 10**18, 1))
    assert len((await client.get(f"/orders?sort=updated&cursor={late}"))["orders"]) == 3


def test_a_place_has_the_exact_time() -> None:
    """A time is converted to microseconds and back without loss."""
    for time in (NOW, NOW + timedelta(microseconds=1), LAST_PLACE.time):
        assert place_at(time).time == time


# The whole list as CSV


async def test_csv_without_a_limit_is_the_whole_list(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every order is there once, whatever the batches; a limit selects a page, and a filter its orders."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", 7)
    reports = [(f"KOM{number:02}", ("Dikirim", "Diterima")[number % 2], f"AWB{number}") for number in range(60)]
    await sent(client, *reports)
    numbers = [order_no for order_no, _, _ in reversed(reports)]
    assert [row["order_no"] for row in await whole_csv(client)] == numbers
    assert [row["order_no"] for row in await whole_csv(client, "sort=updated")] == numbers
    rows = await whole_csv(client, "status=delivered&search=KOM")
    assert [row["order_no"] for row in rows] == numbers[::2]
    assert rows[0]["delivered_at"] == rows[0]["status_since"] != ""
    assert (rows[0]["shipped_at"], rows[0]["delivery_attempts"]) == ("", "0")
    assert await whole_csv(client, "search=nothing") == []
    following = (await client.get("/orders?limit=5"))["next"].partition("cursor=")[2]
    assert [row["order_no"] for row in await whole_csv(client, f"cursor={following}")] == numbers[5:]
    async with client.session.get(client.url("/orders.csv?limit=5")) as response:
        assert "Content-Length" in response.headers
        assert 'rel="next"' in response.headers["Link"]
        assert (await response.text()).count("\r\n") == 6


async def test_the_whole_list_as_csv_requires_chunks(client: Client, connection: Connection) -> None:
    """HTTP/1.0 has no chunks, so it gets 505, but a page as CSV; HEAD returns headers only."""
    bearer = f"Authorization: Bearer {await api_keys.create_key(connection, 'one', 'read', None)}"
    await client.webhook("KOM1")
    for start, status in (
        ("GET /orders.csv HTTP/1.0", b" 505 "),
        ("GET /orders.csv?limit=5 HTTP/1.0", b" 200 "),
        ("HEAD /orders.csv HTTP/1.1", b" 200 "),
    ):
        response = await client.talk(f"{start}\r\nHost: localhost\r\n{bearer}\r\n\r\n".encode())
        assert status in response.partition(b"\r\n")[0]


async def test_a_csv_that_fails_halfway_has_no_end(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a later part of the list cannot be read, the response breaks off, so that the client notices."""
    await sent(client, *((f"KOM{number}", "Dikirim", "A") for number in range(30)))
    pages: list[Any] = []

    async def fail_later(*arguments: Any) -> Any:
        pages.append(arguments)
        if len(pages) > 1:
            raise RuntimeError("the database is gone")
        return await orders_page(*arguments)

    monkeypatch.setattr("service.api.orders.orders_page", fail_later)
    async with client.session.get(client.url("/orders.csv")) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert len(pages) == 2
