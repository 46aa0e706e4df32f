"""Subscriptions: order events reach the shop's endpoint in order for each order, at least once, signed."""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from aiohttp import web
from openapi_schema_validator import OAS31Validator, oas31_format_checker

from projections.postgres import Connection
from service.database.connections import connected
from service.database.operations import Actor
from service.features.subscriptions.progress import TRY_LEAD
from service.maintenance.erasure import erase_order, settle
from tests.support.client import Client, serving_client
from tests.support.receiver import Received, Receiver, hang, is_signed, receiving
from tests.support.waiting import until_async

NETWORKS = "127.0.0.0/8"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return an endpoint."""
    async with receiving() as receiver:
        yield receiver


@asynccontextmanager
async def delivering(dsn: str, **settings: Any) -> AsyncIterator[Client]:
    """Serve a database that may deliver to this machine."""
    settings = {"subscription_networks": NETWORKS, "subscription_retry_seconds": "0,0.02,0.02", **settings}
    async with serving_client(dsn, **settings) as client:
        yield client


async def add(client: Client, receiver: Receiver, **more: Any) -> Any:
    """Add a subscription for the endpoint, and return it."""
    return await client.post("/subscriptions", 201, {"url": receiver.url, **more})


async def change(client: Client, subscription: Any, status: int = 200, **changes: Any) -> Any:
    """Change a subscription, and return it."""
    url = client.url(f"/subscriptions/{subscription['subscription_id']}")
    async with client.session.patch(url, json=changes) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def pause(client: Client, connection: Connection, subscription: Any) -> Any:
    """Pause a subscription, wait until no process delivers it any more, and return it."""
    paused = await change(client, subscription, state="paused")
    # The process that delivers learns of the change a moment later, and may send an event until then.
    lock = TRY_LEAD.replace("pg_try_advisory_lock", "pg_try_advisory_xact_lock")
    await until_async(partial(connection.fetchval, lock, subscription["subscription_id"]))
    return paused


def path(subscription: Any, *segments: str) -> str:
    """Return a path of a subscription."""
    return "/".join(("/subscriptions", subscription["subscription_id"], *segments))


async def settled(client: Client, subscription: Any, **expected: Any) -> Any:
    """Wait until a subscription has these members, and return it."""

    async def is_settled() -> Any:
        found = await client.get(path(subscription))
        return found if all(found[name] == value for name, value in expected.items()) else None

    return await until_async(is_settled)


def refusing(*order_nos: str, status: int = 500) -> Any:
    """Return a response function that refuses these orders."""

    async def respond(received: Received) -> web.StreamResponse:
        return web.Response(status=status if received.order_no in order_nos else 200, text="no")

    return respond


async def test_an_event_is_delivered(dsn: str, receiver: Receiver) -> None:
    """A new event arrives as a signed message of Standard Webhooks with the documented members."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        assert added["state"] == "active"
        assert added["secret"].startswith("whsec_")
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        body = b'{"order_no":"KOM1","cnote":"JX1","status":"Dikirim"}'
        receipt = await client.raw(body, traceparent=trace)
        (received,) = await receiver.wait_for(1)
        (event,) = (await client.get("/events"))["events"]
        log_id = (await client.get_with_headers("/events"))[1]["X-Order-Tracking-Log"]
    assert is_signed(received, added["secret"])
    assert received.headers["content-type"] == "application/json"
    assert received.headers["x-order-tracking-log"] == log_id
    assert received.headers["traceparent"] == trace
    assert received.message == {
        "type": "order.advanced",
        "timestamp": event["data"]["timestamp"],
        "data": {
            "order_no": "KOM1",
            "cnote": "JX1",
            "status": "in_transit",
            "status_label": {"id": "Dikirim", "en": "In transit"},
            "previous_status": None,
            "version": 1,
            "position": receipt["position"],
            "verdict": "advanced",
            "reported_status": "Dikirim",
            "skipped": event["data"]["skipped"],
            "reason": None,
            "received_at": event["data"]["timestamp"],
            "occurred_at": None,
        },
    }


