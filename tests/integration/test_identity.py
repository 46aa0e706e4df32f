"""Authentication of reports, reads and operations: tokens, signatures, API keys, and addresses
behind proxies.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from projections.postgres import Connection
from service.app import Service
from service.database import api_keys
from service.database.sessions import open_session
from service.features.settings import Settings
from service.http.access import SESSION_COOKIE
from service.http.auth_refusals import AuthRefusals
from service.ingest.webhook_auth import WebhookAuth
from tests.support.client import Client, serving_client
from tests.support.recording import running
from tests.support.waiting import until_async

pytestmark = pytest.mark.usefixtures("all_features")

OLD, NEW = "old-token-of-16-characters", "new-token-of-16-characters"
BODY = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
SECRET = "a-secret-of-16-characters"  # noqa: S105 - of a service that lives for one test
BAD_FIELDS = (
    "Content-Length: +2",
    "Content-Length: 1\r\nContent-Length: 2",
    "Bad Header",
    "Transfer-Encoding: gzip, chunked",
    "Expect: miracles",
    "Content-Encoding: x\r\nContent-Length: 0",
)


async def answered(
    client: Client, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    """Send a request unchanged on a new connection, and return the status and the whole response."""
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    fields += f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    answer = await client.talk(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode() + body)
    return int(answer.split(b" ", 2)[1]), answer


METHODS = ("PUT", "POST", "GET", "HEAD", "DELETE", "PATCH", "OPTIONS")
WRONG_PATHS = (
    "/webhook", "/webhook/", f"/webhook/{OLD[:-1]}", f"/webhook/{OLD}x", "/webhook/wr%C3%B6ng", "/webhook/%FF",
    f"/webhook/{OLD}//", f"/webhook/{OLD[:-1]}/", f"/webhook/x/{OLD}", f"//webhook/{OLD}",
    f"/webhook/../webhook/{OLD}",
)  # fmt: skip


async def test_a_wrong_token_is_an_unknown_path(dsn: str, connection: Connection) -> None:
    """With any method, a wrong token gets exactly the response of an unknown path, and nothing is recorded."""
    async with serving_client(dsn, webhook_tokens=f"{OLD},{NEW}") as client:
        for method in METHODS:
            _, unknown = await answered(client, method, "/nothing/here", BODY)
            for path in WRONG_PATHS:
                status, answer = await answered(client, method, path, BODY)
                assert (status, alike(answer)) == (404, alike(unknown)), (method, path)
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0


def alike(answer: bytes) -> list[bytes]:
    """Return the lines of a response except the time and the id of the request."""
    return [line for line in answer.split(b"\r\n") if not line.startswith((b"Date:", b"X-Request-Id:"))]


@pytest.mark.parametrize("token", [OLD, NEW])
async def test_two_tokens_are_live_during_a_rotation(dsn: str, token: str) -> None:
    """Both tokens are accepted, and only a path with a valid token gets 405 for another method."""
    async with serving_client(dsn, webhook_tokens=f"{OLD}, {NEW}") as client:
        for method, slash in (("PUT", ""), ("POST", ""), ("PUT", "/")):
            status, answer = await answered(client, method, f"/webhook/{token}{slash}", BODY)
            assert status == 200, answer
        status, answer = await answered(client, "GET", f"/webhook/{token}")
        assert status == 405
        assert b"\r\nAllow: POST,PUT\r\n" in answer


async def test_a_token_is_in_no_answer_and_no_log(dsn: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The token appears in no response and no log line, neither for valid nor for malformed requests."""
    async with serving_client(dsn, webhook_tokens=OLD) as client:
        answers = [
            await client.talk(f"PUT /webhook/{OLD} HTTP/1.1\r\nHost: localhost\r\n{bad}\r\n\r\n".encode())
            for bad in BAD_FIELDS
        ]
        answers.append((await answered(client, "PUT", f"/webhook/{OLD}", b"{"))[1])
        answers.append((await answered(client, "PATCH", f"/webhook/{OLD}"))[1])
        answers.append(await client.talk(f"BAD\x00 /webhook/{OLD} HTTP/9\r\n\r\n".encode()))
    assert all(answer and OLD.encode() not in answer for answer in answers)
    captured = capfd.readouterr()
    assert OLD not in captured.out + captured.err
    assert OLD not in repr(Settings(port=0, webhook_tokens=OLD))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("signature", "status"),
    [
        (lambda body: hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest(), 200),
        (lambda body: hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest().upper(), 200),
        (lambda body: hmac.new(b"another", body, hashlib.sha256).hexdigest(), 401),
        (lambda body: hmac.new(SECRET.encode(), body + b" ", hashlib.sha256).hexdigest(), 401),
        (lambda _: "", 401),
        (lambda _: "ü", 401),
    ],
    ids=["right", "in capitals", "of another secret", "of another body", "empty", "no ASCII"],
)
async def test_a_signature_is_required_if_a_secret_is_set(
    dsn: str, connection: Connection, signature: Any, status: int
) -> None:
    """A wrong or missing signature gets 401, and nothing is recorded or quarantined."""
    async with serving_client(dsn, webhook_hmac_secret=SECRET) as client:
        for body in (BODY, b"not json"):
            got, _ = await answered(client, "PUT", "/webhook", body, X_Callback_Api_Key=signature(body))
            assert got == status
    counts = "SELECT (SELECT count(*) FROM order_events) + (SELECT count(*) FROM quarantine)"
    assert await connection.fetchval(counts) == (2 if status == 200 else 0)


