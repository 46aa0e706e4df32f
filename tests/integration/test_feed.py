"""The feed of the log: selected by verdict and status, waiting for news, and never beyond the timeline view."""

import asyncio
import json
from functools import partial
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.statuses import ALIASES, STATUSES
from domain.transitions import VERDICTS
from projections import selection
from projections.postgres import Connection
from service.database import api_keys
from service.database.connections import connect, connected
from service.features.settings import Settings
from service.listening import serving
from service.projecting.locks import HOLD_VIEW_LOCK
from tests.support.client import Client, serving_client
from tests.support.databases import wait_for_locked
from tests.support.recording import rebuilt
from tests.support.waiting import PATIENCE_SECONDS, until_async

WORDS = [words[0] for words in ALIASES.values()] + ["kata asing"]


async def follow(client: Client, path: str) -> list[Any]:
    """Return the events of a feed up to its end: the first page that is empty and leads nowhere new."""
    events: list[Any] = []
    while True:
        page = await client.get(path)
        events += page["events"]
        if not page["events"] and page["next"].partition("&last=")[0] == path.partition("&last=")[0]:
            return events
        path = page["next"]


async def timeline_reaches(client: Client, position: int) -> None:
    await client.get(f"/audit/transitions?after_position={position}")


async def test_any_selection_is_complete(client: Client) -> None:
    """For any reports and any selection, the feed has exactly the events that the whole log has."""
    prefix = iter(range(1_000))

    async def try_one(reports: list[tuple[int, str]], verdicts: set[str], statuses: set[str]) -> None:
        run = next(prefix)
        begin = (await client.get("/projections"))["head"]
        for order, word in reports:
            last = await client.webhook(f"{run}/{order}", word)
        await timeline_reaches(client, last["position"])
        expected = [
            event["position"]
            for event in await follow(client, f"/events?limit=7&after={begin}")
            if (not verdicts or event["data"]["verdict"] in verdicts)
            and (not statuses or event["data"]["status"] in statuses)
        ]
        wanted = "".join(
            f"&{name}={','.join(sorted(values))}"
            for name, values in (("verdict", verdicts), ("status", statuses))
            if values
        )
        found = await follow(client, f"/events?limit=3{wanted}&after={begin}")
        assert [event["position"] for event in found] == expected

    loop = asyncio.get_running_loop()

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from(WORDS)), min_size=1, max_size=25),
        st.sets(st.sampled_from(VERDICTS), max_size=2),
        st.sets(st.sampled_from(STATUSES), max_size=3),
    )
    def try_many(reports: list[tuple[int, str]], verdicts: set[str], statuses: set[str]) -> None:
        asyncio.run_coroutine_threadsafe(try_one(reports, verdicts, statuses), loop).result()

    await asyncio.to_thread(try_many)


