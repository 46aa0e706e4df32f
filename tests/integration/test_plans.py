"""Query plans: the statements of the hot path and of lists read only the rows that a page needs."""

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, cast

import pytest

from domain.statuses import SETTLED, STATUSES
from projections import current_status, order_list, selection, statistics, timeline
from projections.audit import TransitionsFilter, transitions_page
from projections.order_list import (
    LAST_PLACE,
    ListPlace,
    OrdersFilter,
    Sort,
    count_orders,
    orders_page,
    place_at,
    updated_page,
)
from projections.postgres import Connection
from projections.windows import POSITION_MAX
from service.database.connections import HOT_SETTINGS, POOL_SETTINGS, connect, connected
from service.event_log import contradictions, snapshot, store
from service.features.proofs import bundles
from service.features.proofs import storage as history
from service.ingest import quarantine
from service.projecting import projector
from service.projecting.locks import TRY_LEAD
from tests.support.databases import TestServer
from tests.support.filler import NO_CNOTE, fill_log
from tests.support.history import build_history
from tests.support.recording import rebuilt

ORDERS: Final = 5_000
ORDERS_AT_LENGTH: Final = 180_000
COMBINATIONS_AT_LENGTH: Final = 1_500
# Enough for a page of a hundred rows from an index that also has rows excluded by other conditions. The limit
# is far below the number of orders, and stays the same for a million.
ROWS_READ_MAX: Final = 2_000
# The limit of a filtered list, whatever the filter, and how often it may read each row that it walks.
LIST_ROWS_READ_MAX: Final = 24_000
READS_MAX: Final = 12
# Counting stops here.
COUNTED_MAX: Final = 100
# In the short test, a page walks this many rows of its list, and so many combinations of filters are tried.
WALKED_ROWS: Final = 400
COMBINATIONS: Final = 40


class Statement(NamedTuple):
    """A statement of the hot path: its text, the number of its parameters, and its search path."""

    text: str
    parameters: int
    search_path: str = "public"


# The statements that a dedicated connection plans once, generically.
HOT: Final = {
    "append": Statement(store.APPEND, 9),
    "last events": Statement(store.LAST_EVENTS, 2),
    "the fate of an append": Statement(store.EVENTS_AT, 2),
    "the log after a position": Statement(store.LOG, 3),
    "add to orders": Statement(current_status.VIEW.write_sql, 2, current_status.VIEW.name),
    "orders by number": Statement(current_status.ORDERS_BY_NUMBER, 1),
    "timelines by number": Statement(timeline.FIRST_ROWS, 2),
    "look at a view": Statement(
        projector.LOOK.format(try_lead=TRY_LEAD.format(view="timeline")), 1, timeline.VIEW.name
    ),
    "the head of the log": Statement(store.HEAD, 0),
    "move a view": Statement(projector.ADVANCE, 3, timeline.VIEW.name),
    "the tree of the history": Statement(history.STATE, 0),
    "add to the history": Statement(history.GROW, 6),
    "tiles of the history": Statement(history.TILES, 3),
    "salts of the history": Statement(history.SALTS, 1),
    "commitments of the history": Statement(history.COMMITMENTS, 1),
    "commit to erased events": Statement(history.SET_COMMITMENTS, 2),
    "publish a checkpoint": Statement(history.SET_CHECKPOINT, 3),
}
# The table has one row, the view's position, and so has a sequence. A scan is the best plan for one row.
SCANS_ALLOWED: Final = ("Seq Scan on projection", "Seq Scan on order_events_notification_id_seq")


@pytest.mark.parametrize("name", HOT)
async def test_a_hot_statement_scans_no_table_even_if_planned_on_empty_ones(dsn: str, name: str) -> None:
    """The generic plan of a hot statement scans no table, even if it was made on empty tables.

    A connection keeps such a plan while the tables grow.
    """
    statement = HOT[name]
    connection = await connect(dsn, **HOT_SETTINGS, search_path=statement.search_path)
    try:
        await connection.execute(f"PREPARE hot AS {statement.text}")
        nulls = ", ".join(["NULL"] * statement.parameters)
        rows = await connection.fetch(f"EXPLAIN EXECUTE hot {f'({nulls})' if nulls else ''}")
    finally:
        await connection.close()
    scans = [row[0].strip() for row in rows if "Seq Scan" in row[0]]
    assert all(any(allowed in scan for allowed in SCANS_ALLOWED) for scan in scans), scans


