"""Query plans: the statements of the hot path and of lists read only the rows that a page needs."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, NamedTuple

import pytest

from domain.statuses import SETTLED
from projections import current_status, engine, timeline
from projections.postgres_errors import Connection
from service.database.connections import HOT_SETTINGS, connect
from service.event_log import feed as log_reader
from service.event_log import store
from service.ingest import quarantine
from tests.support.databases import TestServer
from tests.support.folders import ROOT

ORDERS: Final = 20_000
ORDERS_AT_LENGTH: Final = 1_000_000
# Enough for a page of a hundred rows from an index that also has rows excluded by other conditions. The limit
# is far below the number of orders, and stays the same for a million.
ROWS_READ_MAX: Final = 2_000


class Statement(NamedTuple):
    """A statement of the hot path: its text, the number of its parameters, and its search path."""

    text: str
    parameters: int
    search_path: str = "public"


# The statements that a dedicated connection plans once, generically.
HOT: Final = {
    "append": Statement(store.APPEND, 5),
    "last events": Statement(store.LAST_EVENTS, 1),
    "the fate of an append": Statement(store.EVENTS_AT, 2),
    "the log after a position": Statement(store.LOG, 3),
    "the head of the log": Statement(store.HEAD, 0),
    "add to orders": Statement(current_status.ADD_TO_ORDERS, 1, current_status.VIEW.name),
    "orders by number": Statement(current_status.ORDERS_BY_NUMBER, 1),
    "move a view": Statement(engine.ADVANCE, 2, timeline.VIEW.name),
}
# The table has one row, the view's position. A scan is the best plan for one row.
SCANS_ALLOWED: Final = ("Seq Scan on projection",)


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


FILL: Final = """
    INSERT INTO order_events (originator_id, originator_version, topic, state)
    SELECT 'KOM' || n, 1, 'order.status_reported', '{{}}' FROM generate_series(1, {orders}) AS n;
    INSERT INTO current_status.orders (
        order_no, version, position, first_position, status, reported_status, status_since, cnote,
        first_reported_at, last_reported_at, advanced, repeated, late, refused, unrecognised)
    SELECT 'KOM' || n, 1 + 4 * (n % 1000 = 0)::int, n, n,
        CASE WHEN n % 1000 = 0 THEN 'lost' WHEN n % 100 = 0 THEN 'in_transit' ELSE 'completed' END, 'Dikirim',
        now(), 'AWB' || n, now() - ({orders} - n) * interval '1 s', now() - ({orders} - n) * interval '1 s',
        1, (n % 1000 = 0)::int, (n % 1000 = 0)::int, (n % 1000 = 0)::int, (n % 1000 = 0)::int
    FROM generate_series(1, {orders}) AS n;
    INSERT INTO current_status.order_cnotes
    SELECT 'AWB' || n, 'KOM' || n FROM generate_series(1, {orders}) AS n;
    INSERT INTO timeline.entries (
        order_no, version, position, verdict, previous_status, recognised, status, reported_status,
        reported_cnote, skipped, reason, received_at)
    SELECT 'KOM' || n, 1, n, CASE WHEN n % 1000 = 0 THEN 'refused' ELSE 'advanced' END, NULL, 'in_transit',
        'in_transit', 'Dikirim', 'AWB' || n, '{{}}', NULL, now() - ({orders} - n) * interval '1 s'
    FROM generate_series(1, {orders}) AS n;
    INSERT INTO quarantine (body, reason, received_at, last_seen_at, state, resolved_at, discard_reason)
    SELECT n::text::bytea, 'x', now(), now(), CASE WHEN n % 1000 = 0 THEN 'open' ELSE 'discarded' END,
        CASE WHEN n % 1000 <> 0 THEN now() END, CASE WHEN n % 1000 <> 0 THEN 'x' END
    FROM generate_series(1, {orders}) AS n
