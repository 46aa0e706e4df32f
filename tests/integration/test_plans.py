"""The statements that run all the time go by the keys, whatever the tables held when they were planned."""

import re

import pytest

from domain.statuses import SETTLED
from projections import current_status, engine, timeline
from service import event_store, log_reader, quarantine
from service.database import HOT_SETTINGS, Connection, connect
from tests.acceptance.running import ROOT

# Each statement of the hot path: how many parameters it has, where its names are found, what it goes by.
HOT = {
    "append": (event_store.APPEND, 5, "public", []),
    "last events": (event_store.LAST_EVENTS, 1, "public", ["order_events_pkey"]),
    "what became of an append": (event_store.POSITIONS_OF_EVENTS, 2, "public", ["order_events_pkey"]),
    "the log after a position": (event_store.LOG, 3, "public", ["order_events_notification_id_idx"]),
    "the head of the log": (event_store.HEAD, 0, "public", ["order_events_notification_id_idx"]),
    "add to orders": (current_status.ADD_TO_ORDERS, 1, current_status.NAME, ["orders_pkey"]),
    "orders by number": (current_status.ORDERS_BY_NUMBER, 1, "public", ["orders_pkey", "set_aside_pkey"]),
    "move a view": (engine.ADVANCE, 2, timeline.NAME, []),
}
# Of a view's own single row, and of what is made in the statement itself, a scan is all there is.
SCANS_ALLOWED = ("Seq Scan on projection",)


@pytest.mark.parametrize("name", HOT)
async def test_a_hot_statement_goes_by_the_keys_even_if_planned_on_empty_tables(dsn: str, name: str) -> None:
    """Its generic plan, made while there was nothing, scans no table."""
    statement, parameters, search_path, keys = HOT[name]
    connection = await connect(dsn, **HOT_SETTINGS, search_path=search_path)
    try:
        plan = await generic_plan(connection, statement, parameters)
    finally:
        await connection.close()
    scans = [line.strip() for line in plan.splitlines() if "Seq Scan" in line]
    assert all(any(allowed in scan for allowed in SCANS_ALLOWED) for scan in scans), plan
    for key in keys:
        assert key in plan, plan


LATELY = "now() - interval '20 s'"
# Verdicts that few orders have.
RARE = {verdict: f"orders_{verdict}_idx" for verdict in ("repeated", "late", "refused", "unrecognised")}


@pytest.mark.parametrize(
    ("statement", "arguments", "key"),
    [
        (event_store.STREAM, ("'KOM77'", "0", "100", "1000"), "order_events_pkey"),
        (timeline.ENTRIES_PAGE, ("'KOM77'", "0", "100"), "entries_pkey"),
        (timeline.TRANSITIONS_PAGE, ("5000", *["NULL"] * 6, "100"), "entries_position_idx"),
        (timeline.TRANSITIONS_PAGE, ("0", "NULL", "'KOM77'", *["NULL"] * 4, "100"), "entries_pkey"),
        (timeline.TRANSITIONS_PAGE, ("0", "'refused'", *["NULL"] * 5, "100"), "entries_verdict_idx"),
        (timeline.TRANSITIONS_PAGE, ("0", *["NULL"] * 4, LATELY, "NULL", "100"), "entries_received_idx"),
        (timeline.NEWEST_ENTRIES, ("'KOM77'", "9", "9", "50"), "entries_pkey"),
        (timeline.COUNTS, ("'KOM77'", "9"), "entries_pkey"),
        (timeline.RECENT_BY_MINUTE, (LATELY, "1000"), "entries_position_idx"),
        (timeline.LATEST_REFUSED, ("ARRAY['KOM77', 'KOM88']",), "entries_pkey"),
        (current_status.STUCK, ("now() - interval '9000 s'", "100"), "orders_unsettled_idx"),
        (quarantine.ENTRIES_PAGE, ("9000", "'open'", "100"), "quarantine_state_idx"),
        (quarantine.OPEN_ENTRIES, (), "quarantine_state_idx"),
        (current_status.ORDERS_PAGE, ("9000", *["NULL"] * 6, "100"), "orders_first_position_idx"),
        (current_status.ORDERS_PAGE, ("9000", "'lost'", *["NULL"] * 5, "100"), "orders_status_idx"),
        (current_status.ORDERS_PAGE, ("9000", "NULL", "'AWB77'", *["NULL"] * 4, "100"), "order_cnotes_pkey"),
        (current_status.ORDERS_PAGE, ("9000", "NULL", "'AWB77'", *["NULL"] * 4, "100"), "orders_pkey"),
        *(
            (current_status.ORDERS_PAGE, ("9000", *["NULL"] * 2, f"'{verdict}'", *["NULL"] * 3, "100"), index)
            for verdict, index in RARE.items()
        ),
        (
            current_status.ORDERS_PAGE,
            ("9000", *["NULL"] * 3, "now() - interval '20 s'", *["NULL"] * 2, "100"),
            "orders_last_reported_idx",
        ),
        (
            current_status.ORDERS_PAGE,
            ("9000", *["NULL"] * 4, "now() - interval '9900 s'", "NULL", "100"),
            "orders_last_reported_idx",
        ),
        (
            current_status.ORDERS_PAGE,
            ("9000", *["NULL"] * 5, "now() - interval '9000 s'", "100"),
            "orders_unsettled_idx",
        ),
    ],
    ids=[
        *(
            "events",
            "timeline",
            "audit",
            "audit of an order",
            "audit by verdict",
            "audit by time",
            "entries of a page",
            "counts of an order",
            "reports a minute",
            "contradictions",
            "stuck orders",
            "quarantine by state",
            "quarantine to retry",
            "orders",
            "orders by status",
            "orders by cnote",
            "orders by key",
        ),
        *(f"orders with {verdict}" for verdict in RARE),
        *("orders updated after", "orders updated before", "orders that are stuck"),
    ],
)
async def test_a_page_goes_by_its_index(
    connection: Connection, statement: str, arguments: tuple[str, ...], key: str
) -> None:
    """With ten thousand orders each list finds its page by an index, by the planner's own choice."""
    await connection.execute(FILL)
    await connection.execute(f"PREPARE page AS {statement}")
    values = f"({', '.join(arguments)})" if arguments else ""
    rows = await connection.fetch(f"EXPLAIN EXECUTE page {values}")
    plan = "\n".join(row[0] for row in rows)
    assert key in plan, plan