# Few of many entries are open.
FILL_QUARANTINE: Final = """
    INSERT INTO quarantine (body, reason, received_at, last_seen_at, state, resolved_at, discard_reason)
    SELECT n::text::bytea, 'x', now(), now(), CASE WHEN n % 1000 = 0 THEN 'open' ELSE 'discarded' END,
        CASE WHEN n % 1000 <> 0 THEN now() END, CASE WHEN n % 1000 <> 0 THEN 'x' END
    FROM generate_series(1, $1::bigint) AS n
"""

FILL_HANDLED: Final = """
    WITH done AS (
        INSERT INTO operations (via, action, subject) VALUES ('api', 'contradiction_handled', 'x')
        RETURNING operation_id
    )
    INSERT INTO handled_contradictions
    SELECT order_no, version, operation_id FROM timeline.entries, done WHERE verdict = 'refused'
"""

# As after the erasure of one order in a hundred.
FILL_COMMITMENTS: Final = """
    INSERT INTO history_commitments
    SELECT notification_id, sha256(state), sha256(state) FROM order_events WHERE originator_id LIKE '%77'
"""

HANDLED_ORDER: Final = "(SELECT order_no FROM handled_contradictions LIMIT 1)"
ERASED_POSITIONS: Final = (
    "(SELECT array_agg(position) FROM (SELECT position FROM history_commitments LIMIT 9) AS a)"
)
LATELY: Final = "now() - interval '20 s'"
LONG_AGO: Final = "now() - interval '350 days'"
LONGER_AGO: Final = "now() - interval '900 days'"
END: Final = "9000000000000000000"
NEWEST: Final = ("now()", END)
UNSETTLED: Final = ["", *(status for status in STATUSES if status not in SETTLED)]
PAGES: Final = {
    "events of an order": (store.STREAM, "'KOM77'", "0", "100", "1000"),
    "timeline": (timeline.ENTRIES_PAGE, "'KOM77'", "0", "100"),
    "timelines by number": (timeline.FIRST_ROWS, "ARRAY['KOM77', 'KOM78', 'no such']", "33"),
    "entries of a page": (timeline.NEWEST_ENTRIES, "'KOM77'", "9", "9", "50"),
    "counts of an order": (timeline.COUNTS, "'KOM77'", "9"),
    "status changes of an order": (timeline.LATEST_ADVANCES, "'KOM77'", "500"),
    "reports a minute": (statistics.MINUTES, LATELY),
    "reports a day": (statistics.DAYS, "ARRAY[now() - interval '2 days']", "now()"),
    "contradictions": (contradictions.PAGE, END, "50", "false", "50"),
    "contradictions walked": (contradictions.REACHED, END, "50"),
    "a contradiction": (contradictions.CONTRADICTION, "'KOM77'", "2"),
    "handled contradictions": (contradictions.HANDLED_VERSIONS, HANDLED_ORDER),
    "events at positions": (store.AT_POSITIONS, "ARRAY[5, 6, 7]", "100000"),
    "selected positions": (selection.SELECTED, "ARRAY[5, 6, 7]", "ARRAY['advanced']", "NULL"),
    "stuck orders": (order_list.walk_stuck(8), f"ARRAY{UNSETTLED}", LONG_AGO, LONGER_AGO, "0", "100"),
    "statuses of orders": (order_list.STATUSES_PRESENT,),
    "orders by first report": (order_list.WALK_FIRST, END, "100"),
    "orders by last report": (order_list.WALK_UPDATED, *NEWEST, LONG_AGO, "100"),
    "orders by status": (order_list.walk_statuses(2), *NEWEST, LONG_AGO, "100", "ARRAY['lost', 'completed']"),
    "orders with a refused report": (order_list.WALK_REFUSED, *NEWEST, LONG_AGO, "100"),
    "quarantine by state": (quarantine.ENTRIES_PAGE, END, "'open'", "100"),
    "quarantine to retry": (quarantine.OPEN_ENTRIES,),
    "an order in the history": (bundles.SUMMARY, "'KOM77'", "20000"),
    "the tree of the history": (history.STATE,),
    "tiles of a proof": (history.TILES, "1", "ARRAY[0, 0, 1]::smallint[]", "ARRAY[5, 50, 0]"),
    "salts of a proof": (history.SALTS, "ARRAY[5, 50]"),
    "commitments of a proof": (history.COMMITMENTS, ERASED_POSITIONS),
}  # fmt: skip


