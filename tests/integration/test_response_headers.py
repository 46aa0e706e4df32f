"""The headers of every response: no cache keeps order data, and no other site can use a response."""

import pytest

from tests.support.client import Client, serving_client

SECRET = "a-secret-of-16-characters"  # noqa: S105 - of a service that lives for one test

KEEPS_NOTHING = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SHOWS_NOTHING = "default-src 'none'; frame-ancestors 'none'"
PATHS = (
    *(
        "/orders",
        "/orders.csv",
        "/orders/KOM1",
        "/orders/KOM1/timeline.csv",
        "/orders/KOM1/events",
    ),
    *(
        "/events",
        "/events.ndjson",
        "/events/stream",
        "/orders/KOM1/stream",
        "/audit/transitions.csv",
    ),
    *("/statistics", "/transitions", "/quarantine", "/projections", "/livez", "/readyz", "/metrics"),
    *("/openapi.json", "/problems/parked", "/nothing/here", "/orders?nothing=1", "/orders/KOM2", "/webhook"),
    *("/", "/track", "/track/KOM1", "/quarantined", "/track/KOM2", "/orders/KOM1/share", "/t/forged"),
)


@pytest.mark.parametrize("accept", ["*/*", "text/html"])
async def test_every_response_says_that_it_is_private(client: Client, accept: str) -> None:
    """Data, streams, pages and problems may be neither cached, nor sniffed, nor used by another site."""
    await client.webhook("KOM1")
    await client.get("/orders/KOM1?after_position=1")
    for path in PATHS:
        async with client.session.get(client.url(path), headers={"Accept": accept}) as answer:
            headers = answer.headers
            for name, value in KEEPS_NOTHING.items():
                assert headers.getall(name) == [value], path
            cached = "private, no-cache" if "ETag" in headers else "no-store"
            assert headers.getall("Cache-Control") == [cached], path
            (policy,) = headers.getall("Content-Security-Policy")
            if headers["Content-Type"].startswith("text/html"):
                assert ("script-src" in policy) == (not path.startswith("/t/")), path
            else:
                assert policy == SHOWS_NOTHING, path
            csv = "attachment; filename=" in headers.get("Content-Disposition", "")
            assert csv == path.endswith(".csv"), path
    async with client.session.put(client.url("/webhook"), data=b"{}") as answer:
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    malformed = await client.talk(b"GET /orders HTTP/1.1\r\nHost: localhost\r\nBad Header\r\n\r\n")
    assert malformed.split(b" ", 2)[1] == b"400"
    assert b"\r\nCache-Control: no-store\r\n" in malformed


async def test_a_cached_order_is_asked_for_again(client: Client) -> None:
    """An order may be kept by its reader alone, who must ask each time whether it has changed."""
    await client.webhook("KOM1")
    _, headers = await client.get_with_headers("/orders/KOM1?after_position=1")
    etag = headers["ETag"]
    _, again = await client.get_with_headers("/orders/KOM1", 304, {"If-None-Match": etag})
    for answer in (headers, again):
        assert answer["Cache-Control"] == "private, no-cache"


async def test_the_browser_may_keep_static_files(dsn: str) -> None:
    """A static file holds no data, and its URL changes with its content."""
    async with serving_client(dsn) as client:
        page = await client.text("/")
        path = page.partition('href="/static/page.css')[2].partition('"')[0]
        async with client.session.get(client.url(f"/static/page.css{path}")) as answer:
            assert "immutable" in answer.headers["Cache-Control"]
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