async def test_the_signature_may_stand_in_another_header(dsn: str) -> None:
    """The operator can choose the header of the signature; a request without that header is refused."""
    signature = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
    async with serving_client(dsn, webhook_hmac_secret=SECRET, webhook_hmac_header="X-Signature") as client:
        assert (await answered(client, "PUT", "/webhook", BODY, X_Signature=signature))[0] == 200
        assert (await answered(client, "PUT", "/webhook", BODY, X_Callback_Api_Key=signature))[0] == 401
        assert (await answered(client, "PUT", "/webhook", BODY))[0] == 401


def all_routes(service: Service) -> list[tuple[str, str, str | None]]:
    """Return method, path and scope of every route; the scope is None if the route requires no key."""
    found = []
    for route in service.make_app(65_536).router.routes():
        path = route.resource.canonical if route.resource is not None else "?"
        found.append((route.method, path, getattr(route.handler, "scope", None)))
    return found


SUBSCRIPTION = "/subscriptions/{subscription_id}"
DELIVERIES = "/deliveries/{subscription_id}"


async def test_every_route_requires_a_key_of_its_scope(dsn: str, connection: Connection) -> None:
    """Every route with a scope returns 401 without a key and 403 with a key of a lesser scope."""
    read = await api_keys.create_key(connection, "reader", "read", None)
    admin = await api_keys.create_key(connection, "operator", "admin", None)
    async with serving_client(dsn) as client:
        async with running(Settings(port=0), dsn) as service:
            routes = all_routes(service)
        assert {(method, path) for method, path, scope in routes if scope is None and method != "HEAD"} == {
            ("*", "/webhook"), ("*", "/webhook/"), ("GET", "/livez"), ("GET", "/readyz"),
            # What says nothing of any order: the contract, and how a browser gives its key.
            ("GET", "/openapi.json"), ("GET", "/problems/{slug}"),
            ("GET", "/static/{name}"), ("POST", "/session"),
            # The path itself proves that a buyer may read one order.
            ("GET", "/t/{token}"),
        }  # fmt: skip
        assert {path for _, path, scope in routes if scope == "admin"} == {
            "/quarantine/{quarantine_id}/retry", "/quarantine/{quarantine_id}/discard",
            "/quarantined/{quarantine_id}/retry", "/quarantined/{quarantine_id}/discard",
            "/audit/operations", "/audit/operations.csv", "/operations",
            "/orders/{order_no}/contradictions/{version}/handle",
            "/track/{order_no}/contradictions/{version}/handle",
            "/shares/{share}", "/subscriptions", SUBSCRIPTION, f"{SUBSCRIPTION}/test", f"{SUBSCRIPTION}/replay",
            f"{SUBSCRIPTION}/rotate-secret", f"{SUBSCRIPTION}/held",
            f"{SUBSCRIPTION}/held/{{order_no}}/retry", f"{SUBSCRIPTION}/held/{{order_no}}/skip",
            "/deliveries", f"{DELIVERIES}/test", f"{DELIVERIES}/pause", f"{DELIVERIES}/resume",
            f"{DELIVERIES}/held/{{order_no}}/retry", f"{DELIVERIES}/held/{{order_no}}/skip",
        }  # fmt: skip
        for method, pattern, scope in routes:
            if pattern == "/session":
                continue  # its body is the key
            path = pattern.replace("{order_no}", "KOM1").replace("{quarantine_id}", "1")
            path = path.replace("{slug}", "parked").replace("{version}", "1")
            path = path.replace("{subscription_id}", "1")
            bare = await refusal(client, method, path, None)
            assert bare == (401 if scope else None), (method, path)
            assert await refusal(client, method, path, read) == (403 if scope == "admin" else None), (
                method,
                path,
            )
            assert await refusal(client, method, path, admin) is None, (method, path)


