"""The rebuild of both views from the log, compared with the same tables made by SQL alone.

``python -m tests.benchmarks.rebuilds DSN`` rebuilds the views as ``replay`` does, and prints the duration and
the peak memory of the process.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, NamedTuple
from uuid import UUID

import psycopg
import uvloop

from domain.order import NEW_ORDER, Arrival, decide, evolve
from projections import current_status, timeline
from projections.views import VIEWS as ALL_VIEWS
from service.console import tune_gc
from service.database.connections import DedicatedConnection, connect
from service.event_log.codec import MAPPER
from service.event_log.follow import Log
from service.ingest.parser import parse
from service.projecting.replay import rebuild_views
from tests.benchmarks import load
from tests.benchmarks.report import Row, ratio, resident_mb

# The views with a row for every order and every event; the statistics are only counters.
VIEWS: Final = [view for view in ALL_VIEWS if view.name in ("current_status", "timeline")]
SEED: Final = 20_260_101
RUN: Final = 999
REPORTS_BY_ORDER: Final = 4
# The reports of all orders arrive a millisecond apart.
FIRST_RECEIVED_AT: Final = datetime(2026, 1, 1, tzinfo=UTC)
# Of twenty orders, sixteen take the happy path. The others have every verdict, skipped stages and second airway
# bills.
JOURNEYS: Final = (
    *((load.STATUSES,) * 16),
    ("Diajukan", "Dikirim", "Dikirim", "Diterima"),
    ("Diajukan", "Dikirim", "Dijemput", "Diterima"),
    ("Dikirim", "Dibatalkan", "Selesai", "Diajukan"),
    ("Menunggu kurir", "Dijemput", "Menunggu kurir", "Dikirim"),
)

ROUNDS: Final = 3
REBUILD_SECONDS_MAX: Final = 120
RATIO_MIN: Final = 1.5
# The rebuild of the whole log may use this multiple of the memory for a part of it.
MEMORY_RATIO_MAX: Final = 1.2
SMALL_LOG_SHARE: Final = 4

COPY_EVENTS: Final = """
    COPY order_events (originator_id, originator_version, topic, state) FROM STDIN (FORMAT BINARY)
"""


class SampleLog(NamedTuple):
    """A log of some orders with the same number of reports each.

    The orders are shuffled, and the reports of each order are in sequence.
    """

    orders: int
    reports: int = REPORTS_BY_ORDER

    def report(self, order: int, number: int = 0) -> bytes:
        """Return the body of a report."""
        journey = JOURNEYS[order % len(JOURNEYS)]
        body = load.report(RUN, order, journey[number % len(journey)])
        if order % len(JOURNEYS) >= len(JOURNEYS) - 4 and number % 4 == 2:
            body = body.replace(b'"JNE', b'"SAP')
        return body

    def events(self) -> Iterator[tuple[str, int, str, bytes]]:
        """Yield the log's rows, decided and encoded like those of the service."""
        arrivals = [order for order in range(self.orders) for _ in range(self.reports)]
        chosen = random.Random(SEED)
        chosen.shuffle(arrivals)
        states = [NEW_ORDER] * self.orders
        for milliseconds, order in enumerate(arrivals):
            state = states[order]
            report_id = str(UUID(int=chosen.getrandbits(128), version=4))
            received_at = FIRST_RECEIVED_AT + timedelta(milliseconds=milliseconds)
            arrival = Arrival(report_id, received_at, "127.0.0.1")
            event = decide(state, parse(self.report(order, state.version), arrival))
            states[order] = evolve(state, event)
            stored = MAPPER.to_stored_event(event)
            yield str(stored.originator_id), stored.originator_version, stored.topic, stored.state

    def write(self, dsn: str) -> None:
        """Append the log to a database."""
        with psycopg.connect(dsn, autocommit=True) as connection:
            with connection.cursor().copy(COPY_EVENTS) as copy:
                copy.set_types(["text", "bigint", "text", "bytea"])
                for row in self.events():
                    copy.write_row(row)
            # Do what autovacuum would do, so that neither side pays for it.
            connection.execute("VACUUM (ANALYZE) order_events")
            connection.execute("CHECKPOINT")


