"""Each log has an id, so that a reader whose position belongs to another log learns of it."""

import asyncio
from uuid import UUID, uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.app import Service
from service.database.connections import (
    ConnectionPool,
    DedicatedConnection,
    StorageUnavailableError,
    connect,
    connected,
)
from service.database.log_identity import LOG_ID, LogIdentity, read_log_id
from service.database.schema import SERVICE_ROLE, SchemaError, apply_schema, as_role, prepare_database
from service.features.settings import Settings
from service.features.simulator.account import ServiceLog, UnreadableLogError
from service.http.responses import LOG_HEADER
from tests.support.client import Client, serving_client
from tests.support.databases import TestServer
from tests.support.waiting import PATIENCE_SECONDS, until_async

ANOTHER_LOG = "/problems/another-log"
# Every path whose responses have positions, and some that have none.
PATHS = (
    *("/events", "/events.ndjson", "/events/stream", "/orders/KOM1/stream", "/orders/KOM1/events"),
    *(
        "/orders",
        "/orders.csv",
        "/orders.csv?limit=1",
        "/orders?format=csv",
        "/orders/KOM1",
        "/orders/KOM1?version=1",
    ),
    *("/orders/KOM1/timeline", "/orders/KOM1/timeline.csv", "/audit/transitions", "/audit/transitions.csv"),
    *("/contradictions", "/projections", "/erasures", "/statistics", "/quarantine", "/metrics"),
)
RENEW = "UPDATE log_identity SET log_id = gen_random_uuid()"


async def log_header(client: Client, method: str, path: str, **options: object) -> str | None:
    """Return the log's id in the headers of a response."""
    async with client.session.request(method, client.url(path), **options) as response:  # type: ignore[arg-type]
        return response.headers.get(LOG_HEADER)


async def restored(server: TestServer, dsn: str) -> str:
    """Replace the database by its copy with another id, as a restore does, and return the id."""
    copy = server.copy(dsn)
    async with connected(server.dsn_of(copy)) as connection:
        await connection.execute(RENEW)
        log_id = str(await read_log_id(connection))
    server.put_back(dsn, copy)
    return log_id


async def restored_under(server: TestServer, dsn: str, client: Client) -> str:
    """Replace the database, and wait until the service has noticed it."""
    log_id = await restored(server, dsn)

    async def is_noticed() -> bool:
        return await log_header(client, "GET", "/events") == log_id

    await until_async(is_noticed)
    return log_id


async def test_every_response_with_positions_has_the_logs_id(client: Client, connection: Connection) -> None:
    """Receipts, reads, streams and the problems that name a position have the header, for GET and for HEAD."""
    log_id = str(await read_log_id(connection))
    position = (await client.webhook("KOM1"))["position"]
    await client.get(f"/orders/KOM1/timeline?after_position={position}")
    _, headers = await client.get_with_headers(f"/orders/KOM1?after_position={position}")
    for path in PATHS:
        for method in ("GET", "HEAD"):
            assert await log_header(client, method, path) == log_id, (method, path)
    unchanged = {"If-None-Match": headers["ETag"]}
    assert await log_header(client, "GET", "/orders/KOM1", headers=unchanged) == log_id
    for path in ("/events?after=900", "/orders/KOM1?after_position=900", "/orders/KOM2/timeline"):
        assert await log_header(client, "GET", path) == log_id, path
    for body in (b"no report", b'{"order_no": "KOM2", "status": "Dikirim"}'):
        assert await log_header(client, "PUT", "/webhook", data=body) == log_id
    for path in ("/livez", "/nothing", "/"):
        assert await log_header(client, "GET", path) is None, path


async def test_each_database_has_its_own_id_and_keeps_it(dsn: str, empty_dsn: str) -> None:
    """Two databases differ, and a restart of the service changes nothing."""
    ids = []
    for each in (dsn, dsn, await prepare_database(empty_dsn)):
        async with serving_client(each) as client:
            ids.append(await log_header(client, "GET", "/events"))
    first, again, other = ids
    assert first == again != other
    assert UUID(first) != UUID(other)


async def test_a_reader_of_another_log_gets_410(client: Client, connection: Connection) -> None:
    """Every read by position takes the log's id, which ``next`` has, and refuses any other."""
    log_id = str(await read_log_id(connection))
    for _ in range(3):
        await client.webhook("KOM1")
    feed = (await client.get("/events?limit=2"))["next"]
    order = (await client.get("/orders/KOM1/events?limit=2"))["next"]
    # Positions and versions are the same here.
    assert feed.startswith("/events?limit=2&after=2&last=")
    assert order.startswith("/orders/KOM1/events?limit=2&after_version=2&last=")
    place = feed.partition("limit=2&")[2]
    paths = (
        feed,
        order,
        *(f"{path}?{place}" for path in ("/events.ndjson", "/events/stream", "/orders/KOM1/stream")),
    )
    for path in paths:
        assert path.endswith(f"&log={log_id}")
        for method in ("GET", "HEAD"):
            assert await client.status(method, path) == 200, path
            assert await client.status(method, path.replace(log_id, str(uuid4()))) == 410, path
        problem, headers = await client.get_with_headers(path.replace(log_id, "another"), status=410)
        assert (problem["type"], problem["log"], headers[LOG_HEADER]) == (ANOTHER_LOG, log_id, log_id), path
        assert "not another: send your last event's report_id as `last`" in problem["detail"]
    # From an empty page, the feed can be followed on in the same log alone.
    end = (await client.get(f"/events?after=3&log={log_id}"))["next"]
    assert end == f"/events?after=3&log={log_id}"
    # A browser reconnects to the same URL with the position that it has seen.
    resumed = {"Last-Event-ID": "1"}
    await client.get(f"/events/stream?log={uuid4()}", status=410, headers=resumed)
    assert (await client.get("/events?log=", status=400))["parameter"] == "log"
    assert (await client.get(f"/orders?log={log_id}", status=400))["parameter"] == "log"


