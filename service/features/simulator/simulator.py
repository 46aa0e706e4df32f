"""A simulated Komerce: a webhook is registered with it, and it pushes each report until the response is 200.

After any other response, Komerce may retry and may deactivate the webhook; it documents no more than that. The
simulator retries a report after each of RETRY_PAUSES_SECONDS, then abandons it ("given up"). After GIVEN_UP_MAX
abandoned reports in a row, it deactivates the webhook and pushes nothing until a URL is registered again.
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final

import aiohttp
import orjson
from aiohttp import web

from service.features.simulator.account import OK, Delivery
from service.features.simulator.lifecycles import Journey, Push
from service.ingest.signatures import Scheme
from service.registration import KEY_HEADER, PATH, URL_MEMBER, UnusableUrlError, check_url

# The maximum number of orders with a report in flight. A copy that is sent at the same time does not count.
IN_FLIGHT_MAX: Final = 32
# The maximum number of begun orders that wait for their next report, so that the orders' reports mix.
ORDERS_OPEN_MAX: Final = 16
# Komerce's sister product retries after 1, 5 and 15 minutes; the simulated pauses are shorter.
RETRY_PAUSES_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
GIVEN_UP_MAX: Final = 5
ATTEMPT_SECONDS_MAX: Final = 10.0


class Registration:
    """The registered webhook, and the endpoint ``/webhook`` that accepts registrations.

    Args:
        key: the key that the header x-api-key must have; empty to accept any key.
        url: the URL that is registered from the start; empty for none.
    """

    def __init__(self, key: str, url: str = "") -> None:
        self.url = url
        self.deactivated = asyncio.Event()
        self._key = key
        self._given_up = 0
        self._active = asyncio.Event()
        if url:
            self._active.set()

    @property
    def is_active(self) -> bool:
        """Whether reports are pushed."""
        return self._active.is_set()

    async def wait(self) -> str:
        """Return the URL to push to, once the webhook is active."""
        await self._active.wait()
        return self.url

    def acknowledged(self) -> None:
        """Count an acknowledged report."""
        self._given_up = 0

    def given_up(self) -> None:
        """Count an abandoned report; GIVEN_UP_MAX in a row deactivate the webhook."""
        self._given_up += 1
        if self._given_up >= GIVEN_UP_MAX:
            self._active.clear()
            self.deactivated.set()

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[str]:
        """Accept registrations until the block ends; yield the base URL to register at.

        Port 0 selects any free port.

        Raises:
            OSError: the address is not available.
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
        if (refusal := self._refuse(request)) is not None:
            return refusal
        try:
            # Komerce reportedly refuses a query string. It recommends https, but does not require it.
            url = check_url(str(orjson.loads(await request.read())[URL_MEMBER]), URL_MEMBER, is_insecure=True)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return _enveloped(400, f"the body must be an object with {URL_MEMBER}")
        except UnusableUrlError as error:
            return _enveloped(422, str(error))
        self.url = str(url)
        self._given_up = 0
        self.deactivated.clear()
        self._active.set()
        return _enveloped(200, "the webhook is registered", {URL_MEMBER: self.url, "is_active": True})

    async def _get(self, request: web.Request) -> web.Response:
        state = {URL_MEMBER: self.url or None, "is_active": self.is_active}
        return self._refuse(request) or _enveloped(200, "the webhook", state)

    def _refuse(self, request: web.Request) -> web.Response | None:
        key = request.headers.get(KEY_HEADER, "")
        is_valid = not self._key or hmac.compare_digest(key.encode(errors="replace"), self._key.encode())
        return None if key and is_valid else _enveloped(401, "the API key is not valid")


def _enveloped(code: int, message: str, data: object = None) -> web.Response:
    """Return a response in the envelope of Komerce's interfaces."""
    meta = {"message": message, "code": code, "status": "success" if code == OK else "error"}
    body = orjson.dumps({"meta": meta, "data": data})
    return web.Response(body=body, status=code, content_type="application/json")


@dataclass
class Simulator:
    """Pushes the journeys of many orders at once, and the reports of each order in sequence.

    An order has at most one report in flight, except for a copy that is sent at the same time.

    Attributes:
        registration: the webhook to push to.
        session: the HTTP client.
        rate: reports per second, not counting retries; 0 for no limit.
        seed: the random seed of the sequence in which orders take turns.
        scheme: signs the bodies; None to send no signature.
        deliveries: every report by its body; an attempt is counted before it is sent.
        orders_done, reports_done: how many have been acknowledged or abandoned.
        reports_withheld: the number of reports that are never sent.
        failures: the number of attempts that did not get a 200.
    """

    registration: Registration
    session: aiohttp.ClientSession
    rate: float = 0.0
    seed: int = 0
    scheme: Scheme | None = None
    deliveries: dict[str, Delivery] = field(default_factory=dict, init=False)
    orders_done: int = field(default=0, init=False)
    reports_done: int = field(default=0, init=False)
    reports_withheld: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._random = Random(self.seed)  # noqa: S311 - not a secret  # nosec B311
        self._due = 0.0
        self._open: list[Iterator[tuple[Push, ...]]] = []

    async def run(self, journeys: Iterator[Journey]) -> None:
        """Push every report of the journeys."""
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT_MAX):
                group.create_task(self._push_orders(journeys))

    async def _push_orders(self, journeys: Iterator[Journey]) -> None:
        while True:
            while len(self._open) < ORDERS_OPEN_MAX and (journey := next(journeys, None)) is not None:
                self._open.append(iter(journey.turns))
                self.reports_withheld += journey.reports_withheld
            if not self._open:
                # The other tasks finish the orders that they have in flight.
                return
            turns = self._open.pop(self._random.randrange(len(self._open)))
            turn = next(turns, None)
            if turn is None:
                self.orders_done += 1
                continue
            await self._keep_rate(len(turn))
            await asyncio.gather(*(self._push(push) for push in turn))
            self._open.append(turns)

    async def _keep_rate(self, reports: int) -> None:
        if self.rate:
            now = time.monotonic()
            # After an outage the rate stays the same: delayed reports are not sent in a burst.
            self._due = max(self._due, now) + reports / self.rate
            await asyncio.sleep(self._due - now)

    async def _push(self, push: Push) -> None:
        delivery = self.deliveries.setdefault(push.body, Delivery())
        patience = push.patience_seconds
        for pause in (0, *RETRY_PAUSES_SECONDS):
            await asyncio.sleep(pause)
            url = await self.registration.wait()
            if await self._attempt(delivery, push, url, patience):
                self.registration.acknowledged()
                break
            patience = None
        else:
            delivery.is_given_up = True
            self.registration.given_up()
        self.reports_done += 1

    async def _attempt(self, delivery: Delivery, push: Push, url: str, patience: float | None) -> bool:
        """Send a report once; return whether it was acknowledged."""
        body = push.body.encode()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.scheme is not None:
            headers |= self.scheme.sign(body)
        counting = [partial(_count, delivery)]
        with suppress(aiohttp.ClientError, OSError):
            async with (
                asyncio.timeout(ATTEMPT_SECONDS_MAX if patience is None else patience),
                self.session.request(
                    push.method, url, data=body, headers=headers, allow_redirects=False, middlewares=counting
                ) as response,
            ):
                receipt = await response.read()
                if response.status == OK:
                    delivery.receipts.append(receipt)
                    return True
        self.failures += 1
        return False


async def _count(
    delivery: Delivery, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Count each request that goes out: aiohttp repeats a PUT by itself when the connection was closed."""
    delivery.attempts += 1
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        # The connection was refused, so nothing was sent.
        delivery.attempts -= 1
        raise
