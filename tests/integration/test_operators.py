"""Operators: their browser sessions, the record of their actions, and the log of refused requests."""

import os
import pwd
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.database import api_keys, sessions
from service.database.operations import Actor, operations_page, record_openness, system_user
from service.http.access import HOST_PREFIX, SESSION_COOKIE
from service.maintenance.check import check_database
from tests.support.client import Client, serving_client
from tests.support.waiting import until_async

TOKEN = "a-token-of-16-characters"  # noqa: S105 - of a service that lives for one test
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


async def signed_in(client: Client, key: str, host: str = "localhost", **headers: str) -> tuple[int, str]:
    """Submit the form with a key, and return the status and the cookie of the response."""
    async with client.session.post(
        client.url("/session"), data={"key": key}, headers={"Host": host, **headers}, allow_redirects=False
    ) as answer:
        return answer.status, answer.headers.get("Set-Cookie", "")


def session_of(cookie: str) -> dict[str, str]:
    """Return the header that sends a cookie back."""
    return {"Cookie": cookie.partition(";")[0], "Host": "localhost"}


async def test_a_session_is_a_random_id_of_which_the_database_has_the_hash(
    dsn: str, connection: Connection
) -> None:
    """The cookie holds neither the key nor anything that the database holds."""
    key = await api_keys.create_key(connection, "dashboard", "read", None)
    async with serving_client(dsn) as client:
        status, cookie = await signed_in(client, key)
        assert status == 303
        assert key not in cookie
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        session_id = cookie.partition("=")[2].partition(";")[0]
        (row,) = await connection.fetch("SELECT sessions::text AS row FROM sessions")
        assert session_id not in row["row"]
        await client.get("/orders", 200, session_of(cookie))
        assert (await signed_in(client, key))[1] != cookie


@pytest.mark.parametrize(
    ("host", "name", "is_secure"),
    [
        ("localhost:8080", SESSION_COOKIE, False),
        ("127.0.0.1", SESSION_COOKIE, False),
        ("tracking.example", HOST_PREFIX + SESSION_COOKIE, True),
        ("192.0.2.1:8080", HOST_PREFIX + SESSION_COOKIE, True),
    ],
)
async def test_the_cookie_needs_https_except_on_this_machine(
    dsn: str, connection: Connection, host: str, name: str, is_secure: Any
) -> None:
    """Whatever a proxy says of the protocol, only a loopback host gets a cookie that http may carry."""
    key = await api_keys.create_key(connection, "dashboard", "read", None)
    async with serving_client(dsn) as client:
        for headers in ({}, {"X-Forwarded-Proto": "http"}):
            _, cookie = await signed_in(client, key, host, **headers)
            assert cookie.startswith(f"{name}=")
            assert ("Secure" in cookie) == is_secure
            assert "Path=/" in cookie
            assert "Domain" not in cookie
        # A cookie without the prefix may come from another host of the domain.
        plain = f"{SESSION_COOKIE}={cookie.partition('=')[2].partition(';')[0]}"
        status = await client.status("GET", "/orders", headers={"Cookie": plain, "Host": host})
        assert (status == 401) == is_secure


async def test_leaving_ends_the_session_on_the_server(dsn: str, connection: Connection) -> None:
    """After signing out, the old cookie is useless, also to someone who has copied it."""
    key = await api_keys.create_key(connection, "dashboard", "read", None)
    async with serving_client(dsn) as client:
        _, cookie = await signed_in(client, key)
        headers = session_of(cookie)
        await client.get("/orders", 200, headers)
        # The redirect leads to the form for a key.
        assert await client.status("POST", "/session", b"forget=1", {**headers, **FORM}) == 401
        problem = await client.get("/orders", 401, headers)
        assert problem["detail"] == "the session has ended: sign in again"
    assert await connection.fetchval("SELECT count(*) FROM sessions") == 0


@pytest.mark.parametrize("column", ["used_at", "opened_at"])
async def test_an_idle_or_old_session_ends(dsn: str, connection: Connection, column: str) -> None:
    """A session ends after twelve idle hours, and after seven days in any case."""
    await api_keys.create_key(connection, "dashboard", "read", None)
    session_id = await sessions.open_session(connection, "dashboard")
    age = {"used_at": sessions.IDLE_MAX, "opened_at": sessions.DURATION_MAX}[column]
    headers = {"Cookie": f"{SESSION_COOKIE}={session_id}", "Host": "localhost"}
    for more, status in ((timedelta(minutes=-5), 200), (timedelta(minutes=5), 401)):
        await connection.execute(
            f"UPDATE sessions SET {column} = now() - $1::interval", age + more  # noqa: S608 - a column of ours
        )  # fmt: skip
        async with serving_client(dsn) as client:
            await client.get("/orders", status, headers)