def fill(dsn: str, orders: int, folder: Path) -> None:
    """Fill a database with skewed data: few orders are lost, unsettled or contradicted."""
    fill_log(dsn, orders)

    async def make_views() -> None:
        await rebuilt(dsn)
        await build_history(dsn, folder / "history.key")
        async with connected(dsn) as connection:
            await connection.execute(FILL_QUARANTINE, orders)
            await connection.execute(FILL_HANDLED)
            await connection.execute(FILL_COMMITMENTS)
            # Do what autovacuum does, for the planner's statistics.
            await connection.execute("VACUUM ANALYZE")

    asyncio.run(make_views())


@pytest.fixture(scope="module")
def filled_dsn(server: TestServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the DSN of a database with ORDERS orders, which the tests of this module only read."""
    with server.database() as dsn:
        fill(dsn, ORDERS, tmp_path_factory.mktemp("history"))
        yield dsn


@pytest.fixture
async def filled(filled_dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(filled_dsn, **POOL_SETTINGS)
    yield connection
    await connection.close()


TABLE_SCANS: Final = ("Seq Scan", "Index Scan", "Index Only Scan", "Bitmap Heap Scan")


def rows_read(plan: dict[str, Any]) -> int:
    """Count the rows that a plan's scans read from tables, including the rows that a filter removed."""
    removed = ("Rows Removed by Filter", "Rows Removed by Index Recheck")
    below = sum(rows_read(one) for one in plan.get("Plans", ()))
    if plan["Node Type"] not in TABLE_SCANS:
        return below
    each: float = plan["Actual Rows"] + sum(plan.get(name, 0) for name in removed)
    loops: int = plan["Actual Loops"]
    return below + round(each * loops)


async def rows_of_a_page(connection: Connection, name: str) -> tuple[int, list[Any]]:
    """Run a list's statement, and return the number of rows that it reads, and its plan."""
    statement, *arguments = PAGES[name]
    texts = [await connection.fetchval(f"SELECT ({argument})::text") for argument in arguments]
    quoted = ["NULL" if text is None else "'" + text.replace("'", "''") + "'" for text in texts]
    await connection.execute(f"PREPARE page AS {statement}")
    values = f"({', '.join(quoted)})" if quoted else ""
    explained = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING off) EXECUTE page {values}")
    await connection.execute("DEALLOCATE page")
    plan: list[Any] = explained
    return rows_read(plan[0]["Plan"]), plan


@pytest.mark.parametrize("name", PAGES)
async def test_a_page_reads_no_more_rows_than_it_needs(filled: Connection, name: str) -> None:
    """On skewed data, each statement of a page reads no more than ROWS_READ_MAX rows."""
    read, plan = await rows_of_a_page(filled, name)
    assert 0 < read <= ROWS_READ_MAX, plan


