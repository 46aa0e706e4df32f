"""The page of subscriptions: what it shows, and what its forms do."""

import pytest
from aiohttp import web

from tests.support.client import Client, serving_client
from tests.support.receiver import Received, receiving
from tests.support.waiting import until_async

HTML = {"Accept": "text/html", "Accept-Language": "en"}


async def page(client: Client, language: str = "en") -> str:
    """Return the page in a language."""
    async with client.session.get(client.url(f"/deliveries?lang={language}"), headers=HTML) as response:
        assert response.status == 200
        return await response.text()


async def submit(client: Client, path: str, status: int = 200, **fields: str) -> str:
    """Submit a form as a browser does, and return the page that follows."""
    headers = {**HTML, "Origin": f"http://127.0.0.1:{client.port}"}
    async with client.session.post(client.url(path), data=fields, headers=headers) as response:
        text = await response.text()
        assert response.status == status, text
        return text


@pytest.mark.parametrize("language", ["en", "id"])
async def test_a_page_without_subscriptions(client: Client, language: str) -> None:
    """It says how to add one."""
    assert "order-tracking subscriptions add" in await page(client, language)


async def test_the_page_shows_and_acts(dsn: str) -> None:
    """It shows lag, success rate, held orders and responses; its forms test, pause, resume, retry and skip."""

    async def refuse(received: Received) -> web.StreamResponse:
        is_refused = received.order_no == "KOM <1>/2"
        return web.Response(status=500 if is_refused else 200, text="<b>no</b>")

    settings = {"subscription_networks": "127.0.0.0/8", "subscription_retry_seconds": "0,600"}
    async with serving_client(dsn, **settings) as client, receiving() as receiver:
        receiver.respond = refuse
        added = await client.post("/subscriptions", 201, {"url": receiver.url})
        path = f"/deliveries/{added['subscription_id']}"
        await client.webhook("KOM <1>/2")
        await client.webhook("KOM2")

        async def is_shown() -> bool:
            text = await page(client)
            return "KOM &lt;1&gt;/2" in text and "50% (1 succeeded, 1 failed)" in text

        await until_async(is_shown)
        text = await page(client)
        assert "500: &lt;b&gt;no&lt;/b&gt;" in text
        assert "<b>no</b>" not in text
        assert added["secret"] not in text
        assert "Percobaan: 1" in await page(client, "id")
        assert "The test was accepted: 200" in await submit(client, f"{path}/test")
        assert "Paused: by an operator" in await submit(client, f"{path}/pause")
        assert "Active" in await submit(client, f"{path}/resume")
        held = f"{path}/held/KOM%20%3C1%3E%2F2"
        await submit(client, f"{held}/retry")
        await submit(client, f"{held}/skip", 400, reason="")
        await submit(client, f"{held}/skip", reason="the shop knows")

        async def is_released() -> bool:
            return bool((await client.get(f"/subscriptions/{added['subscription_id']}"))["held_orders"] == 0)

        await until_async(is_released)
        await submit(client, f"{held}/skip", 404, reason="again")
        await submit(client, "/deliveries/nonsense/pause", 404)
