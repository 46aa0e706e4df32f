"""The HTTP client of the tests: webhooks, reads, raw bytes, and streams."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from yarl import URL

from service.features.settings import Settings
from service.http.connections import LIMITS
from service.listening import serving
from tests.support.waiting import PATIENCE_SECONDS


class Client:
    """Sends webhooks to one service and reads from it, as a user would."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session = session
        self.port = port

    def url(self, path: str) -> URL:
        """Return the URL of a path that is percent-encoded already."""
        return URL(f"http://127.0.0.1:{self.port}{path}", encoded=True)

    async def webhook(self, order_no: Any, status: Any = "Dikirim", cnote: Any = "AWB1", **more: Any) -> Any:
        """Send a report, and return its receipt."""
        body = {"order_no": order_no, "cnote": cnote, "status": status, **more}
        async with self.session.put(self.url("/webhook"), json=body) as response:
            assert response.status == 200
            return await response.json()

    async def raw(self, body: bytes, method: str = "PUT", **headers: str) -> Any:
        """Send bytes to the webhook, and return the receipt."""
        async with self.session.request(method, self.url("/webhook"), data=body, headers=headers) as response:
            assert response.status == 200
            return await response.json()

    async def get(self, path: str, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        """Read a path, and return its parsed JSON."""
        response, _ = await self.get_with_headers(path, status, headers)
        return response

    async def get_with_headers(
        self, path: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> tuple[Any, Any]:
        """Read a path, and return its parsed JSON and the headers."""
        async with self.session.get(self.url(path), headers=headers) as response:
            body = await response.read()
            assert response.status == status, body
            kind = "application/problem+json" if status >= 400 else "application/json"
            if body:
                assert response.headers["Content-Type"] == kind
            assert response.headers["Server"] == "order-tracking"
            return json.loads(body) if body else None, response.headers

    async def text(self, path: str) -> str:
        """Read a page or the metrics."""
        async with self.session.get(self.url(path)) as response:
            assert response.status == 200
            return await response.text()

    async def post(self, path: str, status: int, body: Any = None) -> Any:
        """Post JSON, and return the parsed response."""
        async with self.session.post(self.url(path), json=body) as response:
            assert response.status == status, await response.text()
            return await response.json(content_type=None)

    async def status(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> int:
        """Send a request, and return the status of the response."""
        async with self.session.request(method, self.url(path), data=body, headers=headers) as response:
            return response.status

    async def walk(self, path: str, name: str) -> list[Any]:
        """Read every item of a list page by page, of the feed of all events up to its first empty page. The
        Link header of each page must equal the link in its body.
        """
        items: list[Any] = []
        is_feed = path.startswith("/events")
        while path:
            page, headers = await self.get_with_headers(path)
            items += page[name]
            if is_feed and not page[name]:
                return items
            if page["next"] is None:
                assert "Link" not in headers
            else:
                assert headers["Link"] == f'<{page["next"]}>; rel="next"'
            path = page["next"]
        return items

    async def talk(self, request: bytes) -> bytes:
        """Send bytes unchanged, and read until the response is complete or the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await reader.read(65_536)
        finally:
            writer.close()
            await writer.wait_closed()

    @asynccontextmanager
    async def reading(self, path: str, **headers: str) -> "AsyncIterator[StreamReader]":
        """Read a stream of server-sent events for the length of the block."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.get(self.url(path), headers=named) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Server"] == "order-tracking"
            yield StreamReader(response)


class StreamReader:
    """Reads server-sent events as a browser does: a blank line ends a message, and comments are skipped."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def message(self) -> dict[str, str]:
        """Return the fields of the next message.

        Raises:
            EOFError: the stream has ended.
        """
        while True:
            fields: dict[str, str] = {}
            while line := await self._line():
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
            if "data" in fields:
                return fields
            if self.response.content.at_eof():
                raise EOFError

    async def _line(self) -> str:
        line = await asyncio.wait_for(self.response.content.readline(), PATIENCE_SECONDS)
        return line.decode().rstrip("\n")

    async def positions(self, count: int) -> list[int]:
        """Return the positions of the next messages."""
        return [int((await self.message())["id"]) for _ in range(count)]


@asynccontextmanager
async def serving_client(dsn: str, **settings: Any) -> AsyncIterator[Client]:
    """Serve a database in this process for the length of the block, and yield a client.

    Args:
        dsn: the database.
        settings: the settings, and ``limits``: those of each connection.
    """
    limits = settings.pop("limits", LIMITS)
    async with (
        serving(Settings(port=0, **settings), dsn, limits=limits) as (port, _),
        aiohttp.ClientSession() as session,
    ):
        yield Client(session, port)