async def test_the_document_describes_the_requests(dsn: str, receiver: Receiver) -> None:
    """The OpenAPI document has the headers and the body of each request that an endpoint receives."""
    async with delivering(dsn) as client:
        added = await add(client, receiver, verdicts=[], include=["body"])
        await client.post(path(added, "test"), 200)
        await client.webhook("KOM1")
        await client.webhook("KOM1", "Unknown word")
        test, *events = await receiver.wait_for(3)
        document = await client.get("/openapi.json")
    described = document["webhooks"]
    assert described.keys() == {"orderEvent", "test"}
    for name, received in [("test", test), *(("orderEvent", event) for event in events)]:
        operation = described[name]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        whole = {**schema, "components": document["components"]}
        OAS31Validator(whole, format_checker=oas31_format_checker).validate(received.message)
        members = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
        assert received.message.keys() == members.keys()
        headers = {one["name"].lower() for one in operation["parameters"]}
        assert headers - {"traceparent"} <= {one.lower() for one in received.headers}


async def test_what_is_sent_is_selected(dsn: str, receiver: Receiver) -> None:
    """By default only advanced events are sent; an empty filter sends all; bodies are sent on demand."""
    async with delivering(dsn) as client:
        await add(client, receiver)
        await add(client, receiver, verdicts=[], include=["body"])
        await add(client, receiver, statuses=["delivered"])
        for status in ("Dikirim", "Dikirim", "Diterima"):
            await client.webhook("KOM1", status)
        received = await receiver.wait_for(2 + 3 + 1)
        listed = (await client.get("/subscriptions"))["subscriptions"]
    assert [one["verdicts"] for one in listed] == [["advanced"], [], ["advanced"]]
    by_subscription: dict[str, list[Any]] = {}
    for one in received:
        key = f"{one.message['data'].get('body') is not None}"
        by_subscription.setdefault(key, []).append((one.version, one.message["data"]["verdict"]))
    assert sorted(by_subscription["True"]) == [(1, "advanced"), (2, "repeated"), (3, "advanced")]
    assert sorted(by_subscription["False"]) == [(1, "advanced"), (3, "advanced"), (3, "advanced")]


async def test_it_starts_where_you_say(dsn: str, receiver: Receiver) -> None:
    """A subscription starts at the head, at a position, or at a time; a position beyond the head gets 410."""
    async with delivering(dsn) as client:
        first = await client.webhook("KOM1")
        between = datetime.now(UTC)
        await client.webhook("KOM2")
        await add(client, receiver, from_position=first["position"])
        await receiver.wait_for(1)
        await add(client, receiver, from_time=between.isoformat())
        await receiver.wait_for(2)
        await add(client, receiver, from_position=0)
        await receiver.wait_for(4)
        await add(client, receiver)
        await client.webhook("KOM3")
        await receiver.wait_for(8)
        assert sorted(order_no for order_no, _ in receiver.places()) == ["KOM1"] + 3 * ["KOM2"] + 4 * ["KOM3"]
        for body, status in (
            ({"from_position": 10_000}, 410),
            ({"from_position": 1, "from_time": between.isoformat()}, 400),
            ({"from_position": -1}, 400),
            ({"verdicts": ["advance"]}, 400),
            ({"verdict": ["advanced"]}, 400),
        ):
            await client.post("/subscriptions", status, {"url": receiver.url, **body})


async def test_one_order_waits_while_others_go_on(dsn: str, receiver: Receiver) -> None:
    """An event that fails holds its order's later events; after a success they follow in order."""
    receiver.respond = refusing("KOM1")
    async with delivering(dsn, subscription_retry_seconds="0,0.02,600") as client:
        added = await add(client, receiver)
        for status in ("Dijemput", "Dikirim", "Diterima"):
            await client.webhook("KOM1", status)
            await client.webhook("KOM2", status)
        await receiver.wait_for(3)
        found = await settled(client, added, held_orders=1, lag_events=0)
        assert receiver.places() == [("KOM2", 1), ("KOM2", 2), ("KOM2", 3)]
        await until_async(lambda: held_after(client, added, 2))
        (held,) = (await client.get(path(added, "held")))["held"]
        assert (held["order_no"], held["version"], held["last_error"]) == ("KOM1", 1, "500: no")
        assert found["responses"] != []
        receiver.respond = refusing()
        retried = await client.post(path(added, "held", "KOM1", "retry"), 200)
        assert retried["attempts"] == 0
        await receiver.wait_for(6)
        await settled(client, added, held_orders=0)
    assert receiver.places()[3:] == [("KOM1", 1), ("KOM1", 2), ("KOM1", 3)]
    assert receiver.in_flight_of_order_max == 1
    ids = {one.message_id for one in receiver.requests if one.order_no == "KOM1" and one.version == 1}
    assert len(ids) == 1


