"""Restarts under load, behind a port that stays open: how long the slowest webhook takes."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.benchmarks.report import Row, ratio
from tests.support.processes import RunningService, ended_service
from tests.support.steady_clients import bound_socket, steady_clients

RESTARTS: Final = 3
# The service stops and starts its own PostgreSQL, too.
ALONE_SECONDS_MAX: Final = 5.0
BESIDE_SECONDS_MAX: Final = 1.0


def measure_restarts(dsn: str, folder: Path) -> Iterator[Row]:
    """Measure restarts of a service with the embedded PostgreSQL, and of one beside another on a database."""
    alone, beside = folder / "alone", folder / "beside"
    for one in (alone, beside):
        one.mkdir(mode=0o711)
    yield _measure("a service with the embedded PostgreSQL", [RunningService(alone)], ALONE_SECONDS_MAX)
    services = [RunningService(beside, DATABASE_URL=dsn) for _ in range(2)]
    yield _measure("a service beside another one", services, BESIDE_SECONDS_MAX)


def _measure(what: str, services: Sequence[RunningService], seconds_max: float) -> Row:
    with bound_socket() as bound, ExitStack() as stack:
        for service in services:
            service.inherited = bound
            stack.enter_context(ended_service(service))
        slowest, faults = asyncio.run(_restart(services[0]))
    row = ratio(
        f"slowest webhook during a restart of {what}, s",
        max(slowest),
        f"by restart {' '.join(f'{seconds:.2f}' for seconds in slowest)} s",
        most=seconds_max,
    )
    return row.unless(f"not every webhook was answered with 200: {faults}" if faults else None)


async def _restart(service: RunningService) -> tuple[list[float], str]:
    slowest, faults = [], ""
    for _ in range(RESTARTS):
        async with steady_clients(f"{service.url}/webhook") as clients:
            await asyncio.to_thread(service.terminate)
            await asyncio.to_thread(service.start)
            await clients.proceeds()
        slowest.append(clients.slowest_seconds)
        faults += "".join(map(str, (*clients.refusals, *clients.errors)))
    return slowest, faults