async def test_a_restore_under_a_running_service_is_noticed(
    server: TestServer, dsn: str, client: Client
) -> None:
    """The service reads the id with each new connection: live streams end, and old places get 410 at once, even
    if the log has lost nothing.
    """
    await client.webhook("KOM1")
    place = (await client.get("/events"))["next"]
    async with client.reading("/events/stream?after=0") as stream:
        assert (await stream.message())["id"] == "1"
        with capture_logs() as logs:
            log_id = await restored_under(server, dsn, client)
        with pytest.raises(EOFError):
            await asyncio.wait_for(stream.message(), PATIENCE_SECONDS)
    (noticed,) = [log for log in logs if log["event"] == "the database has another log"]
    assert (noticed["log_now"], noticed["log_before"] in place) == (log_id, True)
    assert (await client.get(place, status=410))["log"] == log_id
    body = b'{"order_no": "KOM1", "status": "Dikirim"}'
    assert await log_header(client, "PUT", "/webhook", data=body) == log_id
    assert await log_header(client, "GET", "/orders/KOM1") == log_id
    # The last event that the reader has is still there, so it continues with the new id.
    page = await client.get(place.partition("&log=")[0])
    assert ([event["version"] for event in page["events"]], page["next"].endswith(f"&log={log_id}")) == (
        [2],
        True,
    )


@pytest.mark.parametrize("purpose", ["pool", "log_connection", "append_connection"])
async def test_positions_come_with_the_id_of_their_log(server: TestServer, dsn: str, purpose: str) -> None:
    """Each connection that positions come from reads the id before anything else."""
    service = Service(Settings(), dsn)
    await service.start()
    # No other connection must read it first.
    await service.core.background.stop()
    log_id = await restored(server, dsn)
    assert service.core.identity.log_id != log_id
    connection: ConnectionPool | DedicatedConnection = getattr(service.core, purpose)
    async with connection.connection():
        assert service.core.identity.log_id == log_id
    await service.stop()


async def test_a_page_does_not_mix_two_logs(server: TestServer, dsn: str, client: Client) -> None:
    """A read that began with the old log is refused if the database is replaced during it."""
    await client.webhook("KOM1")
    place = (await client.get("/events"))["next"]
    waiting = asyncio.create_task(client.get(f"{place}&wait=30", status=503))

    async def is_waiting() -> bool:
        return 'budget_held{budget="streams"} 1.0' in await client.text("/metrics")

    await until_async(is_waiting)
    await restored_under(server, dsn, client)
    assert (await waiting)["type"] == "/problems/temporarily-unavailable"


async def test_a_restored_log_without_an_id_gets_one(owner_dsn: str, connection: Connection) -> None:
    """A dump has no row. The role that created the schema makes one, once; any other names the command."""
    before = await read_log_id(connection)
    await connection.execute("DELETE FROM log_identity")
    service = as_role(owner_dsn, SERVICE_ROLE)
    with pytest.raises(StorageUnavailableError, match="the log has no id, as after a restore: run 'migrate'"):
        await connect(service, LogIdentity().read)
    login = await connect(owner_dsn.replace("user=order_tracking", f"user={SERVICE_ROLE}"))
    with pytest.raises(SchemaError, match="the log has no id, as after a restore: run 'migrate'"):
        await apply_schema(login)
    await login.close()
    await apply_schema(connection)
    after = await read_log_id(connection)
    await apply_schema(connection)
    assert before != after == await read_log_id(connection)
    assert await connection.fetchval("SELECT current_user") == "order_tracking"


async def test_the_service_cannot_change_the_id(dsn: str) -> None:
    """A stolen service role can neither change the log's id nor add another one."""
    async with connected(dsn) as service:
        assert await service.fetchval(LOG_ID) is not None
        for statement in (RENEW, "DELETE FROM log_identity", "INSERT INTO log_identity DEFAULT VALUES"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement)


async def test_the_simulator_follows_one_log(client: Client, connection: Connection) -> None:
    """After a restore, the account does not take the events at old positions for those of the run."""
    await client.webhook("KOM1")
    log = ServiceLog(client.session, str(client.url("")), "")
    head = await log.head()
    assert [event.order_no async for event in log.events(head - 1)] == ["KOM1"]
    assert log.log_id == str(await read_log_id(connection))
    log.log_id = str(uuid4())
    with pytest.raises(UnreadableLogError, match=f"was restored, since .*, not {log.log_id}: .*: begin again$"):
        _ = [event async for event in log.events(head - 1)]
