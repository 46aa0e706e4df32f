"""A process that only reads, on a primary: on a standby, PostgreSQL itself would refuse what it must not do."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.app import Service
from service.database.api_keys import create_key, list_keys, revoke_key
from service.database.connections import StorageUnavailableError, connect
from service.database.schema import OldReplicaError
from service.database.sessions import open_session
from service.dsn import as_reader
from service.features.settings import Settings
from service.http.access import SESSION_COOKIE
from service.listening import Listener
from service.maintenance import check as checks
from tests.support.client import Client, serving_client
from tests.support.waiting import until_async

TOKEN = "a-token-of-16-characters"  # noqa: S105 - of a service that lives for one test
UNAVAILABLE = "/problems/temporarily-unavailable"


@pytest.fixture
async def reader(dsn: str) -> AsyncIterator[Client]:
    """Return a client of a reader of this test's database."""
    async with serving_client(dsn, read_only=True, database_url=dsn) as reader:
        yield reader


def is_refusal(problem: dict[str, object]) -> bool:
    return (problem["type"], problem["cause"]) == (UNAVAILABLE, "read_only")


async def test_reads_are_those_of_the_service_that_records(client: Client, reader: Client) -> None:
    """After a receipt's position, every read of both gives the same."""
    for status in ("Diajukan", "Dikirim", "Dibatalkan", "Antar Ulang"):
        receipt = await client.webhook("KOM1", status)
    after = f"after_position={receipt['position']}"
    for path in (
        *("/orders/KOM1?", "/orders/KOM1/timeline?", "/orders?", "/audit/transitions?", "/contradictions?"),
        "/statistics?",
    ):
        assert await reader.get(path + after) == await client.get(path + after), path
    for path in ("/orders/KOM1/events", "/events", "/orders/KOM1?version=2", "/transitions", "/erasures"):
        assert await reader.get(path) == await client.get(path), path
    for path in (f"/orders.csv?{after}", "/events.ndjson", "/audit/transitions.csv"):
        assert await reader.text(path) == await client.text(path), path


async def test_responses_have_the_position_and_the_age_of_their_views(client: Client, reader: Client) -> None:
    """A reader's response names a position that it includes; other responses have no such header."""
    position = (await client.webhook("KOM1"))["position"]
    for path in ("/orders", "/orders/KOM1", "/orders/KOM1/timeline", "/statistics", "/orders.csv"):
        async with reader.session.get(reader.url(f"{path}?after_position={position}")) as response:
            assert response.status == 200
            assert int(response.headers["View-Position"]) == position, path
            assert 0 <= float(response.headers["View-Age"]) < 60, path
    _, headers = await reader.get_with_headers("/events")
    assert "View-Position" not in headers
    _, headers = await client.get_with_headers(f"/orders/KOM1?after_position={position}")
    assert "View-Position" not in headers


async def test_a_position_that_is_not_there_yet_is_unavailable(client: Client, reader: Client) -> None:
    """A reader cannot know whether a position is lost or still on its way: 503 with the position reached."""
    position = (await client.webhook("KOM1"))["position"]
    await reader.get(f"/orders/KOM1?after_position={position}")
    for path in (
        *("/orders/KOM1?after_position=900", "/events?after=900", "/events/stream?after=900"),
        "/events.ndjson?after=900",
    ):
        problem, headers = await reader.get_with_headers(path, 503)
        assert (problem["type"], problem["position"]) == (UNAVAILABLE, position), path
        assert headers["Retry-After"] == "2"
    # It waits for the position.
    waiting = asyncio.create_task(reader.get(f"/orders/KOM2?after_position={position + 1}"))
    await client.webhook("KOM2")
    assert (await waiting)["version"] == 1


async def test_webhooks_are_refused(dsn: str, connection: Connection) -> None:
    """A webhook gets 503 with its cause, a wrong token gets 404, and nothing is recorded."""
    async with serving_client(dsn, read_only=True, database_url=dsn, webhook_tokens=(TOKEN,)) as reader:
        for body in (b'{"order_no":"KOM1","cnote":"A","status":"Dikirim"}', b"{}"):
            async with reader.session.put(reader.url(f"/webhook/{TOKEN}"), data=body) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "2"
                assert is_refusal(await response.json(content_type=None))
        assert await reader.status("PUT", "/webhook/another-token", b"{}") == 404
        assert await reader.status("GET", f"/webhook/{TOKEN}") == 405
        # Webhooks that reach the wrong process do not make it unready.
        assert (await reader.get("/readyz"))["role"] == "reader"
    for table in ("order_events", "quarantine"):
        assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0  # noqa: S608 - our own names


async def test_a_reader_is_not_a_silent_recorder(client: Client, dsn: str) -> None:
    """A reader has no metric of the last report, since its alert would fire six hours after the start."""
    await client.webhook("KOM1")
    async with serving_client(dsn, read_only=True, database_url=dsn) as reader:
        assert "webhook_last_received_timestamp_seconds" not in await reader.text("/metrics")
    assert "webhook_last_received_timestamp_seconds" in await client.text("/metrics")


async def test_operators_actions_are_refused(client: Client, reader: Client, connection: Connection) -> None:
    """Each action gets 503, and its page has no form for it."""
    await client.raw(b"{}")
    await client.webhook("KOM1", "Diterima")
    position = (await client.webhook("KOM1", "Dibatalkan"))["position"]
    for path, body in (
        ("/quarantine/1/retry", None),
        ("/quarantine/1/discard", {"reason": "a test"}),
        ("/orders/KOM1/contradictions/2/handle", {"note": "a test"}),
        ("/quarantined/1/retry", None),
    ):
        assert is_refusal(await reader.post(path, 503, body)), path
    assert await connection.fetchval("SELECT state FROM quarantine") == "open"
    for path in ("/quarantined/1", f"/track/KOM1?after_position={position}", "/conflicts", "/"):
        assert 'class="act"' not in await reader.text(path), path
    assert 'class="act"' in await client.text("/quarantined/1")
    assert "This service only reads" in await reader.text("/quarantined/1?lang=en")