# The baseline, in the fastest form that was found. These forms were slower: json and jsonb, json_to_record,
# jsonb_to_record (by 0.2 of the time), a materialized CTE (by 0.3), and for the orders joins, windows and
# maxima of strings (by 0.3 of their time). The JSON of each event is parsed once, and every column comes from
# the result.
# The audit's kinds of reports, which the service knows before it starts.
MAKE_KINDS: Final = "CREATE TABLE kinds (verdict text, previous_status text, recognised text, kind smallint)"
MAKE_ENTRIES: Final = """
    CREATE TABLE entries AS
    SELECT originator_id AS order_no, originator_version AS version, notification_id AS position,
        event ->> 'verdict' AS verdict, event ->> 'previous_status' AS previous_status,
        event ->> 'recognised' AS recognised, event ->> 'status' AS status,
        event ->> 'reported_status' AS reported_status, event ->> 'reported_cnote' AS reported_cnote,
        CASE WHEN event ->> 'skipped' = '[]' THEN '{}'
             ELSE ARRAY(SELECT jsonb_array_elements_text(event -> 'skipped')) END AS skipped,
        event ->> 'reason' AS reason, (event -> 'timestamp' ->> '_data_')::timestamptz AS received_at,
        (event -> 'occurred_at' ->> '_data_')::timestamptz AS occurred_at,
        (event ->> 'repeats')::bigint AS repeats, (event ->> 'rejudges')::bigint AS rejudges,
        (event -> 'reported_at' ->> '_data_')::timestamptz AS reported_at, kinds.kind
    FROM order_events, LATERAL (SELECT convert_from(state, 'UTF8')::jsonb AS event OFFSET 0) AS parsed
        LEFT JOIN kinds ON kinds.verdict = event ->> 'verdict'
            AND kinds.previous_status = coalesce(event ->> 'previous_status', '')
            AND kinds.recognised = coalesce(event ->> 'recognised', '')
"""
MAKE_ORDERS: Final = """
    CREATE TABLE orders AS
    SELECT order_no, version, position, first_position, statuses[cardinality(statuses)] AS status,
        advancing[cardinality(advancing)] AS reported_status, status_since,
        coalesce(taken[cardinality(taken)], heard[1]) AS cnote, first_reported_at, last_reported_at,
        submitted_at, picked_up_at, shipped_at, delivered_at, delivery_attempts,
        advanced, repeated, late, refused, unrecognised, 0::bigint AS rejudgements
    FROM (
        SELECT order_no, max(version) AS version, max(position) AS position, min(position) AS first_position,
            min(received_at) AS first_reported_at, max(received_at) AS last_reported_at,
            array_agg(status ORDER BY version) AS statuses,
            array_agg(reported_status ORDER BY version) FILTER (WHERE verdict = 'advanced') AS advancing,
            max(received_at) FILTER (WHERE verdict = 'advanced') AS status_since,
            array_agg(reported_cnote ORDER BY version)
                FILTER (WHERE reported_cnote IS NOT NULL AND verdict IN ('advanced', 'repeated')) AS taken,
            array_agg(reported_cnote ORDER BY version) FILTER (WHERE reported_cnote IS NOT NULL) AS heard,
            min(received_at) FILTER (WHERE verdict = 'advanced' AND status = 'submitted') AS submitted_at,
            min(received_at) FILTER (WHERE verdict = 'advanced' AND status = 'picked_up') AS picked_up_at,
            min(received_at) FILTER (WHERE verdict = 'advanced' AND status = 'in_transit') AS shipped_at,
            min(received_at) FILTER (WHERE verdict = 'advanced' AND status = 'delivered') AS delivered_at,
            count(*) FILTER (WHERE verdict = 'advanced' AND status = 'out_for_delivery')
                AS delivery_attempts,
            count(*) FILTER (WHERE verdict = 'advanced') AS advanced,
            count(*) FILTER (WHERE verdict = 'repeated') AS repeated,
            count(*) FILTER (WHERE verdict = 'late') AS late,
            count(*) FILTER (WHERE verdict = 'refused') AS refused,
            count(*) FILTER (WHERE verdict = 'unrecognised') AS unrecognised
        FROM entries GROUP BY order_no
    ) AS folded
"""
MAKE_CNOTES: Final = """
    CREATE TABLE order_cnotes AS
    SELECT DISTINCT reported_cnote AS cnote, order_no FROM entries WHERE reported_cnote IS NOT NULL
"""
ADD_PRIMARY_KEYS: Final = """
    ALTER TABLE entries ADD PRIMARY KEY (order_no, version);
    ALTER TABLE orders ADD PRIMARY KEY (order_no);
    ALTER TABLE order_cnotes ADD PRIMARY KEY (cnote, order_no)
"""
# The tables that are also made by SQL.
COMPARED: Final = (
    (timeline.VIEW, timeline.ENTRIES),
    (current_status.VIEW, current_status.ORDERS),
    (current_status.VIEW, current_status.CNOTES),
)
COUNT_DIFFERENCES: Final = """
    SELECT count(*) FROM (
        (SELECT {columns} FROM {ours} EXCEPT ALL SELECT {columns} FROM by_sql.{theirs})
        UNION ALL
        (SELECT {columns} FROM by_sql.{theirs} EXCEPT ALL SELECT {columns} FROM {ours})
    ) AS differences
"""


