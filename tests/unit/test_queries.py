"""The parameters of a read are checked before any look-up, and a problem names the invalid one."""

import re
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from projections.windows import POSITION_MAX
from service.api.audit import TransitionsQuery
from service.api.events import AllEventsQuery, EventsQuery
from service.api.orders import OrderEventsQuery, OrderQuery, OrdersQuery
from service.http.pagination import CURSOR_PATTERN, Page, encode_cursor
from service.http.parameters import (
    PAGE_ROWS_DEFAULT,
    PAGE_ROWS_MAX,
    PageQuery,
    Query,
    ViewQuery,
    order_path,
    parse_order_no,
    read_query,
)
from service.http.problems import ProblemError
from tests.support.properties import MANY

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def get(path: str) -> web.Request:
    return make_mocked_request("GET", path)


async def _handle(_request: web.Request) -> web.Response:
    raise NotImplementedError


def routed(path: str, pattern: str) -> web.Request:
    """Return a request that a route with this pattern has matched."""
    request = get(path)
    route = web.UrlDispatcher().add_route("GET", pattern, _handle)
    request._match_info = web.UrlMappingMatchInfo({}, route)  # noqa: SLF001 - as the application sets it
    return request


def refused(model: type[Query], query: str) -> ProblemError:
    """Return the problem that a query string causes."""
    with pytest.raises(ProblemError) as raised:
        read_query(model, get(f"/x?{query}"))
    assert raised.value.status == 400
    return raised.value


# Cursors


@MANY
@given(st.integers(0, POSITION_MAX))
def test_a_cursor_is_decoded_to_its_position(key: int) -> None:
    """Every position survives the way through a link's cursor, which needs no escaping or padding."""
    cursor = encode_cursor(key)
    assert quote(cursor, safe="") == cursor
    assert read_query(PageQuery, get(f"/x?cursor={cursor}")).cursor == key


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "!!!!",
        "%00",
        "%F0%9F%98%80",
        "A" * 5_000,
        encode_cursor(-1),
        encode_cursor(POSITION_MAX + 1),
        encode_cursor(10**30),
        *(
            urlsafe_b64encode(text.encode()).decode().rstrip("=")
            for text in ("", "x", "1.5", "0x10", "\u0661", "\x00", "9" * 5_000)
        ),
    ],
)
def test_an_invalid_cursor_is_refused(cursor: str) -> None:
    """An invalid cursor is a bad parameter, and never selects another page."""
    assert refused(PageQuery, f"cursor={cursor}").members == {"parameter": "cursor"}


@pytest.mark.parametrize(
    "cursor",
    ["MT!A", "%20MTA", "MTA%0A", "M.T.A", "MTA=", "MTA=x", "IDEw", "KzEw", "MV8w", "MDEw"],
)
def test_another_spelling_of_a_cursor(cursor: str) -> None:
    """Each cursor has exactly one valid spelling, and other spellings of the same position are refused."""
    assert refused(PageQuery, f"cursor={cursor}").members == {"parameter": "cursor"}


# Pages


def test_the_next_page_keeps_the_query_and_moves_the_cursor() -> None:
    """The link to the next page keeps the filters, moves the cursor and leaves out after_position."""
    query = read_query(
        TransitionsQuery,
        get(
            "/audit/transitions?from=problem&to=lost&verdict=advanced&since=2026-01-31T19:00:00%2B07:00"
            "&order_no=a%26b%20%2F%C3%96&limit=7&cursor=MTA&after_position=5"
        ),
    )
    url = urlsplit(Page([], {"cursor": encode_cursor(17)}).next_path("/audit/transitions", query) or "")
    assert url.path == "/audit/transitions"
    assert parse_qs(url.query, strict_parsing=True) == {
        "from": ["problem"],
        "to": ["lost"],
        "verdict": ["advanced"],
        "since": ["2026-01-31T12:00:00Z"],
        "order_no": ["a&b /Ö"],
        "limit": ["7"],
        "cursor": [encode_cursor(17)],
    }