async def test_a_page_searches_a_limited_number_of_entries(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page may have fewer events than its limit, and ``next`` goes on without a gap."""
    monkeypatch.setattr(selection, "WALKED_ROWS_MAX", 2)
    for number in range(12):
        last = await client.webhook(f"KOM{number}", "Dikirim" if number % 2 else "Diterima")
    await timeline_reaches(client, last["position"])
    page = await client.get("/events?verdict=advanced&limit=10")
    assert 0 < len(page["events"]) < 10
    found = await follow(client, "/events?verdict=advanced&limit=10")
    assert [event["position"] for event in found] == list(range(1, 13))


async def test_next_never_passes_the_view(client: Client, dsn: str) -> None:
    """While the view stands, a selection leads no further than the view, so it misses nothing later."""
    last = await client.webhook("KOM1", "Dikirim")
    await timeline_reaches(client, last["position"])
    holder = await connect(dsn)
    await holder.execute(HOLD_VIEW_LOCK, "timeline")
    await client.webhook("KOM1", "Diterima")
    await client.webhook("KOM2", "Dikirim")
    page = await client.get("/events?status=delivered")
    assert (page["events"], page["next"].partition("&last=")[0]) == ([], "/events?status=delivered&after=1")
    assert (await client.get("/events?after=1&limit=1"))["events"] != []
    # A reader that is ahead of the view stays where it is.
    ahead = await client.get("/events?status=delivered&after=3")
    assert (ahead["events"], ahead["next"].partition("&log=")[0]) == ([], "/events?status=delivered&after=3")
    await holder.close()
    await timeline_reaches(client, 3)
    (event,) = (await client.get(page["next"]))["events"]
    assert event["data"]["status"] == "delivered"
    end = await client.get("/events?status=lost")
    assert (end["events"], end["next"].partition("&last=")[0]) == ([], "/events?status=lost&after=3")
    await client.get("/events?status=lost&after=4", 410)


@pytest.mark.parametrize("query", ["", "verdict=advanced&", "status=in_transit%2Cdelivered&"])
async def test_a_poll_waits_for_news(client: Client, query: str) -> None:
    """An empty page waits, and the next matching event ends the wait. Other events do not."""
    path = f"/events?{query}wait=30"
    polling = asyncio.create_task(client.get(path))
    await until_async(partial(budget_held, client, 1))
    if query:
        await client.webhook("KOM1", "kata asing")
    await client.webhook("KOM1", "Dikirim")
    page = await asyncio.wait_for(polling, PATIENCE_SECONDS)
    assert [event["data"]["status"] for event in page["events"]] == ["in_transit"]
    assert page["next"].startswith(f"{path}&after={page['events'][-1]['position']}&last=")
    await until_async(partial(budget_held, client, 0))


async def budget_held(client: Client, held: int) -> bool:
    return f'budget_held{{budget="streams"}} {held}.0' in await client.text("/metrics")


async def test_a_poll_ends_without_news(client: Client) -> None:
    """After its time, an empty page leads to the same place. HEAD does not wait."""
    await client.webhook("KOM1", "Dikirim")
    page = await client.get("/events?wait=1&after=1")
    assert (page["events"], page["next"]) == ([], "/events?wait=1&after=1" + page["next"][22:])
    assert await client.status("HEAD", "/events?wait=30&after=1") == 200
    for wait in ("31", "-1", "x", "1.5"):
        await client.get(f"/events?wait={wait}", 400)


async def test_a_stopping_service_ends_its_polls(dsn: str) -> None:
    """A poll does not delay the stop: it gets its page, and the client polls again elsewhere."""
    async with aiohttp.ClientSession() as session:
        async with serving(Settings(port=0), dsn) as (port, _):
            client = Client(session, port)
            polling = asyncio.create_task(client.get("/events?wait=30"))
            await until_async(partial(budget_held, client, 1))
        assert (await asyncio.wait_for(polling, PATIENCE_SECONDS))["events"] == []


@pytest.mark.parametrize(
    "query",
    ["verdict=advance", "verdict=", "verdict=late,", "status=x", "status=lost,,lost", "verdict=a&verdict=b"],
)
async def test_an_unknown_word_is_refused(client: Client, query: str) -> None:
    """The problem names the parameter."""
    problem = await client.get(f"/events?{query}", 400)
    assert problem["parameter"] == query.partition("=")[0]


async def test_a_selection_waits_for_a_rebuilt_view(client: Client, connection: Connection) -> None:
    """While the view is being rebuilt, a selection gets 503, and the plain feed goes on."""
    await client.webhook("KOM1")
    await connection.execute("UPDATE timeline.projection SET definition = 'other'")
    await client.webhook("KOM2")

    async def is_refused() -> bool:
        return await client.status("GET", "/events?verdict=advanced") == 503

    await until_async(is_refused)
    assert len((await client.get("/events"))["events"]) == 2


async def test_a_swap_during_a_search_loses_nothing(client: Client, dsn: str, connection: Connection) -> None:
    """A search that began with the old tables of the view and ends with rebuilt ones finds every event."""
    receipt = await client.webhook("KOM1")
    await timeline_reaches(client, receipt["position"])
    async with connected(dsn) as searching, connected(dsn) as holder:
        await holder.execute("BEGIN; LOCK TABLE timeline.entries")
        everything = selection.Selection()
        search = asyncio.create_task(selection.selected_positions(searching, everything, 0, 10))
        await wait_for_locked(connection)
        swap = asyncio.create_task(rebuilt(dsn))

        async def is_swapped() -> bool:
            return bool(await connection.fetchval("SELECT to_regclass('timeline_old.entries') IS NOT NULL"))

        await until_async(is_swapped)
        await holder.execute("ROLLBACK")
        assert await search == ([receipt["position"]], receipt["position"])
        await swap


async def test_a_key_of_the_scope_read_gets_no_bodies(dsn: str, connection: Connection) -> None:
    """Neither bodies nor addresses, wherever an event or a quarantine entry is shown; read:bodies has them."""
    keys = {scope: await api_keys.create_key(connection, scope, scope, None) for scope in api_keys.SCOPES}
    async with serving_client(dsn) as client:
        await client.webhook("KOM1", "Dikirim")
        quarantine_id = (await client.raw(b"rahasia"))["quarantine_id"]
        for scope, key in keys.items():
            may_see = scope != "read"
            headers = {"Authorization": f"Bearer {key}"}
            (event,) = (await client.get("/events", headers=headers))["events"]
            assert (event["data"]["body"] is not None, event["data"]["remote"]) == (
                may_see,
                "127.0.0.1" if may_see else None,
            )
            (of_order,) = (await client.get("/orders/KOM1/events", headers=headers))["events"]
            assert of_order["data"] == event["data"]
            async with client.session.get(client.url("/events.ndjson"), headers=headers) as response:
                assert await response.json(content_type=None) == event
            for path in ("/events/stream?after=0", "/orders/KOM1/stream?after=0"):
                async with client.reading(path, **headers) as reader:
                    assert json.loads((await reader.message())["data"])["data"] == event["data"]
            (entry,) = (await client.get("/quarantine", headers=headers))["entries"]
            one = await client.get(f"/quarantine/{quarantine_id}", headers=headers)
            assert (entry["remote"] is not None, one["remote"], one["body_base64"]) == (
                (True, "127.0.0.1", "cmFoYXNpYQ==") if may_see else (False, None, None)
            )
            for page in ("/track/KOM1/reports/1", f"/quarantined/{quarantine_id}"):
                async with client.session.get(client.url(page), headers=headers) as response:
                    text = await response.text()
                assert response.status == 200
                assert ("127.0.0.1" in text, "rahasia" in text or "AWB1" in text.partition("<dl")[0]) == (
                    may_see,
                    may_see,
                ), (scope, page)
