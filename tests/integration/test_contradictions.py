"""Contradictions are listed until an operator handles them; the events stay as they are."""

import asyncio

import pytest

from projections.postgres import Connection
from service.database.operations import REASON_CHARACTERS_MAX
from tests.support.client import Client
from tests.support.recording import EQUAL, logged_events, rebuilt
from tests.support.waiting import until_async


async def contradict(client: Client, *order_nos: str) -> int:
    """Contradict each order once, and return the last position."""
    position = 0
    for order_no in order_nos:
        await client.webhook(order_no, "Diterima")
        position = (await client.webhook(order_no, "Dibatalkan"))["position"]
    return position


async def test_a_contradiction_is_handled(client: Client, connection: Connection, dsn: str) -> None:
    """It leaves the list of open ones, keeps its event, and the action has its author and note."""
    last = await contradict(client, "KOM/1", "KOM2")
    before = await logged_events(connection)
    found = await client.walk(f"/contradictions?handled=false&after_position={last}", "contradictions")
    assert [(one["order_no"], one["version"], one["recognised"], one["previous_status"]) for one in found] == [
        ("KOM2", 2, "cancelled", "delivered"),
        ("KOM/1", 2, "cancelled", "delivered"),
    ]
    assert {(one["handled_at"], one["handled_by"], one["note"]) for one in found} == {(None, None, None)}
    path = "/orders/KOM%2F1/contradictions/2/handle"
    done = await client.post(path, 200, {"note": "the courier was wrong"})
    assert (done["order_no"], done["note"], done["handled_at"] is not None) == (
        "KOM/1",
        "the courier was wrong",
        True,
    )
    open_ones = await client.walk("/contradictions?handled=false", "contradictions")
    assert [one["order_no"] for one in open_ones] == ["KOM2"]
    handled = await client.walk("/contradictions?handled=true", "contradictions")
    assert handled == [done]
    assert len(await client.walk("/contradictions", "contradictions")) == 2
    (action, *_) = (await client.get("/audit/operations"))["operations"]
    assert (action["action"], action["subject"], action["reason"]) == (
        "contradiction_handled",
        "KOM/1 version 2",
        "the courier was wrong",
    )
    problem = await client.post(path, 409, {"note": "again"})
    assert problem["type"] == "/problems/already-handled"
    assert "it was handled at " in problem["detail"]
    assert await logged_events(connection) == before
    assert await rebuilt(dsn, verify=True) == EQUAL
    assert await client.walk("/contradictions?handled=true", "contradictions") == [done]


async def test_two_operators_at_once(client: Client, connection: Connection) -> None:
    """One of them handles it, and the other gets 409. One action is recorded."""
    last = await contradict(client, "KOM1")
    await client.get(f"/contradictions?after_position={last}")
    path = client.url("/orders/KOM1/contradictions/2/handle")

    async def handle() -> int:
        async with client.session.post(path, json={"note": "mine"}) as response:
            return response.status

    assert sorted(await asyncio.gather(*(handle() for _ in range(4)))) == [200, 409, 409, 409]
    assert await connection.fetchval("SELECT count(*) FROM operations") == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "slug"),
    [
        ("/orders/KOM1/contradictions/1/handle", {"note": "x"}, 404, "unknown-contradiction"),
        ("/orders/KOM1/contradictions/9/handle", {"note": "x"}, 404, "unknown-contradiction"),
        ("/orders/KOM1/contradictions/x/handle", {"note": "x"}, 404, "unknown-contradiction"),
        (f"/orders/KOM1/contradictions/{'9' * 20}/handle", {"note": "x"}, 404, "unknown-contradiction"),
        ("/orders/ABSENT/contradictions/2/handle", {"note": "x"}, 404, "unknown-contradiction"),
        ("/orders/KOM1/contradictions/2/handle", {"note": ""}, 400, "bad-body"),
        ("/orders/KOM1/contradictions/2/handle", {"note": " "}, 400, "bad-body"),
        ("/orders/KOM1/contradictions/2/handle", {"note": "a\nb"}, 400, "bad-body"),
        ("/orders/KOM1/contradictions/2/handle", {"note": "x" * (REASON_CHARACTERS_MAX + 1)}, 400, "bad-body"),
        ("/orders/KOM1/contradictions/2/handle", {"reason": "x"}, 400, "bad-body"),
        ("/orders/KOM1/contradictions/2/handle", [], 400, "bad-body"),
    ],
)
async def test_bad_requests(client: Client, path: str, body: object, status: int, slug: str) -> None:
    """Only a refused report can be handled, and only with a note."""
    last = await contradict(client, "KOM1")
    await client.get(f"/contradictions?after_position={last}")
    problem = await client.post(path, status, body)
    assert problem["type"] == f"/problems/{slug}"


async def test_a_contradiction_waits_for_a_rebuilt_view(client: Client, connection: Connection) -> None:
    """While the view is being rebuilt, handling gets 503, not 404: the contradiction may be there."""
    last = await contradict(client, "KOM1")
    await client.get(f"/contradictions?after_position={last}")
    await connection.execute("UPDATE timeline.projection SET definition = 'other'")
    await client.webhook("KOM2")

    async def is_refused() -> bool:
        body = b'{"note": "x"}'
        return await client.status("POST", "/orders/KOM1/contradictions/9/handle", body) == 503

    await until_async(is_refused)


async def test_pages_of_many_contradictions(
    client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every open one is listed once, however many handled ones lie between."""
    monkeypatch.setattr("service.event_log.contradictions.WALKED_ROWS_MAX", 3)
    last = await contradict(client, *(f"KOM{number}" for number in range(12)))
    await client.get(f"/contradictions?after_position={last}")
    for number in range(2, 10):
        await client.post(f"/orders/KOM{number}/contradictions/2/handle", 200, {"note": "known"})
    found = await client.walk("/contradictions?handled=false&limit=1", "contradictions")
    assert [one["order_no"] for one in found] == ["KOM11", "KOM10", "KOM1", "KOM0"]
    await connection.execute("DELETE FROM handled_contradictions")
    assert len(await client.walk("/contradictions?handled=false&limit=5", "contradictions")) == 12