async def held_after(client: Client, subscription: Any, attempts: int) -> Any:
    """Return the first held order, if it was attempted so often."""
    held = (await client.get(path(subscription, "held")))["held"]
    return held[0] if held and held[0]["attempts"] >= attempts else None


async def test_after_the_last_attempt_it_awaits_an_operator(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """The order stays held and visible; skipping an event, with a reason, goes on with the next one."""
    receiver.respond = refusing("KOM 1/2", status=422)
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        for status in ("Dijemput", "Dikirim"):
            await client.webhook("KOM 1/2", status)
        held = await until_async(lambda: held_after(client, added, 3))
        assert (held["version"], held["next_attempt_at"]) == (1, None)
        held_path = path(added, "held", "KOM%201%2F2", "skip")
        await client.post(held_path, 400, {"reason": ""})
        await client.post(path(added, "held", "KOM2", "skip"), 404, {"reason": "unknown"})
        receiver.respond = refusing()
        skipped = await client.post(held_path, 200, {"reason": "the shop knows"})
        assert skipped["version"] == 1
        await receiver.wait_for(1)
        await settled(client, added, held_orders=0)
    assert receiver.places() == [("KOM 1/2", 2)]
    recorded = await connection.fetch("SELECT action, reason FROM operations ORDER BY operation_id")
    assert [*map(tuple, recorded)][-1] == ("delivery_skipped", "the shop knows")


async def test_a_replay_sends_the_same_ids(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """A replay goes back to a position or a time, and sends the same messages under the same ids."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        for status in ("Dijemput", "Dikirim", "Diterima"):
            await client.webhook("KOM1", status)
        before = [*await receiver.wait_for(3)]
        found = await settled(client, added, lag_events=0)
        await client.post(path(added, "replay"), 400, {})
        await client.post(path(added, "replay"), 410, {"from_position": found["position"] + 1})
        await client.post(path(added, "replay"), 200, {"from_position": 0})
        await receiver.wait_for(6)
        await settled(client, added, position=found["position"])
        hour = timedelta(hours=1)
        await client.post(path(added, "replay"), 200, {"from_time": (datetime.now(UTC) - hour).isoformat()})
        after = await receiver.wait_for(9)
        await pause(client, connection, added)
        await client.webhook("KOM2")
        await client.post(path(added, "replay"), 409, {"from_position": found["position"] + 1})
    for again in (after[3:6], after[6:9]):
        assert [one.message_id for one in again] == [one.message_id for one in before]
        assert [one.raw for one in again] == [one.raw for one in before]


async def test_nothing_that_was_erased_is_delivered(dsn: str, owner_dsn: str, receiver: Receiver) -> None:
    """A replay and a new subscription get the events without their bodies, although memory had them."""
    async with delivering(dsn) as client:
        added = await add(client, receiver, include=["body"])
        for order_no in ("KOM1", "KOM2"):
            body = {"order_no": order_no, "status": "Dikirim", "buyer": "Budi"}
            await client.raw(json.dumps(body).encode())
        before = [*await receiver.wait_for(2)]
        await settled(client, added, lag_events=0)
        async with connected(owner_dsn) as owner, connected(dsn) as own:
            await erase_order(owner, "KOM1", "asked for", Actor("cli", "tests"))
            await settle(owner, own, ["KOM1"])
        await client.post(path(added, "replay"), 200, {"from_position": 0})
        await receiver.wait_for(4)
        await add(client, receiver, include=["body"], from_position=0)
        after = (await receiver.wait_for(6))[2:]
    assert all(b"Budi" in one.raw for one in before)
    assert {(one.order_no, b"Budi" in one.raw) for one in after} == {("KOM1", False), ("KOM2", True)}


async def test_pausing_and_resuming(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """What happens during a pause is delivered after it; a change of the filter applies at once."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        await client.webhook("KOM1")
        await receiver.wait_for(1)
        paused = await pause(client, connection, added)
        assert (paused["state"], paused["reason"]) == ("paused", "operator")
        await client.webhook("KOM2")
        await settled(client, added, lag_events=1)
        assert len(receiver.requests) == 1
        resumed = await change(client, added, state="active", verdicts=[])
        assert (resumed["state"], resumed["reason"], resumed["verdicts"]) == ("active", None, [])
        await receiver.wait_for(2)
        await client.webhook("KOM2")
        await receiver.wait_for(3)
        await change(client, added, 400, state="disabled")
        assert await client.status("DELETE", path(added)) == 204
        assert await client.status("DELETE", path(added)) == 404
        await client.get(path(added), 404)
        await client.get("/subscriptions/nonsense", 404)


async def test_two_secrets_during_a_rotation(dsn: str, receiver: Receiver) -> None:
    """After a rotation, a message can be verified with the new secret and with the previous one."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        rotated = await client.post(path(added, "rotate-secret"), 200)
        assert rotated["previous_secret_until"] is not None
        # The deliverer gets the new secret in a moment.
        for number in itertools.count(1):
            await client.webhook(f"KOM{number}")
            received = (await receiver.wait_for(number))[-1]
            if " " in received.headers["webhook-signature"]:
                break
        everything = await client.text("/metrics") + str(await client.get("/subscriptions"))
    assert rotated["secret"] != added["secret"]
    for secret in (added["secret"], rotated["secret"]):
        assert is_signed(received, secret)
        assert secret not in everything


async def test_an_operators_change_repeats_nothing(dsn: str, receiver: Receiver) -> None:
    """The results of the requests in flight are saved before a change applies."""

    async def respond(_received: Received) -> web.StreamResponse:
        await asyncio.sleep(0.02)
        return web.Response(status=204)

    receiver.respond = respond
    async with delivering(dsn) as client:
        await asyncio.gather(*(client.webhook(f"KOM{number}") for number in range(300)))
        added = await add(client, receiver, from_position=0)
        for number in (50, 120, 200):
            await receiver.wait_for(number)
            await client.post(path(added, "rotate-secret"), 200)
        await receiver.wait_for(250)
        await change(client, added, state="paused")
        await change(client, added, state="active")
        await settled(client, added, lag_events=0, held_orders=0)
    assert len(receiver.requests) == 300


async def test_a_test_request(dsn: str, receiver: Receiver) -> None:
    """A test is signed and has its own type; the response tells its result."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        result = await client.post(path(added, "test"), 200)
        assert (result["delivered"], result["status"], result["error"]) == (True, 204, None)
        assert receiver.requests[0].message["type"] == "subscription.test"
        assert is_signed(receiver.requests[0], added["secret"])
        receiver.respond = refusing("", status=503)
        result = await client.post(path(added, "test"), 200)
        tested = await client.get("/audit/operations?action=subscription_tested")
        assert [one["subject"] for one in tested["operations"]] == [added["subscription_id"]] * 2
    assert (result["delivered"], result["status"], result["error"]) == (False, 503, "503: no")


async def test_an_endpoint_that_is_gone(dsn: str, receiver: Receiver) -> None:
    """410 disables the subscription; its event stays undelivered, and is sent after it was resumed."""
    receiver.respond = refusing("KOM1", status=410)
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        await client.webhook("KOM1")
        await settled(client, added, state="disabled", reason="gone")
        receiver.respond = refusing()
        await change(client, added, state="active")
        await receiver.wait_for(1)
        await settled(client, added, state="active", held_orders=0)


async def test_a_redirect_is_a_failure(dsn: str, receiver: Receiver) -> None:
    """A redirect is not followed, wherever it leads."""

    async def respond(_received: Received) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{receiver.url}/elsewhere"})

    receiver.respond = respond
    async with delivering(dsn, subscription_retry_seconds="0,600") as client:
        added = await add(client, receiver)
        await client.webhook("KOM1")
        held = await until_async(lambda: held_after(client, added, 1))
    assert held["last_error"].startswith("307")
    assert len(receiver.requests) == 1


async def test_retry_after_is_honoured(dsn: str, receiver: Receiver) -> None:
    """The next attempt is not before the time that the endpoint asks for, within limits."""

    async def respond(_received: Received) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "3600"})

    receiver.respond = respond
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        await client.webhook("KOM1")
        held = await until_async(lambda: held_after(client, added, 1))
    pause = datetime.fromisoformat(held["next_attempt_at"]) - datetime.now(UTC)
    assert timedelta(minutes=55) < pause < timedelta(minutes=65)


