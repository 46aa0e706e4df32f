"""Komerce, simulated: where a webhook is registered, and what it then pushes, again and again until it is 200.

What the sender does after another answer is not published, but that it may try again and may end the webhook.
Here a report is tried again after each of RETRY_PAUSES_SECONDS; after GIVEN_UP_MAX reports in a row that were
given up, the webhook is deactivated, and nothing is pushed until a URL is registered again.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Final

import aiohttp
import orjson
from aiohttp import web

from service.ingest.webhook_auth import signature_of
from service.simulator.account import OK, Sent
from service.simulator.lifecycles import Journey, Push
from service.simulator.registration import KEY_HEADER, PATH, URL_MEMBER, UnusableUrlError, check_url

# Orders that are pushed for at the same time; a copy that is sent at once comes on top.
IN_FLIGHT_MAX: Final = 32
# Orders that have begun and wait for their turn, so that their reports mix.
ORDERS_OPEN_MAX: Final = 16
# The sister product tries again after 1, 5 and 15 minutes; a simulated minute is short.
RETRY_PAUSES_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
GIVEN_UP_MAX: Final = 5
ATTEMPT_SECONDS_MAX: Final = 10.0


class Registration:
    """The webhook that is registered, and its endpoint ``/webhook``.

    Args:
        key: asked for in the header x-api-key; empty where any will do.
        url: registered from the start.
    """

    def __init__(self, key: str, url: str = "") -> None:
        self.url = url
        self._key = key
        self._given_up = 0
        self._usable = asyncio.Event()
        self.deactivated = asyncio.Event()
        if url:
            self._usable.set()

    @property
    def is_active(self) -> bool:
        """Whether anything is pushed."""
        return self._usable.is_set()

    async def wait(self) -> str:
        """Return the URL to push to, as soon as there is one."""
        await self._usable.wait()
        return self.url

    def acknowledged(self) -> None:
        """Note that a report was acknowledged."""
        self._given_up = 0

    def given_up(self) -> None:
        """Note that a report was given up: too many of them in a row deactivate the webhook."""
        self._given_up += 1
        if self._given_up >= GIVEN_UP_MAX:
            self._usable.clear()
            self.deactivated.set()

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[str]:
        """Take registrations for the length of the block; yield the base URL to register at.

        Raises:
            OSError: the address cannot be listened on.
        """
        app = web.Application()
        app.add_routes([web.put(PATH, self._put), web.get(PATH, self._get)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            yield f"http://{host}:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _put(self, request: web.Request) -> web.Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        try:
            # Komerce is said to refuse a query string. That https is advised is for its callers to heed.
            url = check_url(str(orjson.loads(await request.read())[URL_MEMBER]), URL_MEMBER, is_insecure=True)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return _enveloped(400, f"the body must be an object with {URL_MEMBER}")
        except UnusableUrlError as error:
            return _enveloped(422, str(error))
        self.url = str(url)
        self._given_up = 0
        self.deactivated.clear()
        self._usable.set()
        return _enveloped(200, "the webhook is registered", {URL_MEMBER: self.url, "is_active": True})

    async def _get(self, request: web.Request) -> web.Response:
        state = {URL_MEMBER: self.url or None, "is_active": self.is_active}
        return self._refusal(request) or _enveloped(200, "the webhook", state)

    def _refusal(self, request: web.Request) -> web.Response | None:
        given = request.headers.get(KEY_HEADER, "")
        is_known = hmac.compare_digest(given.encode(errors="replace"), self._key.encode())
        return None if given and (is_known or not self._key) else _enveloped(401, "the API key is not valid")


def _enveloped(code: int, message: str, data: object = None) -> web.Response:
    """Return an answer in the envelope of Komerce's interfaces."""
    meta = {"message": message, "code": code, "status": "success" if code == OK else "error"}
    return web.Response(
        body=orjson.dumps({"meta": meta, "data": data}), status=code, content_type="application/json"
    )


class Simulator:
    """Pushes journeys, as many orders at once as it is told, each in its own order.

    Of one order one report at most is on its way, unless its journey doubles some. ``sent`` has what
    became of every report; an attempt is written down there before it is sent.

    Args:
        registration: where to.
        session: to push with.
        rate: reports a second, retries aside; 0: as fast as the answers come.
        seed: of how the orders mix.
        secret: of the signature; empty: none.
        signature_header: where the signature stands.
    """

    def __init__(  # noqa: PLR0913 - what a sender has
        self,
        registration: Registration,
        session: aiohttp.ClientSession,
        *,
        rate: float = 0.0,
        seed: int = 0,
        secret: bytes = b"",
        signature_header: str = "",
    ) -> None:
        self.sent: dict[str, Sent] = {}
        self.orders_told = 0
        self.pushes_done = 0
        self.refusals = 0
        self.withheld = 0
        self._registration = registration
        self._session = session
        self._rate = rate
        self._chance = Random(seed)  # noqa: S311 - chances, no secrets  # nosec B311
        self._secret = secret
        self._signature_header = signature_header
        self._due = 0.0
        self._open: list[Iterator[tuple[Push, ...]]] = []

    async def run(self, journeys: Iterator[Journey]) -> None:
        """Tell everything. Cancelled, it stops wherever it is."""
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT_MAX):
                group.create_task(self._tell(journeys))

    async def _tell(self, journeys: Iterator[Journey]) -> None:
        while True:
            while len(self._open) < ORDERS_OPEN_MAX and (journey := next(journeys, None)) is not None:
                self._open.append(iter(journey.turns))
                self.withheld += journey.withheld
            if not self._open:
                # Those that are in other hands go on there.
                return
            turns = self._open.pop(self._chance.randrange(len(self._open)))
            turn = next(turns, None)
            if turn is None:
                self.orders_told += 1
                continue
            await self._keep_rate(len(turn))
            await asyncio.gather(*(self._push(push) for push in turn))
            self._open.append(turns)

    async def _keep_rate(self, reports: int) -> None:
        if self._rate:
            now = time.monotonic()
            # What was missed, while nobody answered, is not made up for.
            self._due = max(self._due, now) + reports / self._rate
            await asyncio.sleep(self._due - now)

    async def _push(self, push: Push) -> None:
        patience = push.patience_seconds
        sent = self.sent.setdefault(push.body, Sent())
        for pause in (*RETRY_PAUSES_SECONDS, None):
            url = await self._registration.wait()
            if await self._attempt(sent, push, url, patience):
                self._registration.acknowledged()
                break
            patience = None
            if pause is not None:
                await asyncio.sleep(pause)
        else:
            sent.is_given_up = True
            self._registration.given_up()
        self.pushes_done += 1

    async def _attempt(self, sent: Sent, push: Push, url: str, patience: float | None) -> bool:
        """Send a report once; tell whether it was acknowledged."""
        body = push.body.encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._secret:
            headers[self._signature_header] = signature_of(body, self._secret)
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with (
                asyncio.timeout(ATTEMPT_SECONDS_MAX if patience is None else patience),
                self._session.request(
                    push.method,
                    url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    middlewares=(partial(_count, sent),),
                ) as response,
            ):
                receipt = await response.read()
                if response.status == OK:
                    sent.receipts.append(receipt)
                    return True
        self.refusals += 1
        return False


async def _count(
    sent: Sent, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Count an attempt for each time that a request goes out: by itself, aiohttp sends a PUT a second time."""
    sent.attempts += 1
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        # Nobody was there.
        sent.attempts -= 1
        raise
