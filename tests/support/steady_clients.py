"""Clients that send reports to a webhook during a restart, and the port that stays open for them."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from time import monotonic
from typing import Any, Final

import aiohttp

from tests.support.waiting import condition, until_async

CLIENTS: Final = 12
# The pause of a client between two reports.
PAUSE_SECONDS: Final = 0.05
# Responses before and after the restart.
MANY: Final = 200


@contextmanager
def bound_socket() -> Iterator[socket.socket]:
    """Open a port, as a socket unit of systemd does, and keep it open until the block ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=1_024) as bound:
        yield bound


class SteadyClients:
    """Clients that send reports at a steady rate, which leaves time to start processes.

    Half of them keep their connection, the others open one for each report. A report without a response is sent
    again. POST is sent once by aiohttp, while it would silently send a PUT again.
    """

    def __init__(self, url: str) -> None:
        self.receipts: list[dict[str, Any]] = []
        self.refusals: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.slowest_seconds = 0.0
        self._url = url
        self._numbers = count(1)

    async def run(self, *, keeps: bool) -> None:
        """Send until cancelled."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not keeps)) as session:
            while True:
                number = next(self._numbers)
                body = {"order_no": f"KOM{number % 50}", "cnote": "AWB1", "status": "Dikirim", "number": number}
                while not await self._send(session, body):
                    pass
                await asyncio.sleep(PAUSE_SECONDS)

    async def _send(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> bool:
        began = monotonic()
        try:
            async with session.post(self._url, json=body) as response:
                if response.status == 200:
                    self.receipts.append(await response.json())
                else:
                    self.refusals[f"{response.status} {await response.text()}"] += 1
        except aiohttp.ClientConnectionError as error:
            self.errors[repr(error)] += 1
            await asyncio.sleep(0.01)
            return False
        self.slowest_seconds = max(self.slowest_seconds, monotonic() - began)
        return True

    async def proceeds(self) -> None:
        """Wait until more reports are recorded."""
        target = len(self.receipts) + MANY
        await until_async(condition(lambda: len(self.receipts) >= target), lambda: (self.errors, self.refusals))


@asynccontextmanager
async def steady_clients(url: str) -> AsyncIterator[SteadyClients]:
    """Send reports during the block, and before and after it."""
    load = SteadyClients(url)
    clients = [asyncio.create_task(load.run(keeps=bool(number % 2))) for number in range(CLIENTS)]
    try:
        await load.proceeds()
        yield load
        await load.proceeds()
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