async def test_a_circle_is_refused(dsn: str) -> None:
    """A subscription that leads to this service's own webhook is paused; its request is not recorded."""
    async with delivering(dsn) as client:
        url = str(client.url("/webhook"))
        added = await client.post("/subscriptions", 201, {"url": url})
        await client.webhook("KOM1")
        await settled(client, added, state="paused", reason="loop")
        assert len((await client.get("/events"))["events"]) == 1
        assert (await client.get("/quarantine"))["entries"] == []


async def test_the_limit_of_requests_in_flight(dsn: str, receiver: Receiver) -> None:
    """At most 32 requests are in flight; an endpoint that hangs blocks neither the webhook nor the stop."""
    receiver.respond = hang
    async with delivering(dsn) as client:
        await add(client, receiver)
        for number in range(40):
            await client.webhook(f"KOM{number}")
        await receiver.wait_for_requests(32)
        await client.webhook("KOM0", "Diterima")
        assert receiver.in_flight_max == 32
    assert receiver.in_flight_of_order_max == 1


async def test_a_log_that_went_back(dsn: str, receiver: Receiver, connection: Connection) -> None:
    """A position beyond the head pauses the subscription; resumed, it goes on at the head."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        await client.webhook("KOM1")
        await receiver.wait_for(1)
        await change(client, added, state="paused")
        await connection.execute("UPDATE subscriptions SET position = 1000, report_id = NULL")
        await change(client, added, state="active")
        await connection.execute(
            "UPDATE subscriptions SET position = 1000, revision = revision + 1, generation = generation + 1"
        )
        await settled(client, added, state="paused", reason="log_went_back")
        await change(client, added, state="active")
        await client.webhook("KOM2")
        await receiver.wait_for(2)
        # Another event at the position, as after a failover that lost some.
        await connection.execute(
            "UPDATE subscriptions SET report_id = 'another', revision = revision + 1, "
            "generation = generation + 1 WHERE position > 0"
        )
        await settled(client, added, state="paused", reason="log_went_back")
        # Another log, as after a restore.
        await change(client, added, state="active")
        await settled(client, added, state="active", lag_events=0)
        await connection.execute(
            "UPDATE subscriptions SET log_id = gen_random_uuid(), revision = revision + 1, "
            "generation = generation + 1"
        )
        await settled(client, added, state="paused", reason="log_went_back")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Bad\r\nContent-Length: 3\r\n\r\na\0b",
        b"HTTP/1.1 500 \xff\xfe\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Bad\r\nContent-Length: 4\r\n\r\n\xff\xfe\x1b[",
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200",
        b"",
    ],
)
async def test_no_response_can_stop_a_subscription(dsn: str, answer: bytes) -> None:
    """Whatever an endpoint sends, its event is held with a printable error, and other orders go on."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
        body = json.loads(await reader.readexactly(int(length)))
        is_bad = body["data"]["order_no"] == "KOM1"
        writer.write(answer if is_bad else b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with delivering(dsn, subscription_retry_seconds="0,600") as client:
            added = await client.post("/subscriptions", 201, {"url": f"http://127.0.0.1:{port}/?token=TOKEN"})
            for order_no in ("KOM1", "KOM2", "KOM3"):
                await client.webhook(order_no)
            found = await settled(client, added, held_orders=1, lag_events=0, delivered=2)
            (held,) = (await client.get(path(added, "held")))["held"]
    assert (held["order_no"], held["attempts"], found["failed"]) == ("KOM1", 1, 1)
    assert held["last_error"].isprintable()
    assert "TOKEN" not in held["last_error"]


async def test_refused_orders_do_not_block_others(dsn: str, receiver: Receiver) -> None:
    """However many orders the endpoint refuses in a row, the orders after them are delivered."""
    receiver.respond = refusing(*(f"BAD{number}" for number in range(80)), status=400)
    async with delivering(dsn, subscription_retry_seconds="0,600") as client:
        added = await add(client, receiver)
        await change(client, added, state="paused")
        for number in range(80):
            await client.webhook(f"BAD{number}")
        for number in range(100):
            await client.webhook(f"GOOD{number}")
        await change(client, added, state="active")
        await receiver.wait_for(100)
        assert (await client.get(path(added)))["down_since"] is None


async def test_an_undecodable_event_waits_behind_undelivered_ones(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """The events before it are delivered first, and those after it only once it is skipped."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        await change(client, added, state="paused")
        for status in ("Dijemput", "Dikirim"):
            await client.webhook("KOM1", status)
        insert = (
            "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ($1, 3, $2, $3)"
        )
        await connection.execute(insert, "KOM1", "order.unknown", b"{}")
        await change(client, added, state="active")
        await receiver.wait_for(2)

        async def is_given_up() -> bool:
            held = (await client.get(path(added, "held")))["held"]
            return [(one["version"], one["next_attempt_at"]) for one in held] == [(3, None)]

        await until_async(is_given_up)
        await client.post(path(added, "held", "KOM1", "skip"), 200, {"reason": "unreadable"})
        await settled(client, added, held_orders=0, lag_events=0)
    assert receiver.places() == [("KOM1", 1), ("KOM1", 2)]


async def test_a_410_while_held_orders_catch_up(dsn: str, receiver: Receiver) -> None:
    """The subscription stops at once, and goes on with everything after it was resumed."""
    receiver.respond = refusing("KOM0", "KOM1", "KOM2")
    async with delivering(dsn, subscription_retry_seconds="0,600") as client:
        added = await add(client, receiver, verdicts=[])
        await asyncio.gather(*(client.webhook(f"KOM{number % 3}") for number in range(300)))
        await settled(client, added, held_orders=3)

        async def respond(received: Received) -> web.StreamResponse:
            await asyncio.sleep(0.005)
            return web.Response(status=410 if received.order_no == "GONE" else 204)

        receiver.respond = respond
        for number in range(3):
            await client.post(path(added, "held", f"KOM{number}", "retry"), 200)
        await receiver.wait_for(20)
        await client.webhook("GONE")
        await settled(client, added, state="disabled", reason="gone")
        receiver.respond = refusing()
        await change(client, added, state="active")
        await settled(client, added, state="active", held_orders=0, lag_events=0)
    assert receiver.out_of_order() == []
    assert len({*receiver.places()}) == 301


@pytest.mark.parametrize("retry_seconds", ["0", "0,600"])
async def test_the_event_that_got_a_410_is_due_when_its_subscription_is_resumed(
    dsn: str, receiver: Receiver, retry_seconds: str
) -> None:
    """An operator may resume the subscription before the event is saved as held: it is sent all the same."""
    slow = asyncio.Event()

    async def respond(received: Received) -> web.StreamResponse:
        if received.order_no == "SLOW":
            await slow.wait()
        return web.Response(status=410 if received.order_no == "GONE" else 204)

    receiver.respond = respond
    async with delivering(dsn, subscription_retry_seconds=retry_seconds) as client:
        added = await add(client, receiver)
        await client.webhook("SLOW")
        await receiver.wait_for_requests(1)
        await client.webhook("GONE")
        await settled(client, added, state="disabled", reason="gone")
        receiver.respond = refusing()
        await change(client, added, state="active")
        slow.set()
        await settled(client, added, state="active", held_orders=0, lag_events=0)


async def test_a_changed_url_outlives_a_410_of_the_old_one(dsn: str, receiver: Receiver) -> None:
    """An answer of the old endpoint does not stop the new one, and what it refused is attempted again."""
    gone = asyncio.Event()

    async def respond(received: Received) -> web.StreamResponse:
        if received.request.path == "/old":
            await gone.wait()
            return web.Response(status=410)
        return web.Response(status=204)

    receiver.respond = respond
    async with delivering(dsn) as client:
        added = await client.post("/subscriptions", 201, {"url": receiver.url.replace("/hooks", "/old")})
        await client.webhook("KOM1")
        await receiver.wait_for_requests(1)
        await change(client, added, url=receiver.url)
        gone.set()
        await receiver.wait_for(1)
        await settled(client, added, state="active", held_orders=0, lag_events=0)


async def test_changes_at_the_same_time_are_all_kept(dsn: str, receiver: Receiver) -> None:
    """Three operators change three members at once."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        for statuses in (["delivered"], []):
            await asyncio.gather(
                change(client, added, verdicts=["late"]),
                change(client, added, statuses=statuses),
                change(client, added, include=["body"]),
            )
            found = await client.get(path(added))
            assert (found["verdicts"], found["statuses"], found["include"]) == (["late"], statuses, ["body"])
            await change(client, added, verdicts=["advanced"], include=[])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "url is required"),
        ({"url": 1}, "url: 1: "),
        ({"url": "x"}, "'x' is not a URL"),
        ({"url": "https://@shop.example/"}, "user"),
        ({"url": "https://shop.example:0/"}, "is not a URL"),
        ({"verdicts": ["advance"]}, "verdicts: advance is unknown. Expected 'advanced',"),
        ({"verdicts": [{}]}, "verdicts: "),
        ({"verdicts": [[1]]}, "verdicts: "),
        ({"verdicts": None}, "verdicts: "),
        ({"statuses": ["shipped"]}, "statuses: shipped is unknown"),
        ({"name": "x"}, "name is unknown. Known members: from_position, from_time, url,"),
        ({"from_position": True}, "from_position: "),
        ({"from_position": "0"}, "from_position: '0': "),
        ({"from_time": "yesterday"}, "from_time: 'yesterday': "),
        ({"from_time": "2999-01-01T00:00:00Z"}, "lies in the future"),
    ],
)
async def test_an_invalid_declaration_is_explained(client: Client, body: Any, expected: str) -> None:
    """400 names the member, its value, and what was expected."""
    full = {"url": "https://8.8.8.8/", **body} if body else body
    problem = await client.post("/subscriptions", 400, full)
    assert problem["type"] == "/problems/bad-body"
    assert expected in problem["detail"]