async def test_postgresql_refuses_what_a_reader_would_write(dsn: str) -> None:
    """Every connection of a reader is read-only, on a primary too."""
    service = Service(Settings(read_only=True, database_url=dsn), dsn)
    await service.start()
    try:
        async with service.core.pool.connection() as connection:
            assert await connection.fetchval("SHOW transaction_read_only") == "on"
        for dedicated in (
            *(service.core.append_connection, service.core.quarantine_connection, service.core.auth_connection),
            *(service.core.log_connection, *service.core.views.connections.values()),
        ):
            async with dedicated.connection() as connection:
                assert await connection.fetchval("SHOW transaction_read_only") == "on"
    finally:
        await service.stop()


async def test_keys_and_sessions_of_the_primary_are_read(reader: Client, connection: Connection) -> None:
    """A reader admits the primary's keys and sessions, opens none, and records no use of them."""
    secret = await create_key(connection, "dashboard", "admin", None)
    session_id = await open_session(connection, "dashboard")
    bearer = {"Authorization": f"Bearer {secret}"}
    cookie = {"Cookie": f"{SESSION_COOKIE}={session_id}"}

    async def is_closed() -> bool:
        return await reader.status("GET", "/orders") == 401

    await until_async(is_closed)
    with capture_logs() as logs:
        for headers in (bearer, cookie):
            await reader.get("/orders", headers=headers)
        # Another read of the keys, after a use would have been recorded on the same connection.
        await reader.get("/readyz")
    assert logs == []
    (key,) = await list_keys(connection)
    assert key.last_used_at is None
    html = {"Accept": "text/html", "Accept-Language": "en"}
    async with reader.session.get(reader.url("/"), headers=html) as response:
        assert response.status == 401
        form = await response.text()
    assert "This service only reads" in form
    assert 'name="key"' not in form
    for fields in ({"key": secret}, {"forget": "1"}):
        async with reader.session.post(
            reader.url("/session"), data=fields, headers={**html, **cookie}
        ) as answer:
            assert answer.status == 503
            assert "this process only reads" in await answer.text()
    await revoke_key(connection, "dashboard")

    async def is_revoked() -> bool:
        return await reader.status("GET", "/orders", headers=bearer) == 401

    await until_async(is_revoked)
    (key,) = await list_keys(connection)
    assert key.last_used_at is None


async def test_streams_follow_the_log_without_notifications(client: Client, reader: Client) -> None:
    """A stream and a long poll of a reader get the events that another process records."""
    async with reader.reading("/events/stream?after=0") as stream:
        assert [(await client.webhook("KOM1"))["position"]] == await stream.positions(1)
        assert [(await client.webhook("KOM1"))["position"]] == await stream.positions(1)
    poll = asyncio.create_task(reader.get("/events?after=2&verdict=advanced&wait=30"))
    await client.webhook("KOM2")
    assert [event["position"] for event in (await poll)["events"]] == [3]


async def test_a_view_of_another_release_is_outdated(
    client: Client, reader: Client, connection: Connection
) -> None:
    """Reads of it get 503 and the reader is not ready, until the view has this release's definition again."""
    definition = await connection.fetchval("SELECT definition FROM timeline.projection")
    await connection.execute("UPDATE timeline.projection SET definition = 'another'")

    async def is_outdated() -> bool:
        return await reader.status("GET", "/orders/KOM1/timeline") == 503

    await until_async(is_outdated)
    problem = await reader.get("/readyz", 503)
    assert (problem["cause"], problem["view"]) == ("view_outdated", "timeline")
    await reader.get("/orders")
    await connection.execute("UPDATE timeline.projection SET definition = $1", definition)

    async def is_ready() -> bool:
        return await reader.status("GET", "/readyz") == 200

    await until_async(is_ready)
    await client.get("/readyz")


async def test_a_reader_changes_neither_schema_nor_views(empty_dsn: str) -> None:
    """A reader of an empty database waits until another process has made the schema."""
    settings = Settings(port=0, read_only=True, database_url=empty_dsn)
    listener = Listener(settings, settings.own_dsn)
    failures: list[StorageUnavailableError] = []
    starting = asyncio.create_task(listener.start_service(failures.append))

    async def has_failed() -> bool:
        return len(failures) > 1

    await until_async(has_failed)
    assert isinstance(failures[0], OldReplicaError)
    connection = await connect(empty_dsn)
    assert await connection.fetchval("SELECT to_regclass('public.order_events')") is None
    await connection.close()
    recorder = Listener(Settings(port=0), empty_dsn)
    recording = await recorder.start_service(failures.append)
    await (await starting).stop()
    await recording.stop()


async def test_the_check_of_a_reader(dsn: str) -> None:
    """The check accepts a primary, a webhook without a token, and names what a reader does."""
    settings = Settings(read_only=True, database_url=dsn, host="0.0.0.0")  # noqa: S104 - nothing listens
    assert checks.check_webhook(settings).kind == "ok"
    found = await checks.check_database(as_reader(dsn), replica_age_seconds_max=30.0)
    assert "the database is a primary, which this service only reads" in [one.text for one in found]
    assert {one.text for one in found if one.kind == "WRONG"} <= {"fsync is off", "full_page_writes is off"}