async def refusal(client: Client, method: str, path: str, key: str | None) -> int | None:
    """Return the status of a refusal because of the key, or None if the request was let through."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with client.session.request(method, client.url(path), headers=headers) as answer:
        if answer.status not in {401, 403}:
            return None
        if answer.content_type == "text/html":
            # A page shows a form for the key.
            return answer.status
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        if method != "HEAD":
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert json.loads(await answer.read())["status"] == answer.status
        return answer.status


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "{key}", "Bearer {key} x", "Bearer ü"]
)
async def test_only_a_whole_bearer_key_counts(dsn: str, connection: Connection, header: str) -> None:
    """Only a complete bearer key is accepted; anything else in the header gets 401."""
    key = await api_keys.create_key(connection, "reader", "read", None)
    async with serving_client(dsn) as client:
        assert (await answered(client, "GET", "/orders", Authorization=header.format(key=key)))[0] == 401
        assert (await answered(client, "GET", "/orders", Authorization=f"bearer  {key} "))[0] == 200


async def test_without_keys_it_is_open_to_this_machine_only(dsn: str) -> None:
    """Before the first key exists, a service on loopback without a proxy is open; any other service
    is closed.
    """
    async with serving_client(dsn) as client:
        await client.get("/orders")
    for settings in ({"host": "0.0.0.0"}, {"trusted_proxies": "127.0.0.1/32"}):  # noqa: S104 - the case
        async with serving_client(dsn, **settings) as client:
            problem = await client.get("/orders", 401)
            assert "keys create" in problem["detail"]
            await client.get("/livez")
            await client.get("/readyz")


@pytest.mark.parametrize("lifetime", [None, timedelta(days=1)])
async def test_a_revoked_or_expired_key_is_refused(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch, lifetime: timedelta | None
) -> None:
    """A revoked or expired key is refused, and revoking the only key does not open the service again."""
    monkeypatch.setattr("service.http.access.CACHE_SECONDS_MAX", 0.0)
    expires_at = None if lifetime is None else datetime.now(UTC) + lifetime
    key = await api_keys.create_key(connection, "one", "read", expires_at)
    late = await api_keys.create_key(connection, "late", "read", datetime.now(UTC) - timedelta(seconds=1))
    async with serving_client(dsn) as client:
        await client.get("/orders", 200, {"Authorization": f"Bearer {key}"})
        _, headers = await client.get_with_headers("/orders", 401, {"Authorization": f"Bearer {late}"})
        assert 'error="invalid_token"' in headers["WWW-Authenticate"]
        assert await api_keys.revoke_key(connection, "one")
        assert not await api_keys.revoke_key(connection, "one")
        await client.get("/orders", 401, {"Authorization": f"Bearer {key}"})
        await client.get("/orders", 401)


async def test_a_remembered_key_has_its_scope_and_its_end(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was admitted a moment ago is still refused beyond its scope, and from its expiry on."""
    monkeypatch.setattr("service.http.access.CACHE_SECONDS_MAX", 3_600.0)
    reader = await api_keys.create_key(connection, "reader", "read", None)
    expires_at = datetime.now(UTC) + timedelta(seconds=1)
    short = await api_keys.create_key(connection, "short", "read", expires_at)
    async with serving_client(dsn) as client:
        for _ in range(2):
            await client.get("/orders", 200, {"Authorization": f"Bearer {reader}"})
            await client.get("/audit/operations", 403, {"Authorization": f"Bearer {reader}"})

        async def is_refused() -> bool:
            return await client.status("GET", "/orders", headers={"Authorization": f"Bearer {short}"}) == 401

        await until_async(is_refused)
        assert datetime.now(UTC) >= expires_at