async def test_an_invalid_change_is_explained(dsn: str, receiver: Receiver) -> None:
    """A change needs a member, and null is not a value."""
    async with delivering(dsn) as client:
        added = await add(client, receiver)
        for changes in ({}, {"state": None}, {"url": None, "state": "paused"}):
            problem = await change(client, added, 400, **changes)
            assert "at least one of url, verdicts, statuses, include, state" in problem["detail"]
        assert (await client.get(path(added)))["state"] == "active"


async def test_held_orders_of_a_log_that_went_back(
    dsn: str, receiver: Receiver, connection: Connection
) -> None:
    """After a loss, a held order whose event is gone is not held any more: its new events are sent."""
    receiver.respond = refusing("KOM1")
    async with delivering(dsn) as client:
        added = await add(client, receiver, verdicts=[])
        for order_no in ("KOM1", "KOM2", "KOM2"):
            await client.webhook(order_no)
        await settled(client, added, held_orders=1, lag_events=0)
        # As after a failover: the subscription and its held order lie beyond the head.
        await connection.execute(
            "UPDATE held_orders SET version = 3, position = 3000, next_attempt_at = NULL; "
            "UPDATE subscriptions SET position = 3000, report_id = 'lost', revision = revision + 1, "
            "generation = generation + 1"
        )
        await settled(client, added, state="paused", reason="log_went_back")
        receiver.respond = refusing()
        await change(client, added, state="active")
        for status in ("Dikirim", "Diterima"):
            await client.webhook("KOM1", status)
        await settled(client, added, held_orders=0, lag_events=0)
    assert receiver.places()[-2:] == [("KOM1", 2), ("KOM1", 3)]


@pytest.mark.attacks("connecting", "all")
async def test_too_many_subscriptions(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subscription beyond SUBSCRIPTIONS_MAX gets 409."""
    monkeypatch.setattr("service.features.subscriptions.subscription.SUBSCRIPTIONS_MAX", 1)
    async with serving_client(dsn, subscription_networks="127.0.0.0/8") as client:
        for status in (201, 409):
            await client.post("/subscriptions", status, {"url": "http://127.0.0.1:9/"})