def test_the_next_page_is_read_as_the_same_query() -> None:
    """read_query reads the link of next_path as the same query with the new cursor."""
    query = read_query(TransitionsQuery, get("/x?from=problem&since=2026-01-31T12:00:00.000001Z&limit=7"))
    followed = read_query(
        TransitionsQuery, get(Page([], {"cursor": encode_cursor(17)}).next_path("/x", query) or "")
    )
    assert followed == query.model_copy(update={"cursor": 17})


def test_the_next_page_of_events_moves_after() -> None:
    """Lists of events are paged by the plain parameter ``after``, and the link leaves out default values."""
    query = read_query(EventsQuery, get("/events?after=3"))
    assert Page([], {"after": 103}).next_path("/events", query) == "/events?after=103"


@pytest.mark.parametrize("key", [0, 9, 10, 123, 4_567, POSITION_MAX])
def test_every_cursor_matches_its_documented_pattern(key: int) -> None:
    """The pattern in the contract accepts every cursor that a response has."""
    assert re.fullmatch(CURSOR_PATTERN, encode_cursor(key))


@MANY
@given(st.text(min_size=1, max_size=20).filter(lambda text: "\x00" not in text))
def test_the_order_path_an_order_leads_back_to_it(order_no: str) -> None:
    """Any order number becomes one segment of a path, and is read back from it unchanged."""
    path = order_path(order_no, "timeline")
    assert path.count("/") == 3
    try:
        assert parse_order_no(routed(path, "/orders/{order_no}/timeline")) == order_no
    except ProblemError:
        assert any(ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0 for character in order_no)


# Times


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-31T12:00:00Z", NOON),
        ("2026-01-31T19:00:00%2B07:00", NOON),
        ("2026-01-31T19:00:00+07:00", NOON),
        ("2026-01-31T07:00:00-05:00", NOON),
        ("2026-01-31T12:00:00.000001Z", NOON.replace(microsecond=1)),
        ("2026-01-31%2012:00:00Z", NOON),
    ],
)
def test_times(text: str, time: datetime) -> None:
    """A time is RFC 3339 with any offset, even with an unescaped plus sign, and is converted to UTC."""
    as_of = read_query(OrderQuery, get(f"/x?as_of={text}")).as_of
    assert as_of == time
    assert as_of is not None
    assert as_of.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "yesterday",
        "1769848198",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-02-30T12:00:00Z",
        "2026-01-31T25:00:00Z",
        "2026-01-31T12:00:00%2B99:00",
        "0001-01-01T00:00:00%2B07:00",
        "9999-12-31T23:59:59-07:00",
        "%F0%9F%98%80",
        "T",
        "2026-01-31T12:00:00ZT",
    ],
)
def test_an_invalid_time_is_refused(text: str) -> None:
    """A time without an offset, with an invalid date or out of range is refused, and the problem names the
    parameter.
    """
    for model, name in ((OrderQuery, "as_of"), (TransitionsQuery, "since"), (TransitionsQuery, "until")):
        assert refused(model, f"{name}={text}").members == {"parameter": name}


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("P3D", timedelta(days=3)),
        ("PT36H", timedelta(hours=36)),
        ("P1W", timedelta(weeks=1)),
        ("P1DT2H3M4S", timedelta(days=1, hours=2, minutes=3, seconds=4)),
        ("PT0S", timedelta(0)),
    ],
)
def test_a_duration(text: str, duration: timedelta) -> None:
    """A duration follows ISO 8601 with units of fixed length."""
    assert read_query(OrdersQuery, get(f"/orders?unmoved_for={text}")).unmoved_for == duration
    query = OrdersQuery.model_validate({"unmoved_for": text})
    again = read_query(OrdersQuery, get(Page([], {"cursor": "MQ"}).next_path("/orders", query) or ""))
    assert again.unmoved_for == duration