async def test_a_used_session_stays(dsn: str, connection: Connection) -> None:
    """A use is recorded, to the minute."""
    await api_keys.create_key(connection, "dashboard", "read", None)
    session_id = await sessions.open_session(connection, "dashboard")
    await connection.execute("UPDATE sessions SET used_at = now() - interval '1 hour'")
    async with serving_client(dsn) as client:
        await client.get("/orders", 200, {"Cookie": f"{SESSION_COOKIE}={session_id}", "Host": "localhost"})
        is_recent = "SELECT used_at > now() - interval '1 minute' FROM sessions"
        await until_async(partial(connection.fetchval, is_recent))


async def test_a_revoked_key_ends_its_sessions(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Revoking a key ends the sessions that it opened, although their rows may still be there."""
    monkeypatch.setattr("service.http.access.CACHE_SECONDS_MAX", 0.0)
    key = await api_keys.create_key(connection, "dashboard", "admin", None)
    await api_keys.create_key(connection, "other", "admin", None)
    async with serving_client(dsn) as client:
        _, cookie = await signed_in(client, key)
        await client.get("/orders", 200, session_of(cookie))
        await api_keys.revoke_key(connection, "dashboard")
        await client.get("/orders", 401, session_of(cookie))


async def test_a_further_session_ends_the_oldest_of_its_key(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of sessions of a key is limited, so that one key can neither fill the table nor end others."""
    monkeypatch.setattr(sessions, "SESSIONS_PER_KEY_MAX", 2)
    for name in ("dashboard", "other"):
        await api_keys.create_key(connection, name, "read", None)
    other = await sessions.open_session(connection, "other")
    ids = [await sessions.open_session(connection, "dashboard") for _ in range(3)]
    assert len(await sessions.list_sessions(connection)) == 3
    assert await sessions.end_session(connection, ids[0]) is None
    assert await sessions.end_session(connection, ids[2]) == "dashboard"
    assert await sessions.end_session(connection, other) == "other"


async def quarantined(client: Client, path: str = "/webhook") -> int:
    """Send an unparseable body, and return the id of its entry."""
    async with client.session.put(client.url(path), data=b'{"order_no":"KOM1","state":1}') as answer:
        number: int = (await answer.json())["quarantine_id"]
        return number


@pytest.mark.parametrize("scope", ["read", "admin"])
async def test_a_session_operates_from_the_own_pages_alone(
    dsn: str, connection: Connection, scope: Any
) -> None:
    """A session of the scope admin may write, but only by a form of this service's own page."""
    key = await api_keys.create_key(connection, "dashboard", scope, None)
    async with serving_client(dsn) as client:
        number = await quarantined(client)
        headers = {**session_of((await signed_in(client, key))[1]), **FORM}
        form = f"/quarantined/{number}/discard"
        upper = {**headers, "Host": "LOCALHOST", "Origin": "http://localhost"}
        assert await client.status("POST", form, b"reason=+", upper) == (400 if scope == "admin" else 403)
        foreign: tuple[dict[str, str], ...] = (
            {},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Referer": "http://evil.example/"},
        )
        for origin in foreign:
            assert await client.status("POST", form, b"reason=x", {**headers, **origin}) == 403
        own = {**headers, "Origin": "http://localhost"}
        done = await client.status("POST", form, b"reason=sent+as+a+test", own)
        assert done == (200 if scope == "admin" else 403)
        again = await client.status("POST", form, b"reason=again", own)
        assert again == (409 if scope == "admin" else 403)
        empty = await client.status("POST", form, b"reason=+", own)
        assert empty == (400 if scope == "admin" else 403)
    (found,) = await connection.fetch("SELECT state, discard_reason FROM quarantine")
    assert tuple(found) == (("discarded", "sent as a test") if scope == "admin" else ("open", None))


async def test_what_operators_did_is_recorded(dsn: str, connection: Connection) -> None:
    """Each action over HTTP is recorded with its actor, and the operators read them, newest first."""
    key = await api_keys.create_key(connection, "desk", "admin", None)
    reader = await api_keys.create_key(connection, "reader", "read", None)
    bearer = {"Authorization": f"Bearer {key}"}
    async with serving_client(dsn) as client:
        first, second = await quarantined(client), 0
        async with client.session.put(client.url("/webhook"), data=b'{"order_no":"KOM1"}') as answer:
            second = (await answer.json())["quarantine_id"]
        await client.get("/audit/operations", 403, {"Authorization": f"Bearer {reader}"})
        with capture_logs() as lines:
            path = f"/quarantine/{first}/discard"
            assert await client.status("POST", path, b'{"reason":"a test"}', bearer) == 200
        (line,) = [line for line in lines if line["event"] == "operator's action"]
        assert line["actor"] == "desk"
        # What was refused is not an action.
        assert await client.status("POST", path, b'{"reason":"again"}', bearer) == 409
        assert await client.status("POST", f"/quarantine/{second}/retry", b"", bearer) == 422
        await connection.execute(
            """UPDATE quarantine SET body = '{"order_no":"KOM1","status":"Dikirim"}' WHERE state = 'open'"""
        )
        assert await client.status("POST", f"/quarantine/{second}/retry", b"", bearer) == 200
        _, cookie = await signed_in(client, key)
        assert await client.status("POST", "/session", b"forget=1", {**session_of(cookie), **FORM}) == 401
        page = await client.get("/audit/operations", 200, bearer)
        actions = [
            {name: value for name, value in one.items() if name not in {"operation_id", "performed_at"}}
            for one in page["operations"]
        ]
        assert actions == [
            {"via": "page", "actor": "desk", "action": "session_ended", "subject": "desk", "reason": None},
            {"via": "page", "actor": "desk", "action": "session_opened", "subject": "desk", "reason": None},
            {"via": "api", "actor": "desk", "action": "entry_retried", "subject": str(second), "reason": None},
            {
                "via": "api",
                "actor": "desk",
                "action": "entry_discarded",
                "subject": str(first),
                "reason": "a test",
            },
        ]
        filtered = await client.get("/audit/operations?action=entry_retried&limit=1", 200, bearer)
        assert [one["subject"] for one in filtered["operations"]] == [str(second)]
        # The record is not a view, so a position of the log means nothing to it.
        await client.get("/audit/operations?after_position=1", 400, bearer)
        html = {**bearer, "Accept": "text/html"}
        async with client.session.get(client.url("/operations?lang=en"), headers=html) as answer:
            text = await answer.text()
        assert "Entry discarded" in text
        assert "a test" in text
        async with client.session.get(client.url("/audit/operations.csv"), headers=bearer) as answer:
            assert "entry_retried" in await answer.text()


async def test_the_service_cannot_change_the_record(connection: Connection) -> None:
    """The role of the service can neither change nor remove an operator's action, nor bring a key back."""
    await api_keys.create_key(connection, "one", "read", None)
    await api_keys.revoke_key(connection, "one")
    await record_openness(connection, Actor("cli", "root"), "webhook", "why")
    await connection.execute("SET ROLE order_tracking_service")
    for statement in (
        "UPDATE operations SET reason = NULL",
        "DELETE FROM operations",
        "INSERT INTO operations (performed_at, via, action, subject) VALUES (now(), 'cli', 'x', 'y')",
        "UPDATE api_keys SET revoked_at = NULL",
        "UPDATE api_keys SET revoked_at = now() + interval '1 day'",
        "DELETE FROM api_keys",
    ):
        with pytest.raises(Exception, match=r"permission denied|is revoked, which is permanent"):
            await connection.execute(statement)
    await connection.execute("RESET ROLE")


async def test_check_finds_that_a_revoked_key_could_come_back(dsn: str, connection: Connection) -> None:
    """A trigger that was disabled by hand is WRONG."""
    await connection.execute("ALTER TABLE api_keys DISABLE TRIGGER api_keys_stay_revoked")
    wrong = [finding.text for finding in await check_database(dsn) if finding.kind == "WRONG"]
    assert [
        text for text in wrong if "state of trigger api_keys_stay_revoked of api_keys is 'disabled'" in text
    ]


def test_the_environment_does_not_name_the_actor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The actor of a command is the user of its process, and who logged in, whatever its environment."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "SUDO_USER", "SUDO_UID"):
        monkeypatch.setenv(name, "somebody-else")
    user, other = (
        pwd.getpwuid(os.getuid()).pw_name,
        next(one for one in pwd.getpwall() if one.pw_uid != os.getuid()),
    )
    login = tmp_path / "loginuid"
    monkeypatch.setattr("service.database.operations.LOGIN_UID", login)
    for content, actor in (
        (None, user),
        (str(2**32 - 1), user),
        (str(os.getuid()), user),
        (str(other.pw_uid), f"{user}, logged in as {other.pw_name}"),
        ("4294967000", f"{user}, logged in as uid 4294967000"),
    ):
        if content is not None:
            login.write_text(content, encoding="ascii")
        assert system_user() == Actor("cli", actor)


async def test_an_opened_setting_is_recorded_when_it_changes(connection: Connection) -> None:
    """A start with the same open setting as the last one adds nothing; closing and opening it again does."""
    for reason in (None, "a", "a", "b", None, None, "b"):
        await record_openness(connection, Actor("service", "root"), "webhook", reason)
    actions = [one["action"] for one in await operations_page(connection, 2**63 - 1, None, 10)]
    assert actions == ["setting_opened", "setting_closed", "setting_opened", "setting_opened"]


async def test_refused_requests_are_counted_and_logged_once(dsn: str, connection: Connection) -> None:
    """Each refusal is counted by its cause; one line a minute has the address, and none a secret."""
    key = await api_keys.create_key(connection, "reader", "read", None)
    secret = "a-secret-of-16-characters"  # noqa: S105
    with capture_logs() as lines:
        async with serving_client(
            dsn, webhook_tokens=TOKEN, webhook_hmac_secret=secret, trusted_proxies="127.0.0.1/32"
        ) as client:
            forwarded = {"X-Forwarded-For": "[::ffff:198.51.100.7]:4711"}
            bearer = {"Authorization": f"Bearer {key}"}
            for method, path, headers, status in (
                ("PUT", "/webhook/another-token-of-16", forwarded, 404),
                ("PUT", f"/webhook/{TOKEN}", {}, 401),
                ("GET", "/orders", {}, 401),
                ("GET", "/orders", {"Authorization": "Bearer otk_wrong"}, 401),
                ("GET", "/audit/operations", bearer, 403),
                ("GET", "/orders", {**bearer, "Sec-Fetch-Site": "cross-site"}, 403),
                ("GET", "/orders", {"Cookie": f"{SESSION_COOKIE}=gone"}, 401),
                ("GET", "/orders", bearer, 200),
            ):
                assert await client.status(method, path, b"{}" if method == "PUT" else None, headers) == status
            async with client.session.get(client.url("/metrics"), headers=bearer) as answer:
                metrics = await answer.text()
    for cause in (
        "wrong_token",
        "wrong_signature",
        "no_key",
        "unknown_key",
        "scope",
        "other_site",
        "ended_session",
    ):
        assert f'auth_refusals_total{{cause="{cause}"}} 1.0' in metrics
    (line,) = [line for line in lines if line["event"] == "requests are refused"]
    assert (line["cause"], line["address"]) == ("wrong_token", "198.51.100.7")
    assert TOKEN not in str(lines)
    assert "another-token" not in str(lines)


async def test_the_name_of_a_token_is_in_the_event(dsn: str) -> None:
    """What came by a token that was stolen can be found by the token's name; a token may have none."""
    other = "another-token-of-16"
    async with serving_client(dsn, webhook_tokens=f"shop:{TOKEN},{other}") as client:
        for path, body in (
            (f"/webhook/{TOKEN}", b'{"order_no":"KOM1","status":"Dikirim"}'),
            (f"/webhook/{other}", b'{"order_no":"KOM2","status":"Dikirim"}'),
        ):
            assert await client.status("PUT", path, body) == 200
        assert await client.status("PUT", f"/webhook/shop:{TOKEN}", b"{}") == 404
    async with serving_client(dsn) as client:
        events = (await client.get("/events"))["events"]
    assert [event["data"].get("token_name") for event in events] == ["shop", None]
    assert "token_name" not in events[1]["data"]


async def test_the_trace_of_a_request_is_in_the_event(client: Client) -> None:
    """A valid traceparent is recorded with the report; an invalid one is ignored."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for traceparent in (trace, "00-" + 32 * "0" + "-00f067aa0ba902b7-01", "nonsense"):
        await client.raw(b'{"order_no":"KOM1","status":"Dikirim"}', traceparent=traceparent)
    events = (await client.get("/events"))["events"]
    assert [event["data"].get("traceparent") for event in events] == [trace, None, None]