FILL = """
    INSERT INTO order_events (originator_id, originator_version, topic, state)
    SELECT 'KOM' || n, 1, 'order.status_reported', '{}' FROM generate_series(1, 10000) AS n;
    INSERT INTO current_status.orders
    SELECT 'KOM' || n, 1 + 4 * (n % 1000 = 0)::int, n, n,
        CASE WHEN n % 1000 = 0 THEN 'lost' WHEN n % 100 = 0 THEN 'in_transit' ELSE 'completed' END, 'Dikirim',
        now(), 'AWB' || n, now() - (10000 - n) * interval '1 s', now() - (10000 - n) * interval '1 s',
        1, (n % 1000 = 0)::int, (n % 1000 = 0)::int, (n % 1000 = 0)::int, (n % 1000 = 0)::int
    FROM generate_series(1, 10000) AS n;
    INSERT INTO current_status.order_cnotes SELECT 'AWB' || n, 'KOM' || n FROM generate_series(1, 10000) AS n;
    INSERT INTO timeline.entries
    SELECT 'KOM' || n, 1, n, CASE WHEN n % 1000 = 0 THEN 'refused' ELSE 'advanced' END, NULL, 'in_transit',
        'in_transit', 'Dikirim', 'AWB' || n, '{}', NULL, now() - (10000 - n) * interval '1 s'
    FROM generate_series(1, 10000) AS n;
    INSERT INTO quarantine (body, reason, received_at, last_seen_at, state, resolved_at, resolution)
    SELECT n::text::bytea, 'x', now(), now(), CASE WHEN n % 1000 = 0 THEN 'open' ELSE 'discarded' END,
        CASE WHEN n % 1000 <> 0 THEN now() END, CASE WHEN n % 1000 <> 0 THEN 'x' END
    FROM generate_series(1, 10000) AS n;
    ANALYZE
"""


async def generic_plan(connection: Connection, statement: str, parameters: int) -> str:
    await connection.execute(f"PREPARE hot AS {statement}")
    arguments = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
    rows = await connection.fetch(f"EXPLAIN EXECUTE hot {arguments}")
    return "\n".join(row[0] for row in rows)


def test_what_is_settled_is_the_vocabularys_word() -> None:
    """The list of settled statuses that stands in the statement and in its index is that of the domain."""
    for text in (
        current_status.ORDERS_PAGE,
        current_status.STUCK,
        (ROOT / "schema.sql").read_text(encoding="utf-8"),
    ):
        (listed,) = re.findall(r"status NOT IN \(([^)]*)\)", text)
        assert set(re.findall(r"'(\w+)'", listed)) == SETTLED


def test_every_statement_of_a_rebuild_reads_in_the_order_of_the_key() -> None:
    """A rebuild folds one order at a time, so it must read them one after the other."""
    assert "ORDER BY originator_id, originator_version" in log_reader.STREAMS
