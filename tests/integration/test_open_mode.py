"""The open mode: without a token, a secret and a key, a service is open to its own machine alone."""

from typing import Any

import pytest

from projections.postgres import Connection
from service.database import api_keys
from service.features.settings import Settings
from service.maintenance.check import check_keys, check_webhook
from tests.support.client import Client, serving_client

TOKEN = "a-token-of-16-characters"  # noqa: S105 - of a service that lives for one test
SECRET = "a-secret-of-16-characters"  # noqa: S105
BODY = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
# What a stock proxy adds to each request.
FORWARDING = (
    "X-Forwarded-For: 198.51.100.1",
    "X-Forwarded-Proto: https",
    "x-forwarded-host: tracking.example",
    "Forwarded: for=198.51.100.1",
    "X-Real-IP: 198.51.100.1",
    "Via: 1.1 proxy",
    "X-Forwarded-Ssl: on",
    "CF-Connecting-IP: 198.51.100.1",
    # nginx with the one line proxy_pass: it adds no header, and speaks HTTP/1.0.
    "HTTP/1.0",
)
READS = ("/", "/orders", "/events", "/quarantine", "/metrics", "/orders/KOM1/timeline")


async def asked(client: Client, method: str, path: str, *fields: str, body: bytes = b"") -> int:
    """Send a request with these header lines on a connection of its own, and return the status."""
    version = "HTTP/1.0" if "HTTP/1.0" in fields else "HTTP/1.1"
    others = [field for field in fields if field != version]
    lines = [f"{method} {path} {version}", *others, "Connection: close", f"Content-Length: {len(body)}"]
    if not any(field.startswith("Host:") for field in fields):
        lines.insert(1, "Host: localhost")
    answer = await client.talk("\r\n".join([*lines, "", ""]).encode() + body)
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("settings", [{"webhook_tokens": TOKEN}, {"webhook_hmac_secret": SECRET}], ids=str)
async def test_a_token_or_a_secret_ends_the_open_mode(dsn: str, settings: dict[str, str]) -> None:
    """Who protects the webhook expects strangers, so nothing is read without a key."""
    async with serving_client(dsn, **settings) as client:
        for path in READS:
            assert await asked(client, "GET", path) == 401, path
        assert await asked(client, "GET", "/readyz") == 200
        problem = await client.get("/orders", 401)
        assert "order-tracking keys create" in problem["detail"]


@pytest.mark.parametrize("field", FORWARDING)
async def test_the_open_mode_refuses_what_came_through_a_proxy(
    dsn: str, connection: Connection, field: str
) -> None:
    """A proxy on this machine passes on strangers' requests, with a loopback Host: none of them is admitted."""
    async with serving_client(dsn) as client:
        for path in READS:
            assert await asked(client, "GET", path, field) == 403, path
        assert await asked(client, "POST", "/quarantine/1/discard", field) == 403
        assert await asked(client, "PUT", "/webhook", field, body=BODY) == 403
        assert await asked(client, "GET", "/livez", field) == 200
        assert await asked(client, "PUT", "/webhook", body=BODY) == 200
        assert await asked(client, "GET", "/orders/KOM1/events") == 200
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 1


async def test_an_open_webhook_refuses_a_foreign_host_name(dsn: str, connection: Connection) -> None:
    """A site that points its host name at this machine (DNS rebinding) can neither write nor read a receipt.

    A key for the reads does not change this: the webhook has no token.
    """
    for has_key in (False, True):
        if has_key:
            await api_keys.create_key(connection, "one", "read", None)
        async with serving_client(dsn) as client:
            assert await asked(client, "PUT", "/webhook", "Host: evil.example:8080", body=BODY) == 403
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0
    async with serving_client(dsn, webhook_tokens=TOKEN) as client:
        assert await asked(client, "PUT", f"/webhook/{TOKEN}", "Host: tracking.example", body=BODY) == 200


async def test_another_site_learns_nothing_of_an_order(dsn: str) -> None:
    """A page of another site cannot tell by a hidden request whether an order exists; a link works."""
    site, page = "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"
    async with serving_client(dsn) as client:
        for order_no in ("KOM1", "KOM2"):
            path = f"/track/{order_no}"
            assert await asked(client, "GET", path, site, "Sec-Fetch-Mode: no-cors") == 403
            assert await asked(client, "GET", path, site, page, "Sec-Fetch-Dest: iframe") == 403
            assert await asked(client, "GET", path, site, page, "Sec-Fetch-Dest: document") == 404
        for referer, status in (("http://evil.example/x", 403), ("http://localhost/quarantined/1", 404)):
            got = await asked(client, "POST", "/quarantine/1/retry", f"Referer: {referer}")
            assert got == status


@pytest.mark.parametrize(
    ("settings", "has_key", "kinds"),
    [
        ({}, False, {"note"}),
        ({}, True, {"note", "ok", "WRONG"}),
        ({"webhook_tokens": TOKEN}, False, {"ok", "WRONG"}),
        ({"webhook_hmac_secret": SECRET}, False, {"ok", "WRONG"}),
        ({"webhook_tokens": TOKEN}, True, {"ok"}),
        ({"host": "0.0.0.0"}, True, {"WRONG", "ok"}),  # noqa: S104 - the case
        ({"trusted_proxies": "127.0.0.1/32"}, True, {"WRONG", "ok"}),
        ({"host": "0.0.0.0", "webhook_tokens": TOKEN}, False, {"ok", "WRONG"}),  # noqa: S104
    ],
)
async def test_check_names_what_is_open(
    connection: Connection, settings: dict[str, str], has_key: Any, kinds: set[str]
) -> None:
    """Whatever is open against the settings is WRONG, with the command or the setting that closes it."""
    if has_key:
        await api_keys.create_key(connection, "one", "read", None)
    chosen = Settings(**settings)  # type: ignore[arg-type]
    findings = [check_webhook(chosen), *await check_keys(connection, is_open=chosen.is_open)]
    assert {finding.kind for finding in findings} == kinds, findings
    for finding in findings:
        if finding.kind == "WRONG":
            assert "keys create" in finding.text or "ORDER_TRACKING_WEBHOOK_TOKENS" in finding.text
