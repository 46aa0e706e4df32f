"""Registration of a webhook with the simulated Komerce, and with servers that misbehave."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from service.features.simulator.simulator import GIVEN_UP_MAX, Registration
from service.registration import (
    KEY_HEADER,
    PATH,
    URL_MEMBER,
    RegistrationError,
    UnusableUrlError,
    append_token,
    check_url,
    has_token,
    register,
)
from tests.support.commands import Completed, call_command
from tests.support.processes import run_command
from tests.support.waiting import PATIENCE_SECONDS

KEY = "a-key"
GOOD = "https://shop.example/webhook/token"


@asynccontextmanager
async def answering(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Serve every path with a handler, and yield the base URL."""
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
    ("url", "message"),
    [
        ("shop.example/webhook", "is not a valid URL"),
        ("ftp://shop.example/webhook", "is not a valid URL"),
        ("https:///webhook", "is not a valid URL"),
        ("https://shop.example:99999/webhook", "is not a valid URL"),
        ("", "is not a valid URL"),
        ("http://shop.example/webhook", "must begin with https://"),
        ("https://user:pass@shop.example/", "a user or a password"),
        ("https://shop.example/webhook?token=x", "must not contain ?"),
        ("https://shop.example/webhook?", "must not contain ?"),
        ("https://shop.example/webhook#x", "must not contain ?"),
    ],
)
def test_an_unusable_url_is_an_error(url: str, message: str) -> None:
    """The error about an unusable URL names its purpose and its fault."""
    with pytest.raises(UnusableUrlError, match=r"^it ") as caught:
        check_url(url, "it", is_insecure=False)
    assert message in str(caught.value)


def test_http_is_accepted_only_if_allowed() -> None:
    """A URL with https is always accepted, and one with http only if allowed."""
    assert str(check_url(GOOD, "it", is_insecure=False)) == GOOD
    assert check_url("http://127.0.0.1:8080/webhook", "it", is_insecure=True).port == 8080


def test_a_path_without_a_required_token_is_noticed() -> None:
    """The last segment must be one of the tokens; without tokens every path is accepted."""
    assert has_token(URL(GOOD), ["other", "token"])
    assert not has_token(URL(GOOD), ["other"])
    assert has_token(URL(GOOD), [])


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://shop.example/webhook", "the-newest-token-of-two"),
        ("https://shop.example/webhook/", "the-newest-token-of-two"),
        ("https://shop.example/hooks/webhook", "the-newest-token-of-two"),
        (GOOD, None),
        ("https://shop.example/webhook?", None),
        ("https://shop.example/other", None),
    ],
)
def test_the_last_token_is_appended(url: str, token: str | None) -> None:
    """A URL that ends in /webhook gets the last token, and every other URL stays."""
    expected = f"{url.rstrip('/')}/{token}" if token else url
    assert append_token(url, ["the-older-token-of-two", "the-newest-token-of-two"]) == expected
    assert append_token(url, []) == url


async def test_a_token_is_read_from_the_settings(tmp_path: Path) -> None:
    """Komerce gets the last token of the settings, and no output contains a token.

    A token on the command line is also registered, with a warning.
    """
    old, new = "the-older-token-of-two", "the-newest-token-of-two"
    registered: list[str] = []

    async def accept_or_echo(request: web.Request) -> web.Response:
        url = (await request.json())[URL_MEMBER]
        registered.append(url)
        echo = {"meta": {"message": f"{url} is not reachable"}}
        return web.json_response(echo, status=200 if len(registered) < 4 else 422)

    async with answering(accept_or_echo) as base:
        settings = {"KOMERCE_BASE_URL": base, "KOMERCE_API_KEY": KEY, "WEBHOOK_TOKENS": f"{old},{new}"}

        async def call(url: str) -> Completed:
            return await asyncio.to_thread(call_command, tmp_path, "register", url, "--insecure", **settings)

        site = "https://shop.example/webhook"
        ended = [await call(url) for url in (site, f"{site}/", f"{site}/{old}", site)]
        own_process = await asyncio.to_thread(run_command, tmp_path, "register", site, "--insecure", **settings)
    assert registered == [f"{site}/{token}" for token in (new, new, old, new, new)]
    assert [one.returncode for one in ended] == [0, 0, 0, 1]
    assert ["process list" in one.stderr for one in ended] == [False, False, True, False]
    assert f"{site}/<token> is not reachable" in ended[3].stderr
    printed = "".join([*(one.stdout + one.stderr for one in ended), own_process.stdout, own_process.stderr])
    assert old not in printed
    assert new not in printed