@pytest.mark.parametrize("field", ["Bad Header", "Transfer-Encoding: gzip, chunked", "Content-Length: 1, 2"])
async def test_a_malformed_request_also_gets_a_request_id(dsn: str, field: str) -> None:
    """Even a malformed request gets a request id, which its sender can refer to."""
    async with serving_client(dsn) as client:
        answer = await client.talk(f"PUT /webhook HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n".encode())
    assert answer.split(b" ", 2)[1] == b"400"
    assert b"X-Request-Id: " in answer


async def test_a_new_key_is_good_at_once(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new key works at once, because the service reads the keys again before it refuses one."""
    monkeypatch.setattr("service.http.access.CACHE_SECONDS_MAX", 3_600.0)
    first = await api_keys.create_key(connection, "first", "read", None)
    async with serving_client(dsn) as client:
        await client.get("/orders", 200, {"Authorization": f"Bearer {first}"})
        second = await api_keys.create_key(connection, "second", "read", None)
        headers = {"Authorization": f"Bearer {second}"}

        async def is_taken() -> bool:
            return await client.status("GET", "/orders", headers=headers) == 200

        await until_async(is_taken)
        await client.get("/orders", 401, {"Authorization": "Bearer otk_other"})


async def test_the_database_has_only_the_hash_and_the_last_use_to_the_minute(
    dsn: str, connection: Connection
) -> None:
    """The database contains only the key's hash, and repeated uses within a minute write only once."""
    key = await api_keys.create_key(connection, "one", "read", None)
    assert await connection.fetchval("SELECT last_used_at FROM api_keys") is None
    async with serving_client(dsn) as client:
        await client.get("/orders", 200, {"Authorization": f"Bearer {key}"})
        await until_async(lambda: connection.fetchval("SELECT last_used_at IS NOT NULL FROM api_keys"))
        first = await connection.fetchrow("SELECT last_used_at, xmin::text, api_keys::text FROM api_keys")
        assert first is not None
        assert first[0] is not None
        assert key.removeprefix("otk_") not in first[2]
        await client.get("/orders", 200, {"Authorization": f"Bearer {key}"})
        assert await connection.fetchval("SELECT xmin::text FROM api_keys") == first[1]


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 101])
async def test_a_key_has_a_name_that_can_be_shown(connection: Connection, name: str) -> None:
    """The name of a key must be printable, because the operator revokes the key by it."""
    with pytest.raises(api_keys.InvalidKeyError):
        await api_keys.create_key(connection, name, "read", None)


async def test_a_name_is_used_once(connection: Connection) -> None:
    """The name of a key cannot be reused, even after it was revoked, so that its uses stay attributable."""
    await api_keys.create_key(connection, "one", "read", None)
    await api_keys.revoke_key(connection, "one")
    with pytest.raises(api_keys.InvalidKeyError):
        await api_keys.create_key(connection, "one", "admin", None)