class Counting:
    """A connection that also explains each statement, and counts the rows that it reads from tables."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.rows = 0

    async def fetch(self, statement: str, *arguments: Any) -> list[Any]:
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING off) {statement}"
        plan = await self._connection.fetchval(explain, *arguments)
        self.rows += rows_read(plan[0]["Plan"])
        return await self._connection.fetch(statement, *arguments)

    async def fetchval(self, statement: str, *arguments: Any) -> Any:
        ((value,),) = await self.fetch(statement, *arguments)
        return value


class OrdersList(NamedTuple):
    """A list of orders: its order, and its filter."""

    sort: Sort
    filter: OrdersFilter


Criteria: TypeAlias = OrdersList | TransitionsFilter
Key: TypeAlias = int | ListPlace


async def _page(
    connection: Connection, criteria: Criteria, place: Any, limit: int
) -> tuple[list[Key], Key | None]:
    if isinstance(criteria, TransitionsFilter):
        page = await transitions_page(connection, place, criteria, limit)
        return [row["position"] for row in page.rows], page.reached
    if criteria.sort == "updated":
        updated = await updated_page(connection, place, criteria.filter, limit)
        return [order.place for order in updated.rows], updated.reached
    listed = await orders_page(connection, place, criteria.filter, limit)
    return [order.first_position for order in listed.rows], listed.reached


async def pages_of(
    connection: Connection, criteria: Criteria, limit: int, pages_max: int
) -> tuple[list[Key], bool, int]:
    """Read a list's first pages.

    Returns:
        The keys of their rows, whether they are the whole list, and the most rows that a page read from tables.
    """
    keys: list[Key] = []
    place: Key | None = 0
    if isinstance(criteria, OrdersList):
        place = POSITION_MAX if criteria.sort == "first" else LAST_PLACE
    most = 0
    for _ in range(pages_max):
        counting = Counting(connection)
        found, reached = await _page(cast("Connection", counting), criteria, place, limit)
        keys += found
        most = max(most, counting.rows)
        if len(found) < limit and reached is None:
            return keys, True, most
        place = keys[-1] if len(found) == limit else reached
    return keys, False, most


TimeRange: TypeAlias = tuple[datetime | None, datetime | None]


async def time_ranges(connection: Connection, table: str, column: str) -> list[TimeRange]:
    """Return ranges of time: everything, the last rows, the first ones, halves, a middle part, and nothing."""
    shares = "percentile_disc(ARRAY[0.002, 0.5, 0.52, 0.998, 1.0])"
    times = f"SELECT {shares} WITHIN GROUP (ORDER BY {column}) FROM {table}"  # noqa: S608 - our own names
    first, middle, later, last, end = await connection.fetchval(times)
    return [
        *((None, None), (last, None), (middle, None), (None, first), (None, middle), (middle, later)),
        (end + timedelta(days=1), None),
    ]


async def audit_filters(connection: Connection) -> list[TransitionsFilter]:
    """Return every combination of some filters of the audit."""
    product: Iterable[tuple[Any, ...]] = itertools.product(
        (None, "advanced", "refused", "unrecognised", "late"),
        (None, "KOM30"),
        (None, "submitted", "completed"),
        (None, "in_transit", "cancelled"),
        await time_ranges(connection, "timeline.entries", "received_at"),
    )
    return [TransitionsFilter(*parts, *times) for *parts, times in product]


async def order_filters(connection: Connection) -> list[OrdersList]:
    """Return every combination of some filters of the list of orders."""
    ranges = await time_ranges(connection, "current_status.orders", "last_reported_at")
    middle, _ = ranges[2]
    product: Iterable[tuple[Any, ...]] = itertools.product(
        ("first", "updated"),
        (None, ("completed",), ("in_transit",), ("lost", "in_transit"), ("lost",)),
        (None, True, False),
        (None, NO_CNOTE, "AWB77"),
        (None, "KOM1", "AWB7", "KOM777", NO_CNOTE, "no such"),
        (None, True),
        [
            *((*pair, None) for pair in ranges),
            *((None, None, until) for _, until in ranges if until is not None),
            (middle, None, middle),
        ],
    )
    return [OrdersList(sort, OrdersFilter(*parts, *times)) for sort, *parts, times in product]


async def audit_keys(connection: Connection, criteria: TransitionsFilter) -> list[Key]:
    """Return the positions that a filter of the audit selects, by reading every row."""
    verdict, order_no, before, reported, since, until = criteria
    return [
        row["position"]
        for row in await connection.fetch("SELECT * FROM timeline.entries ORDER BY position")
        if verdict in (None, row["verdict"])
        and order_no in (None, row["order_no"])
        and before in (None, row["previous_status"])
        and reported in (None, row["recognised"])
        and (since is None or row["received_at"] >= since)
        and (until is None or row["received_at"] < until)
    ]


async def order_keys(connection: Connection, criteria: OrdersList) -> list[Key]:
    """Return the keys of the orders that a filter selects, in the order of the list, by reading every row."""
    chosen = criteria.filter
    cnotes: defaultdict[str, list[str]] = defaultdict(list)
    for cnote, order_no in await connection.fetch("TABLE current_status.order_cnotes"):
        cnotes[order_no].append(cnote)
    rows = [
        row
        for row in await connection.fetch("TABLE current_status.orders")
        if (chosen.statuses is None or row["status"] in chosen.statuses)
        and chosen.settled in (None, row["status"] in SETTLED)
        and (chosen.cnote is None or chosen.cnote in cnotes[row["order_no"]])
        and any(text.startswith(chosen.search or "") for text in (row["order_no"], *cnotes[row["order_no"]]))
        and (chosen.has_refused is None or row["refused"] > 0)
        and _is_within(row["last_reported_at"], chosen.updated_after, chosen.updated_before)
        and (
            chosen.unmoved_since is None
            or (row["last_reported_at"] <= chosen.unmoved_since and row["status"] not in SETTLED)
        )
    ]
    if criteria.sort == "first":
        return sorted((row["first_position"] for row in rows), reverse=True)
    return sorted((place_at(row["last_reported_at"], row["position"]) for row in rows), reverse=True)


def _is_within(time: datetime, after: datetime | None, before: datetime | None) -> bool:
    return (after is None or time >= after) and (before is None or time < before)


@pytest.mark.parametrize(
    ("filters", "keys_of"), [(audit_filters, audit_keys), (order_filters, order_keys)], ids=["audit", "orders"]
)
async def test_a_filtered_list_is_whole_and_each_page_bounded(
    filled: Connection,
    monkeypatch: pytest.MonkeyPatch,
    filters: Callable[[Connection], Awaitable[list[Any]]],
    keys_of: Callable[[Connection, Any], Awaitable[list[Key]]],
) -> None:
    """Some combinations of filters: the pages have exactly the selected rows, and none reads many rows."""
    monkeypatch.setattr("projections.audit.WALKED_ROWS_MAX", WALKED_ROWS)
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", WALKED_ROWS)
    for criteria in random.Random(1).sample(await filters(filled), COMBINATIONS):
        keys, is_whole, most = await pages_of(filled, criteria, limit=40, pages_max=12)
        expected = await keys_of(filled, criteria)
        assert keys == (expected if is_whole else expected[: len(keys)]), criteria
        assert most <= READS_MAX * WALKED_ROWS, criteria


async def test_a_count_is_bounded_and_says_whether_it_is_exact(
    filled: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some combinations of filters: an exact count is right, and another one is a lower bound."""
    monkeypatch.setattr("projections.order_list.WALKED_ROWS_MAX", WALKED_ROWS)
    exact = 0
    for criteria in random.Random(2).sample(await order_filters(filled), COMBINATIONS):
        counting = Counting(filled)
        count = await count_orders(cast("Connection", counting), criteria.filter, COUNTED_MAX)
        expected = len(await order_keys(filled, criteria))
        if count.is_exact:
            assert count.orders == expected, criteria
        else:
            assert count.orders <= min(COUNTED_MAX, expected), criteria
        assert counting.rows <= READS_MAX * WALKED_ROWS, criteria
        exact += count.is_exact
    assert 0 < exact < COMBINATIONS