"""

LATELY: Final = "now() - interval '20 s'"
LONG_AGO: Final = "(SELECT min(last_reported_at) + interval '100 s' FROM current_status.orders)"
MIDDLE: Final = "(SELECT max(position) / 2 FROM current_status.orders)"
END: Final = "9000000000000000000"
# The verdicts that few orders have.
RARE: Final = ("repeated", "late", "refused", "unrecognised")
PAGES: Final = {
    "events of an order": (store.STREAM, "'KOM77'", "0", "100", "1000"),
    "timeline": (timeline.ENTRIES_PAGE, "'KOM77'", "0", "100"),
    "audit": (timeline.TRANSITIONS_PAGE, MIDDLE, *["NULL"] * 6, "100"),
    "audit of an order": (timeline.TRANSITIONS_PAGE, "0", "NULL", "'KOM77'", *["NULL"] * 4, "100"),
    "audit by verdict": (timeline.TRANSITIONS_PAGE, "0", "'refused'", *["NULL"] * 5, "100"),
    "audit by time": (timeline.TRANSITIONS_PAGE, "0", *["NULL"] * 4, LATELY, "NULL", "100"),
    "entries of a page": (timeline.NEWEST_ENTRIES, "'KOM77'", "9", "9", "50"),
    "counts of an order": (timeline.COUNTS, "'KOM77'", "9"),
    "reports a minute": (timeline.RECENT_BY_MINUTE, LATELY, "1000"),
    "contradictions": (timeline.LATEST_REFUSED, "ARRAY['KOM1000', 'KOM2000']"),
    "stuck orders": (current_status.STUCK, LONG_AGO, "100"),
    "quarantine by state": (quarantine.ENTRIES_PAGE, END, "'open'", "100"),
    "quarantine to retry": (quarantine.OPEN_ENTRIES,),
    "orders": (current_status.ORDERS_PAGE, MIDDLE, *["NULL"] * 6, "100"),
    "orders by status": (current_status.ORDERS_PAGE, END, "'lost'", *["NULL"] * 5, "100"),
    "orders by cnote": (current_status.ORDERS_PAGE, END, "NULL", "'AWB77'", *["NULL"] * 4, "100"),
    **{
        f"orders with {verdict}": (
            *(current_status.ORDERS_PAGE, END, *["NULL"] * 2, f"'{verdict}'"),
            *(*["NULL"] * 3, "100"),
        )
        for verdict in RARE
    },
    "orders updated after": (current_status.ORDERS_PAGE, END, *["NULL"] * 3, LATELY, *["NULL"] * 2, "100"),
    "orders updated before": (current_status.ORDERS_PAGE, END, *["NULL"] * 4, LONG_AGO, "NULL", "100"),
    "orders that are stuck": (current_status.ORDERS_PAGE, END, *["NULL"] * 5, LONG_AGO, "100"),
}  # fmt: skip


async def fill(dsn: str, orders: int) -> None:
    """Fill a database with skewed data: few orders are lost, unsettled or contradicted."""
    connection = await connect(dsn)
    try:
        await connection.execute(FILL.format(orders=orders))
        # Do what autovacuum does: statistics for the planner, and summaries for the index by time.
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


@pytest.fixture(scope="module")
def filled_dsn(server: TestServer) -> Iterator[str]:
    """Return the DSN of a database with 20,000 orders."""
    with server.database() as dsn:
        asyncio.run(fill(dsn, ORDERS))
        yield dsn


@pytest.fixture
async def filled(filled_dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(filled_dsn)
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


@pytest.mark.long
@pytest.mark.timeout(1_200)
async def test_a_page_reads_no_more_rows_of_a_million(owner_dsn: str) -> None:
    """With fifty times as many orders, the statements stay within the same limit."""
    await fill(owner_dsn, ORDERS_AT_LENGTH)
    connection = await connect(owner_dsn)
    try:
        too_many = {
            name: read
            for name in PAGES
            if (read := (await rows_of_a_page(connection, name))[0]) > ROWS_READ_MAX
        }
    finally:
        await connection.close()
    assert too_many == {}


async def test_a_scan_is_found(filled: Connection) -> None:
    """The tests above can fail: a condition without an index reads every row."""
    plan = await filled.fetchval(
        "EXPLAIN (ANALYZE, FORMAT JSON, TIMING off) "
        "SELECT * FROM timeline.entries WHERE reported_status = 'no such status' LIMIT 100"
    )
    assert rows_read(plan[0]["Plan"]) == ORDERS


def test_the_settled_statuses_are_those_of_the_vocabulary() -> None:
    """The statements and the index list the same settled statuses as the domain."""
    for text in (
        current_status.ORDERS_PAGE,
        current_status.STUCK,
        (ROOT / "schema.sql").read_text(encoding="utf-8"),
    ):
        (listed,) = re.findall(r"status NOT IN \(([^)]*)\)", text)
        assert set(re.findall(r"'(\w+)'", listed)) == SETTLED


async def test_a_rebuild_reads_one_order_after_the_other(connection: Connection) -> None:
    """A rebuild folds one order at a time: the events of interleaved orders come back order by order."""
    insert = (
        "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ($1, $2, 't', '{}')"
    )
    for version in (1, 2, 3):
        for order_no in ("B", "A", "C"):
            await connection.execute(insert, order_no, version)
    rows = await connection.fetch(log_reader.STREAMS, 9)
    assert [(row["originator_id"], row["originator_version"]) for row in rows] == [
        (order_no, version) for order_no in "ABC" for version in (1, 2, 3)
    ]
