"""Commits that are lost after their events were delivered: the subscription's saved place is lost with them.

The endpoint has accepted versions that the log gives to other events from now on. It ignores lower versions, as
documented, so it must not get them before an operator has decided.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from projections.postgres import Connection
from service.database.connections import connect
from service.features.subscriptions.progress import TRY_LEAD
from tests.support.client import Client, serving_client
from tests.support.databases import TestServer
from tests.support.receiver import Receiver, receiving
from tests.support.recording import dedicated_connection, make_recorder
from tests.support.reports import report
from tests.support.waiting import until_async

NETWORKS = "127.0.0.0/8"
KEPT = ("Diajukan",)
LOST = ("Dipacking", "Dijemput")
# Other reports, which get the versions of the lost ones.
NEW = ("Dikirim", "Diantar", "Diterima")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return an endpoint."""
    async with receiving() as receiver:
        yield receiver


@asynccontextmanager
async def delivering(dsn: str) -> AsyncIterator[Client]:
    async with serving_client(dsn, subscription_networks=NETWORKS) as client:
        yield client


async def add(client: Client, receiver: Receiver) -> str:
    """Add a subscription, and return its path."""
    body = {"url": receiver.url, "verdicts": [], "from_position": 0}
    added = await client.post("/subscriptions", 201, body)
    return f"/subscriptions/{added['subscription_id']}"


async def settled(client: Client, path: str, **expected: Any) -> None:
    async def is_settled() -> bool:
        async with client.session.get(client.url(path)) as response:
            found = await response.json(content_type=None)
        return response.status == 200 and all(found[name] == value for name, value in expected.items())

    await until_async(is_settled)


async def send(client: Client, *statuses: str) -> None:
    """Record reports of one order, one after the other, however often the service has to try."""
    for status in statuses:

        async def is_recorded(status: str = status) -> bool:
            body = {"order_no": "KOM1", "status": status}
            async with client.session.put(client.url("/webhook"), json=body) as response:
                return response.status == 200

        await until_async(is_recorded)


async def copied(server: TestServer, dsn: str, client: Client) -> str:
    copy = server.copy(dsn)

    async def responds() -> bool:
        return await client.status("GET", "/subscriptions") == 200

    await until_async(responds)
    return copy


async def expect_paused(client: Client, path: str, receiver: Receiver) -> None:
    """Expect that the subscription pauses, and that no new event came under the version of a lost one."""
    await settled(client, path, state="paused", reason="log_went_back")
    by_place: dict[tuple[str, int], set[str]] = {}
    for one in receiver.accepted:
        by_place.setdefault((one.order_no, one.version), set()).add(one.message_id)
    assert {place: len(ids) for place, ids in by_place.items()} == dict.fromkeys(by_place, 1)


async def test_a_subscription_pauses_if_delivered_events_are_lost(
    server: TestServer, dsn: str, receiver: Receiver
) -> None:
    """The process that delivered proves what it has read, although the saved place went back with the log.

    Unparked and replayed, the endpoint gets the new events, and a later loss pauses it again.
    """
    async with delivering(dsn) as client:
        path = await add(client, receiver)
        await send(client, *KEPT)
        await settled(client, path, lag_events=0)
        for _ in range(2):
            copy = await copied(server, dsn, client)
            accepted = len(receiver.accepted)
            await send(client, *LOST)
            await receiver.wait_for(accepted + len(LOST))
            server.put_back(dsn, copy)
            await send(client, *NEW)
            await expect_paused(client, path, receiver)
            receiver.accepted.clear()
            await client.post(f"{path}/replay", 200, {"from_position": 0})
            async with client.session.patch(client.url(path), json={"state": "active"}) as response:
                assert response.status == 200
            await receiver.wait_for(len(KEPT + NEW))
            await settled(client, path, state="active", lag_events=0)


async def test_a_process_that_only_delivered_pauses_the_subscription(
    server: TestServer, dsn: str, receiver: Receiver
) -> None:
    """The process that recorded the lost reports is gone, and no process counts them: delivery is proof."""
    async with delivering(dsn) as client:
        path = await add(client, receiver)
        async with dedicated_connection(dsn) as held:
            recorder = make_recorder(held)
            await recorder.record(report("KOM1", *KEPT))
            await settled(client, path, lag_events=0)
            copy = await copied(server, dsn, client)
            for status in LOST:
                await recorder.record(report("KOM1", status))
            await receiver.wait_for(len(KEPT + LOST))
        server.put_back(dsn, copy)
        await send(client, *NEW)
        await expect_paused(client, path, receiver)


async def test_a_process_that_only_recorded_pauses_the_subscription(
    server: TestServer, dsn: str, owner_dsn: str, receiver: Receiver
) -> None:
    """Another process delivered the lost events, and is gone. The one that recorded them pauses, once."""
    async with delivering(dsn) as client:
        path = await add(client, receiver)
        await send(client, *KEPT)
        await settled(client, path, lag_events=0)
        copy = await copied(server, dsn, client)
        # Stands for the process that delivers: this service does not.
        other = await leading(dsn, path, client)
        await send(client, *LOST)
        server.put_back(dsn, copy)
        other.terminate()
        await settled(client, path, state="paused", reason="log_went_back")
        async with client.session.patch(client.url(path), json={"state": "active"}) as response:
            assert response.status == 200
        # It counts the loss only now, with its next commit.
        await send(client, *NEW)
        assert "log_losses_total 1.0" in await client.text("/metrics")
        await settled(client, path, state="active", lag_events=0)
    connection = await connect(owner_dsn)
    paused = await connection.fetchval("SELECT count(*) FROM operations WHERE action = 'subscription_paused'")
    await connection.close()
    assert paused == 1


async def leading(dsn: str, path: str, client: Client) -> Connection:
    """Take the subscription's lead from the service, and return the connection with the lock."""
    connection: Connection = await asyncpg.connect(dsn)
    url = client.url(path)
    for state in ("paused", "active"):
        async with client.session.patch(url, json={"state": state}) as response:
            assert response.status == 200
        if state == "paused":

            async def leads() -> bool:
                return bool(await connection.fetchval(TRY_LEAD, path.rpartition("/")[2]))

            await until_async(leads)
    return connection


async def test_a_subscription_goes_on_after_a_failover_without_a_loss(
    server: TestServer, dsn: str, receiver: Receiver
) -> None:
    """A failover that loses nothing pauses nothing: the events go on, each once for each version."""
    async with delivering(dsn) as client:
        path = await add(client, receiver)
        await send(client, *KEPT, *LOST)
        await settled(client, path, lag_events=0)
        server.put_back(dsn, server.copy(dsn))
        await send(client, *NEW)
        await settled(client, path, state="active", lag_events=0)
        assert {version for _, version in receiver.places()} == set(range(1, len(KEPT + LOST + NEW) + 1))