async def test_a_url_can_be_set_and_changed_at_any_time() -> None:
    """Each registration replaces the previous one, and the simulated Komerce returns the current one."""
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


async def test_a_wrong_key_registers_nothing() -> None:
    """A wrong or missing key gets 401; the simulated Komerce accepts every key if none is configured."""
    registration = Registration(KEY)
    async with registration.listening("127.0.0.1", 0) as base:
        with pytest.raises(RegistrationError, match=r"returned 401: check the key .*not valid"):
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
async def test_the_simulated_komerce_refuses_unusable_bodies(body: bytes, status: int) -> None:
    """A body without a URL, or whose URL has a query string, registers nothing."""
    registration = Registration(KEY)
    async with (
        registration.listening("127.0.0.1", 0) as base,
        aiohttp.ClientSession() as session,
        session.put(f"{base}{PATH}", data=body, headers={KEY_HEADER: KEY}) as response,
    ):
        envelope = await response.json()
    assert (response.status, envelope["meta"]["code"], registration.url) == (status, status, "")


async def test_reports_given_up_in_a_row_deactivate_a_webhook_until_it_is_registered_again() -> None:
    """An acknowledged report resets the count of reports given up, and a registration activates the webhook
    again.
    """
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
    ("status", "body", "message"),
    [
        (403, b"", "may not register webhooks$"),
        (404, b"<html>", "check ORDER_TRACKING_KOMERCE_BASE_URL$"),
        (500, b'{"meta": "broken"}', "returned 500: the webhook is not registered$"),
        (422, b'{"meta": {"message": "bad\\u001b[31m url"}}', r"is not registered \(bad\x1b\[31m url\)$"),
    ],
)
async def test_a_refusal_has_a_hint_and_the_message_of_komerce(status: int, body: bytes, message: str) -> None:
    """The error names the status, the setting to check, and Komerce's own message unchanged."""

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async with answering(refuse) as base:
        with pytest.raises(RegistrationError, match=message):
            await register(base, KEY, GOOD, is_insecure=True)


async def test_a_message_of_komerce_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    """``register`` prints an escape sequence in the message as text, on one line."""

    async def refuse(_request: web.Request) -> web.Response:
        return web.json_response({"meta": {"message": "bad\x1b[31m\nurl"}}, status=422)

    async with answering(refuse) as base:
        settings = {"KOMERCE_BASE_URL": base, "KOMERCE_API_KEY": KEY}
        ended = await asyncio.to_thread(call_command, tmp_path, "register", GOOD, "--insecure", **settings)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.endswith("(bad\\x1b[31m url)\n")


async def test_the_key_is_sent_to_no_other_server() -> None:
    """The client does not follow a redirect, and refuses http before it sends a request."""
    requests: list[Any] = []

    async def redirect(request: web.Request) -> web.Response:
        requests.append((request.method, request.path, request.headers[KEY_HEADER], await request.json()))
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async with answering(redirect) as base:
        with pytest.raises(RegistrationError, match="returned 307"):
            await register(base, KEY, GOOD, is_insecure=True)
        assert requests == [("PUT", "/webhook", KEY, {"webhook_url": GOOD})]
        with pytest.raises(UnusableUrlError, match=r"^ORDER_TRACKING_KOMERCE_BASE_URL must begin with https"):
            await register(base, KEY, GOOD)
    assert len(requests) == 1


async def test_an_unreachable_komerce_is_an_error() -> None:
    """The error about an unreachable Komerce names the server, and does not contain the key."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with asyncio.timeout(PATIENCE_SECONDS):
        with pytest.raises(RegistrationError, match=f"^cannot reach {nowhere}: ") as caught:
            await register(nowhere, KEY, GOOD, is_insecure=True)
    assert KEY not in str(caught.value)
