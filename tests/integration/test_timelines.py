"""Timelines that are read together: each is the same as if it were read alone."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Final

import pytest

from projections import timeline
from projections.postgres import Connection
from projections.timeline import WholeTimeline
from service.api.orders import TIMELINE_REPORTS_MAX
from service.database.connections import HOT_SETTINGS
from tests.support.client import Client

# An order that is retried, contradicted, and given an unknown word.
WORDS: Final = ("Diajukan", "Diajukan", "Diajukan", "Dikirim", "Entah di mana", "Dikirim", "Batal", "Diterima")
ABSENT: Final = "ABSENT"
PARKED: Final = """
    INSERT INTO timeline.parked_orders (order_no, since_version, position, reason) VALUES ($1, 9, 99, 'x')
"""
# One entry, and repeats of it.
ADD_REPEATS: Final = """
    INSERT INTO timeline.entries (
        order_no, version, position, verdict, status, reported_status, skipped, received_at, repeats, kind)
    SELECT 'HOT', number, 1000 + number, 'repeated', 'submitted', 'Diajukan', '{}', now(),
        CASE WHEN number > 1 THEN 1 END, 0
    FROM generate_series(1, $1::bigint) AS number
"""


async def read_alone(connection: Connection, order_no: str) -> WholeTimeline:
    head = await timeline.read_head(connection, order_no)
    return WholeTimeline(head, await timeline.entries_page(connection, order_no, 0, 1_000))


async def report(client: Client, reports: dict[str, int]) -> None:
    """Send some reports of each order, and wait for the timelines."""
    last = {"position": 0}
    for order_no, count in reports.items():
        for number, word in zip(range(count), itertools.cycle(WORDS), strict=False):
            last = await client.webhook(order_no, word, f"AWB{number // 3}")
    await client.get(f"/orders/{ABSENT}/timeline?after_position={last['position']}", 404)


async def test_timelines_read_together_are_those_read_alone(client: Client, connection: Connection) -> None:
    """Whatever was reported, and whether an order is parked, unknown or requested twice: nothing differs."""
    reports = {f"KOM{count}": count for count in (1, 2, 3, 7, 15, 16, 17)}
    await report(client, reports)
    for order_no in ("KOM2", "UNSEEN"):
        await connection.execute(PARKED, order_no)
    order_nos = [*reports, ABSENT, "UNSEEN", "KOM3", ABSENT]
    alone = [await read_alone(connection, order_no) for order_no in order_nos]
    found = await timeline.find_timelines(connection, order_nos, 16)
    expected: list[WholeTimeline | None] = [
        None if reports.get(order_no, 0) > 16 else whole
        for order_no, whole in zip(order_nos, alone, strict=True)
    ]
    assert found == expected
    assert any(entry["repeats"] > 1 for whole in alone for entry in whole.entries)
    # The members are in the same order too.
    assert str(found) == str(expected)


async def test_a_timeline_is_the_same_whichever_way_it_is_read(client: Client) -> None:
    """The longest timeline that is read together and the shortest one that is not are whole, page by page."""
    reports = {f"KOM{count}": count for count in (TIMELINE_REPORTS_MAX, TIMELINE_REPORTS_MAX + 1)}
    await report(client, reports)
    for order_no, count in reports.items():
        whole = await client.get(f"/orders/{order_no}/timeline")
        assert whole["next"] is None
        assert sum(1 + entry["repeats"] for entry in whole["entries"]) == count
        assert await client.walk(f"/orders/{order_no}/timeline?limit=5", "entries") == whole["entries"]


async def test_timelines_of_a_batch_do_not_mix(client: Client) -> None:
    """Many readers at once get the timelines of their own orders, and those of unknown orders get 404."""
    reports = {f"KOM{number}": number % 5 + 1 for number in range(20)}
    await report(client, reports)

    async def read(order_no: str) -> int:
        whole = await client.get(f"/orders/{order_no}/timeline")
        assert whole["order_no"] == order_no
        return sum(1 + entry["repeats"] for entry in whole["entries"])

    async def fail(number: int) -> None:
        problem = await client.get(f"/orders/{ABSENT}{number}/timeline", 404)
        assert problem["order_no"] == f"{ABSENT}{number}"

    order_nos = [*reports] * 5
    counts, _ = await asyncio.gather(
        asyncio.gather(*map(read, order_nos)), asyncio.gather(*map(fail, range(len(order_nos))))
    )
    assert counts == [reports[order_no] for order_no in order_nos]


async def explained_rows(connection: Connection, order_nos: Sequence[str], reports_max: int) -> float:
    """Return the number of entries that the statement reads with its connection's settings."""
    for name, setting in HOT_SETTINGS.items():
        await connection.execute("SELECT set_config($1, $2, false)", name, setting)
    statement = f"EXPLAIN (ANALYZE, FORMAT JSON, TIMING off) {timeline.FIRST_ROWS}"
    ((plan,),) = await connection.fetch(statement, order_nos, reports_max)
    nodes = [plan[0]["Plan"]]
    rows = 0.0
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", ())
        if node.get("Relation Name") == "entries":
            removed: float = node.get("Rows Removed by Filter", 0)
            rows += (node["Actual Rows"] + removed) * node["Actual Loops"]
    return rows


@pytest.mark.parametrize("repeats", [10, 5_000])
async def test_an_endlessly_repeated_order_delays_no_other(
    client: Client, connection: Connection, repeats: int
) -> None:
    """An order of any number of repeats costs a batch no more than the limit of rows."""
    await report(client, {"KOM1": 2})
    await connection.execute(ADD_REPEATS, repeats)
    await connection.execute("ANALYZE timeline.entries")
    assert await explained_rows(connection, ["HOT", "KOM1"], 33) == min(repeats, 33) + 2
    whole = await client.get("/orders/HOT/timeline")
    assert [entry["repeats"] for entry in whole["entries"]] == [repeats - 1]