def rebuild_by_sql(dsn: str) -> float:
    """Make the tables of both views by SQL alone on one connection, and return the duration in seconds."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS by_sql CASCADE; CREATE SCHEMA by_sql")
        connection.execute("SET search_path TO by_sql, public")
        connection.execute(MAKE_KINDS)
        with connection.cursor().copy("COPY kinds FROM STDIN") as copy:
            for (verdict, previous, recognised), kind in timeline.KINDS.items():
                copy.write_row((verdict, previous or "", recognised or "", kind))
        connection.execute("CHECKPOINT")
        began = time.perf_counter()
        for statement in (MAKE_ENTRIES, MAKE_ORDERS, MAKE_CNOTES, ADD_PRIMARY_KEYS):
            connection.execute(statement)
        for view in VIEWS:
            connection.execute(view.indexes_sql)
        return time.perf_counter() - began


def count_differences(dsn: str) -> int:
    """Count the rows that only one of the two results has."""
    found = 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        for view, table in COMPARED:
            ours, columns = f"{view.name}.{table.name}", ", ".join(table.names)
            query = COUNT_DIFFERENCES.format(columns=columns, ours=ours, theirs=table.name)
            row = connection.execute(query).fetchone()
            found += row[0] if row is not None else 0
    return found


class Rebuild(NamedTuple):
    """The duration and the peak memory of a rebuild by the service's own code in a separate process."""

    seconds: float
    memory_mb: float


def rebuild_by_service(dsn: str) -> Rebuild:
    """Rebuild both views in a new process."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    command = [sys.executable, "-m", __name__, dsn]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=REBUILD_SECONDS_MAX).stdout
    return Rebuild(*json.loads(output))


async def _rebuild(dsn: str) -> Rebuild:
    connect_here = partial(connect, dsn)
    held = DedicatedConnection(connect_here)
    began = time.perf_counter()
    tune_gc()
    rebuilt = await rebuild_views(dsn, VIEWS, Log(held), lambda _done, _total: None)
    seconds = time.perf_counter() - began
    await held.close()
    if any(view.parked for view in rebuilt):
        raise RuntimeError("orders were parked")
    return Rebuild(seconds, resident_mb(os.getpid()).most)


def measure_rebuild(small_dsn: str, large_dsn: str, events: int) -> Iterator[Row]:
    """Compare the rebuild's speed with SQL's, in turns, and its memory at two sizes of the log."""
    large = SampleLog(events // REPORTS_BY_ORDER)
    small = SampleLog(large.orders // SMALL_LOG_SHARE)
    small.write(small_dsn)
    small_memory_mb = rebuild_by_service(small_dsn).memory_mb
    large.write(large_dsn)
    ours, by_sql = [], []
    for _ in range(ROUNDS):
        ours.append(rebuild_by_service(large_dsn))
        by_sql.append(rebuild_by_sql(large_dsn))
    ratios = [seconds / one.seconds for one, seconds in zip(ours, by_sql, strict=True)]
    count = large.orders * large.reports
    speed = ratio(
        "rebuild of both views, events/s, as a multiple of the same tables made by SQL alone",
        statistics.median(ratios),
        f"{count / statistics.median(one.seconds for one in ours):,.0f}/s against "
        f"{count / statistics.median(by_sql):,.0f}/s; by round {' '.join(f'{one:.2f}' for one in ratios)}; "
        f"{count:,} events of {large.orders:,} orders, shuffled",
        least=RATIO_MIN,
    )
    differences = count_differences(large_dsn)
    yield speed.unless(f"{differences} rows differ from SQL's" if differences else None)
    memory_mb = max(one.memory_mb for one in ours)
    yield Row(
        "memory of that rebuild, against one of a quarter of the log",
        f"{memory_mb / small_memory_mb:.2f}",
        f"<= {MEMORY_RATIO_MAX:.2f}",
        memory_mb / small_memory_mb <= MEMORY_RATIO_MAX,
        f"at its most {memory_mb:.0f} MB for {count:,} events, {small_memory_mb:.0f} MB for "
        f"{small.orders * small.reports:,}",
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(uvloop.run(_rebuild(sys.argv[1]))))