async def test_another_sites_page_cannot_operate(dsn: str) -> None:
    """On an open service, a browser's request from another site is refused."""
    async with serving_client(dsn) as client:
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 404), ("none", 404)):
            got, _ = await answered(client, "POST", "/quarantine/1/retry", Sec_Fetch_Site=site)
            assert got == status


PROXIES = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"), ip_network("127.0.0.1")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["6.6.6.6", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.2, 10.0.0.3"], "198.51.100.1"),
        ("10.0.0.1", ["10.0.0.3,10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.1, rubbish"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, rubbish, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("2001:db8::1", ["2001:470::7"], "2001:470::7"),
        ("10.0.0.1", ["6.6.6.6," * 100_000 + "198.51.100.1"], "198.51.100.1"),
        (None, ["198.51.100.1"], None),
        ("", ["198.51.100.1"], ""),
    ],
)
def test_the_address_is_the_rightmost_untrusted_one(
    peer: str | None, forwarded: Sequence[str], address: str | None
) -> None:
    """Addresses from untrusted proxies are ignored, and the search ends at the first invalid address."""
    headers = CIMultiDict([("X-Forwarded-For", value) for value in forwarded])
    request = make_mocked_request("PUT", "/webhook", headers).clone(remote=peer or "")
    sender = WebhookAuth({}, None, PROXIES, AuthRefusals(PROXIES))
    assert sender.check_request(request).address == (address or "")


async def test_the_event_has_the_address_behind_the_proxy(dsn: str) -> None:
    """The event has the address from X-Forwarded-For only if the peer is a trusted proxy."""
    for proxies, address in (("127.0.0.0/8", "198.51.100.1"), ("10.0.0.0/8", "127.0.0.1")):
        async with serving_client(dsn, trusted_proxies=proxies) as client:
            status, answer = await answered(client, "PUT", "/webhook", BODY, X_Forwarded_For="198.51.100.1")
            assert status == 200, answer
        async with serving_client(dsn) as client:
            (event,) = (await client.get("/events?limit=1000"))["events"][-1:]
            assert event["data"]["remote"] == address


async def test_an_open_service_refuses_foreign_hosts_and_origins(dsn: str) -> None:
    """An open service refuses requests with a foreign Host, and reports from pages of other sites."""
    async with serving_client(dsn) as client:
        for host, status in (
            ("evil.example:8080", 403),
            ("localhost:8080", 200),
            ("[::1]:80", 200),
            ("127.0.0.2", 200),
        ):
            request = f"GET /orders HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            assert (await client.talk(request)).split(b" ", 2)[1] == b"%d" % status
        for headers, status in (
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Sec_Fetch_Site": "cross-site"}, 403),
            ({"Origin": "http://localhost"}, 200),
        ):
            got, answer = await answered(client, "POST", "/webhook", BODY, **headers)
            assert got == status, answer


async def test_an_unrecorded_use_of_a_key_does_not_block_requests(dsn: str, connection: Connection) -> None:
    """While another connection locks the table of keys, requests with a valid key still succeed."""
    key = await api_keys.create_key(connection, "one", "read", None)
    async with serving_client(dsn, request_seconds_max=1.0) as client, connection.transaction():
        await connection.execute("SELECT FROM api_keys FOR UPDATE")
        for _ in range(5):
            await client.get("/orders", 200, {"Authorization": f"Bearer {key}"})


async def test_a_header_takes_precedence_over_a_session(dsn: str, connection: Connection) -> None:
    """A wrong key in the header is refused although the cookie names a session."""
    await api_keys.create_key(connection, "one", "admin", None)
    cookie = f"{SESSION_COOKIE}={await open_session(connection, 'one')}"
    async with serving_client(dsn) as client:
        assert (await answered(client, "GET", "/orders", Cookie=cookie))[0] == 200
        assert (await answered(client, "GET", "/orders", Cookie=cookie, Authorization="Bearer x"))[0] == 401