@pytest.mark.parametrize(
    "text",
    ["P", "PT", "3D", "P3", "P1M", "P1Y", "-P3D", "P-3D", "P3.5D", "P3DT", "p3d", "P٣D", "P99999W", "P36501D"],
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    """Months and years, which have no fixed length, and malformed durations are refused."""
    query = f"unmoved_for={quote(text)}"
    assert refused(OrdersQuery, query).members == {"parameter": "unmoved_for"}


def test_a_time_with_a_tail_is_refused() -> None:
    """A text with a valid time at its beginning and other characters behind it is refused."""
    assert refused(OrderQuery, "as_of=2026-01-31T12:00:00Z%00junk").members == {"parameter": "as_of"}


# Limits and filters


def test_a_query_without_parameters_has_the_defaults() -> None:
    """A query without parameters has the defaults: the first page, unfiltered."""
    assert read_query(OrdersQuery, get("/orders")).model_dump() == {
        "after_position": None,
        "cursor": None,
        "limit": PAGE_ROWS_DEFAULT,
        "sort": "first",
        "status": None,
        "settled": None,
        "search": None,
        "cnote": None,
        "verdict": None,
        "updated_after": None,
        "updated_before": None,
        "unmoved_for": None,
    }
    assert read_query(EventsQuery, get("/events")).after == 0
    assert read_query(OrderEventsQuery, get("/orders/KOM1/events")).after_version == 0


@pytest.mark.parametrize("limit", [1, 100, PAGE_ROWS_MAX])
def test_a_limit_within_bounds(limit: int) -> None:
    """Limits from 1 to PAGE_ROWS_MAX are accepted."""
    assert read_query(PageQuery, get(f"/x?limit={limit}")).limit == limit


@pytest.mark.parametrize(
    ("model", "query", "parameter"),
    [
        *(
            (PageQuery, f"limit={limit}", "limit")
            for limit in (0, -1, PAGE_ROWS_MAX + 1, 10**9, 10**30, "x", "", 1.5)
        ),
        *((EventsQuery, f"limit={limit}", "limit") for limit in (0, PAGE_ROWS_MAX + 1)),
        *((EventsQuery, f"after={after}", "after") for after in (-1, POSITION_MAX + 1, "x", "")),
        *((AllEventsQuery, f"limit={limit}", "limit") for limit in (0, POSITION_MAX + 1)),
        (OrderEventsQuery, "after_version=-1", "after_version"),
        (OrderEventsQuery, "after=1", "after"),
        *((OrderQuery, f"version={version}", "version") for version in (0, -1, POSITION_MAX + 1, "x", "")),
        *((Query, f"after_position={position}", "after_position") for position in (-1, 2**63, "x", "")),
        (OrdersQuery, "status=teleported", "status"),
        (OrdersQuery, "status=Sent", "status"),
        (OrdersQuery, "cnote=", "cnote"),
        (OrdersQuery, "cnote=" + "x" * 129, "cnote"),
        (OrdersQuery, "cnote=a%00b", "cnote"),
        (OrdersQuery, "cnote=a%0Ab", "cnote"),
        (TransitionsQuery, "verdict=maybe", "verdict"),
        (TransitionsQuery, "from=teleported", "from"),
        (TransitionsQuery, "from_=problem", "from_"),
        (TransitionsQuery, "to=", "to"),
        (TransitionsQuery, "order_no=", "order_no"),
        (OrdersQuery, "stauts=lost", "stauts"),
        (Query, "limit=1", "limit"),
        (OrdersQuery, "limit=1&limit=2", "limit"),
        (OrdersQuery, "limit=1&limit=1", "limit"),
    ],
)
def test_a_parameter_that_cannot_be_used(model: type[Query], query: str, parameter: str) -> None:
    """The problem names a parameter that is out of range, malformed, unknown or repeated."""
    problem = refused(model, query)
    assert problem.members == {"parameter": parameter}
    assert problem.detail is not None
    assert problem.detail.startswith(f"{parameter}: ")


@pytest.mark.parametrize("position", [0, POSITION_MAX])
def test_positions_are_bigints(position: int) -> None:
    """Positions up to the database's largest bigint are accepted."""
    assert read_query(ViewQuery, get(f"/x?after_position={position}")).after_position == position


@pytest.mark.parametrize("cnote", ["JX1234567890", " ", "a b", "😀", "'; --", "x" * 128, "NFD: O\u0308"])
def test_a_text_filter_is_taken_as_it_is(cnote: str) -> None:
    """A text filter is neither trimmed nor folded."""
    assert read_query(OrdersQuery, get(f"/x?cnote={quote(cnote, safe='')}")).cnote == cnote


# Order numbers in paths


@pytest.mark.parametrize(
    ("segment", "order_no"),
    [
        ("KOM1", "KOM1"),
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("%252F", "%2F"),
        ("%2500", "%00"),
        ("%25zz", "%zz"),
        ("%F0%9F%98%80", "😀"),
        ("😀", "😀"),
        ("a%20b", "a b"),
        ("%20a%20", " a "),
        ("a+b", "a+b"),
        ("a%3Fb%23c", "a?b#c"),
        ("%E2%80%AEKOM1", "\u202eKOM1"),
        ("K%C3%96M", "K\u00d6M"),
        ("KO%CC%88M", "KO\u0308M"),
        ("...", "..."),
        ("orders", "orders"),
    ],
)
@pytest.mark.parametrize("rest", ["", "/timeline", "/events?after=1", "?as_of=%zz", "?x=/orders/other"])
def test_an_order_number_in_the_path_is_decoded_once(segment: str, order_no: str, rest: str) -> None:
    """Percent escapes are decoded once, as UTF-8, and the rest of the path makes no difference."""
    pattern = f"/orders/{{order_no}}{rest.partition('?')[0]}"
    assert parse_order_no(routed(f"/orders/{segment}{rest}", pattern)) == order_no


@pytest.mark.parametrize(
    "segment",
    [
        "%00",
        "a%00",
        "%0A",
        "%1F",
        "%7F",
        "%C2%85",
        "%zz",
        "%",
        "a%",
        "%2",
        "%2g",
        "%%",
        "%u0041",
        "%FF",
        "%C3",
        "%ED%A0%80",
        "%C0%AF",
        "%F0%9F%98",
        "%E9",
    ],
)
def test_a_path_with_an_invalid_order_number_is_refused(segment: str) -> None:
    """Broken escapes, invalid UTF-8 and control characters are a bad request, not an unknown order."""
    with pytest.raises(ProblemError) as raised:
        parse_order_no(routed(f"/orders/{segment}/timeline", "/orders/{order_no}/timeline"))
    assert raised.value.status == 400
    assert raised.value.title == "Bad path"


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1:8080"])
def test_a_request_target_in_absolute_form(host: str) -> None:
    """A proxy may send the whole URL as the request target."""
    assert parse_order_no(routed(f"http://{host}/orders/KOM%2F1", "/orders/{order_no}")) == "KOM/1"


def test_a_request_target_in_absolute_form_of_a_host_named_orders() -> None:
    """A host named orders does not count as a part of the path."""
    assert parse_order_no(routed("http://orders/orders/KOM1", "/orders/{order_no}")) == "KOM1"


def test_a_problem_is_the_readers_not_the_servers() -> None:
    """Unusual values of any parameter get a problem that names the parameter."""
    names = ["cursor", "limit", "as_of", "status", "verdict", "x", ""]
    values: list[Any] = ["%00", "%zz", "%FF", "[]", "{}", "=", ";", "%26", "😀"]
    for name in names:
        for value in values:
            assert refused(OrderQuery, f"{name}={value}").members.keys() == {"parameter"}
