"""Registering a webhook with Komerce, against the simulated one and against servers that are no Komerce."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from service.simulator.registration import (
    KEY_HEADER,
    PATH,
    URL_MEMBER,
    RegistrationError,
    UnusableUrlError,
    check_url,
    has_token,
    register,
)
from service.simulator.simulator import GIVEN_UP_MAX, Registration
from tests.support.waiting import PATIENCE_SECONDS

KEY = "a-key"
GOOD = "https://shop.example/webhook/token"


@asynccontextmanager
async def answering(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server that is no Komerce; the base URL."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("shop.example/webhook", "is no https:// URL"),
        ("ftp://shop.example/webhook", "is no https:// URL"),
        ("https:///webhook", "is no https:// URL"),
        ("https://shop.example:99999/webhook", "is no https:// URL"),
        ("", "is no https:// URL"),
        ("http://shop.example/webhook", "must begin with https://"),
        ("https://user:pass@shop.example/", "a user or a password"),
        ("https://shop.example/webhook?token=x", "must have no ?"),
        ("https://shop.example/webhook?", "must have no ?"),
        ("https://shop.example/webhook#x", "must have no ?"),
    ],
)
def test_a_url_that_cannot_be_used_is_told(url: str, said: str) -> None:
    """In one line that names what is wrong with it."""
    with pytest.raises(UnusableUrlError, match=r"^it ") as refused:
        check_url(url, "it", is_insecure=False)
    assert said in str(refused.value)


def test_http_passes_only_where_it_is_let() -> None:
    """For a test on one machine."""
    assert str(check_url(GOOD, "it", is_insecure=False)) == GOOD
    assert check_url("http://127.0.0.1:8080/webhook", "it", is_insecure=True).port == 8080


def test_a_path_without_a_token_that_is_asked_for_is_noticed() -> None:
    """Its last part must be one of them; where none is asked for any path will do."""
    assert has_token(URL(GOOD), ["other", "token"])
    assert not has_token(URL(GOOD), ["other"])
    assert has_token(URL(GOOD), [])


async def test_a_url_can_be_set_and_changed_at_any_time() -> None:
    """Each registration takes the place of the one before; the simulated Komerce tells which one holds."""
    registration = Registration(KEY)
    assert not registration.is_active
    async with registration.listening("127.0.0.1", 0) as base, aiohttp.ClientSession() as session:
        for url in (GOOD, "https://shop.example/other"):
            await register(base, KEY, url, is_insecure=True)
            assert await registration.wait() == url
        async with session.get(f"{base}{PATH}", headers={KEY_HEADER: KEY}) as response:
            state = await response.json()
    assert state["data"] == {URL_MEMBER: "https://shop.example/other", "is_active": True}
    assert state["meta"] == {"message": "the webhook", "code": 200, "status": "success"}


async def test_a_wrong_key_is_told_and_registers_nothing() -> None:
    """Any key will do where none is set, and no key never."""
    registration = Registration(KEY)
    async with registration.listening("127.0.0.1", 0) as base:
        with pytest.raises(RegistrationError, match=r"answers 401: it does not know the key .*not valid"):
            await register(base, "another", GOOD, is_insecure=True)
    assert not registration.is_active
    async with Registration("").listening("127.0.0.1", 0) as base, aiohttp.ClientSession() as session:
        await register(base, "any", GOOD, is_insecure=True)
        async with session.get(f"{base}{PATH}") as response:
            assert response.status == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"url": "https://shop.example"}', 400),
        (b'{"webhook_url": null}', 422),
        (b'{"webhook_url": "https://shop.example/?a=b"}', 422),
    ],
)
async def test_the_simulated_komerce_refuses_what_it_cannot_use(body: bytes, status: int) -> None:
    """A body without a URL, and a URL with a query string; nothing is registered then."""
    registration = Registration(KEY)
    async with (
        registration.listening("127.0.0.1", 0) as base,
        aiohttp.ClientSession() as session,
        session.put(f"{base}{PATH}", data=body, headers={KEY_HEADER: KEY}) as response,
    ):
        answer = await response.json()
    assert (response.status, answer["meta"]["code"], registration.url) == (status, status, "")


async def test_a_webhook_is_deactivated_by_reports_given_up_in_a_row_until_it_is_registered_again() -> None:
    """An acknowledged one in between begins the count anew."""
    registration = Registration(KEY, GOOD)
    for _ in range(GIVEN_UP_MAX - 1):
        registration.given_up()
    registration.acknowledged()
    for _ in range(GIVEN_UP_MAX):
        assert registration.is_active
        registration.given_up()
    assert registration.deactivated.is_set()
    async with registration.listening("127.0.0.1", 0) as base:
        await register(base, KEY, GOOD, is_insecure=True)
    assert not registration.deactivated.is_set()
    assert await registration.wait() == GOOD


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (403, b"", "may not do this$"),
        (404, b"<html>", "look at ORDER_TRACKING_KOMERCE_BASE_URL$"),
        (500, b'{"meta": "broken"}', "answers 500: it is not registered$"),
        (422, b'{"meta": {"message": "bad\\u001b[31m url"}}', r"is not registered \(bad\\x1b\[31m url\)$"),
    ],
)
async def test_a_refusal_is_one_clear_line(status: int, body: bytes, said: str) -> None:
    """What to look at, and what Komerce says, in letters that a terminal does not act on."""

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async with answering(refuse) as base:
        with pytest.raises(RegistrationError, match=said):
            await register(base, KEY, GOOD, is_insecure=True)


async def test_the_key_goes_nowhere_else() -> None:
    """A redirect is not followed, and http is refused before anything is sent."""
    asked: list[Any] = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append((request.method, request.path, request.headers[KEY_HEADER], await request.json()))
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async with answering(redirect) as base:
        with pytest.raises(RegistrationError, match="answers 307"):
            await register(base, KEY, GOOD, is_insecure=True)
        assert asked == [("PUT", "/webhook", KEY, {"webhook_url": GOOD})]
        with pytest.raises(UnusableUrlError, match=r"^ORDER_TRACKING_KOMERCE_BASE_URL must begin with https"):
            await register(base, KEY, GOOD)
    assert len(asked) == 1


async def test_a_komerce_that_cannot_be_reached_is_told() -> None:
    """In one line, without the key."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(RegistrationError, match=f"^cannot reach {nowhere}: ") as refused:
            await register(nowhere, KEY, GOOD, is_insecure=True)
    assert KEY not in str(refused.value)
