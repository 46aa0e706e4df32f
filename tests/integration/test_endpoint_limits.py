"""Attacks of an endpoint on each phase of a delivery: a test for each cell of the table in SECURITY.md."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final
from uuid import uuid4

import pytest
from yarl import URL

from service.database.log_identity import LogIdentity
from service.features.subscriptions.message import encode_test
from service.features.subscriptions.responses import (
    ATTEMPT_SECONDS_MAX,
    HEAD_BYTES_MAX,
    INTERIM_RESPONSES_MAX,
    ResponseLimits,
)
from service.features.subscriptions.sending import Attempt, Sender
from service.features.subscriptions.subscription import make_secret
from service.http.addresses import LOOPBACK
from service.http.budgets import Budget, Budgets
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

# A tenth of what a service has, or less.
SHORT: Final = ResponseLimits(attempt_seconds_max=0.3, body_seconds_max=0.3)
PATIENT: Final = ResponseLimits(attempt_seconds_max=PATIENCE_SECONDS, body_seconds_max=PATIENCE_SECONDS)
OK: Final = b"HTTP/1.1 200 OK\r\n"
EARLY_HINTS: Final = b"HTTP/1.1 103 Early Hints\r\n\r\n"
EMPTY: Final = OK + b"Content-Length: 0\r\n\r\n"
# More than the share of one endpoint in these tests.
LARGE: Final = b"x" * 30_000

Respond = Callable[[asyncio.StreamWriter], Awaitable[None]]


def endless(first: bytes, then: bytes, pause_seconds: float = 0.0) -> Respond:
    """Return an endpoint that sends some bytes, and then others for as long as it can."""

    async def respond(writer: asyncio.StreamWriter) -> None:
        writer.write(first)
        while then:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(pause_seconds)
        await asyncio.Event().wait()

    return respond


def once(response: bytes) -> Respond:
    """Return an endpoint that sends a response, and then nothing."""
    return endless(response, b"")


class Hostile:
    """A sender, and an endpoint that attacks it.

    Args:
        sender: the sender.
        budgets: its budgets.
        url: the endpoint.
    """

    def __init__(self, sender: Sender, budgets: Budgets, url: URL) -> None:
        self.budgets = budgets
        self._sender = sender
        self._url = url

    async def deliver(self) -> Attempt:
        """Send a message."""
        return await self._sender.send(self._url, [make_secret()], "msg_1", encode_test(uuid4()))


@asynccontextmanager
async def hostile(
    respond: Respond, limits: ResponseLimits = PATIENT, maximum: int = 100_000, maximum_each: int = 100_000
) -> AsyncIterator[Hostile]:
    """Run an endpoint for the length of the block; after it, nothing may be held any more."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await reader.readuntil(b"\r\n\r\n")
                await respond(writer)
            finally:
                writer.close()

    tasks: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(
        lambda reader, writer: tasks.append(asyncio.create_task(serve(reader, writer))), "127.0.0.1", 0
    )
    budgets = Budgets()
    budgets.endpoints = Budget("endpoint_bytes", "bytes", maximum, maximum_each)
    log = LogIdentity()
    log.log_id = "log"
    sender = Sender(LOOPBACK, log, limits=limits, budgets=budgets)
    try:
        yield Hostile(sender, budgets, URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"))
    finally:
        await sender.close()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await until_async(condition(lambda: not budgets.endpoints.held))


@pytest.mark.attacks("connecting", "bytes")
async def test_an_endpoint_that_says_nothing_holds_nothing() -> None:
    """Until an endpoint responds, none of its bytes are held."""
    async with hostile(once(b"")) as endpoint:
        waiting = asyncio.create_task(endpoint.deliver())
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        assert not endpoint.budgets.endpoints.held
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.attacks("connecting", "seconds")
@pytest.mark.attacks("response head", "seconds")
@pytest.mark.attacks("interim responses", "seconds")
@pytest.mark.parametrize(
    "respond",
    [
        once(b""),
        endless(OK, b"X: y\r\n", 0.05),
        endless(EARLY_HINTS, b"", 0.05),
        endless(EARLY_HINTS, b"HTTP", 0.05),
    ],
    ids=["silent", "a slow head", "an interim response", "a slow head after one"],
)
async def test_an_endpoint_that_is_too_slow(respond: Respond) -> None:
    """However an endpoint spreads its bytes, an attempt without a response ends in time."""
    async with hostile(respond, SHORT) as endpoint:
        attempt = await endpoint.deliver()
        assert (attempt.outcome, attempt.status) == ("failed", None)
        assert attempt.seconds < ATTEMPT_SECONDS_MAX


@pytest.mark.attacks("response head", "bytes")
@pytest.mark.parametrize("first", [OK, EARLY_HINTS + OK, b"HTTP/1.1 103 Early Hints\r\n"])
async def test_a_head_that_never_ends(first: bytes) -> None:
    """The head of a response, with those of its interim responses, has a limit of bytes."""
    async with hostile(endless(first, b"X: " + b"y" * 1_000 + b"\r\n")) as endpoint:
        attempt = await endpoint.deliver()
        assert attempt.error == f"the response exceeds a limit: the head has more than {HEAD_BYTES_MAX} bytes"
        assert endpoint.budgets.excesses.counts["endpoint_head_bytes"] == 1


@pytest.mark.attacks("interim responses", "bytes")
async def test_too_many_interim_responses() -> None:
    """A few interim responses are skipped; more of them end the attempt."""
    async with hostile(once(INTERIM_RESPONSES_MAX * EARLY_HINTS + EMPTY)) as endpoint:
        assert (await endpoint.deliver()).outcome == "delivered"
    for respond in (once((INTERIM_RESPONSES_MAX + 1) * EARLY_HINTS + EMPTY), endless(b"", 1_000 * EARLY_HINTS)):
        async with hostile(respond) as endpoint:
            attempt = await endpoint.deliver()
            assert (attempt.outcome, attempt.status) == ("failed", None)
            assert attempt.error
            assert "interim responses" in attempt.error
            assert endpoint.budgets.excesses.counts["interim_responses"] == 1


@pytest.mark.attacks("response body", "seconds")
async def test_a_body_that_is_too_slow() -> None:
    """The status of a response with a slow body counts; the body is cut off."""
    async with hostile(endless(OK + b"Content-Length: 99999\r\n\r\n", b"x", 0.01), SHORT) as endpoint:
        assert (await endpoint.deliver()).outcome == "delivered"


PHASES: Final = {
    "head": OK + b"".join(b"X%d: %b\r\n" % (number, LARGE[:5_000]) for number in range(6)),
    "interim": 3 * (b"HTTP/1.1 103 Early Hints\r\nX: " + LARGE[:8_000] + b"\r\n\r\n"),
    "body": OK + b"Content-Length: 99999\r\n\r\n" + LARGE,
}


@pytest.mark.attacks("response head", "all")
@pytest.mark.attacks("response head", "endpoint")
@pytest.mark.attacks("interim responses", "all")
@pytest.mark.attacks("interim responses", "endpoint")
@pytest.mark.attacks("response body", "all")
@pytest.mark.attacks("response body", "endpoint")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("maximums", [(20_000, 100_000), (100_000, 20_000)], ids=["all", "endpoint"])
async def test_responses_that_are_arriving(phase: str, maximums: tuple[int, int]) -> None:
    """Beyond the budget of all, or the share of an endpoint, a response is cut off; its status counts."""
    async with hostile(once(PHASES[phase]), PATIENT, *maximums) as endpoint:
        attempt = await endpoint.deliver()
        if phase == "body":
            assert attempt.outcome == "delivered"
        else:
            assert attempt.error
            assert "too many bytes of responses are arriving" in attempt.error
        assert endpoint.budgets.endpoints.refusals == 1