@pytest.mark.long
@pytest.mark.timeout(1_200)
async def test_a_page_reads_no_more_rows_of_a_million(owner_dsn: str, tmp_path: Path) -> None:
    """On a million events, the statements stay within the same limit, and each filtered page within its own."""
    await asyncio.to_thread(fill, owner_dsn, ORDERS_AT_LENGTH, tmp_path)
    connection = await connect(owner_dsn, **POOL_SETTINGS)
    try:
        too_many = {
            name: read
            for name in PAGES
            if (read := (await rows_of_a_page(connection, name))[0]) > ROWS_READ_MAX
        }
        lists = random.Random(3).sample(await order_filters(connection), COMBINATIONS_AT_LENGTH)
        every: list[Criteria] = [*await audit_filters(connection), *lists]
        for criteria in every:
            _, _, most = await pages_of(connection, criteria, limit=101, pages_max=3)
            if most > LIST_ROWS_READ_MAX:
                too_many[str(criteria)] = most
    finally:
        await connection.close()
    assert too_many == {}


async def test_a_scan_is_found(filled: Connection) -> None:
    """The tests above can fail: a condition without an index reads every row."""
    plan = await filled.fetchval(
        "EXPLAIN (ANALYZE, FORMAT JSON, TIMING off) "
        "SELECT * FROM timeline.entries WHERE reported_status = 'no such status' LIMIT 100"
    )
    assert rows_read(plan[0]["Plan"]) > 5 * ORDERS


async def test_a_rebuild_reads_one_order_after_the_other(connection: Connection) -> None:
    """A rebuild folds one order at a time: the events of interleaved orders come back order by order."""
    insert = (
        "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ($1, $2, 't', '{}')"
    )
    for version in (1, 2, 3):
        for order_no in ("B", "A", "C"):
            await connection.execute(insert, order_no, version)
    rows = await connection.fetch(snapshot.EVENTS_BY_ORDER, 9)
    assert [(row["originator_id"], row["originator_version"]) for row in rows] == [
        (order_no, version) for order_no in "ABC" for version in (1, 2, 3)
    ]
