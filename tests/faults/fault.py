"""A fault: what it breaks, and in which world."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from projections.postgres import Connection
from tests.faults.operator import Told
from tests.faults.world import Layout, World
from tests.support.connections import OK, UNAVAILABLE, get
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

# PostgreSQL is run by the service, or by the harness, or behind the harness's proxy.
OWN: Final = Layout()
GIVEN: Final = Layout(given_postgres=True)
PROXIED: Final = Layout(given_postgres=True, through_proxy=True)
# A database whose commits can be lost: reports with and without keys, and a shop that subscribes to all events.
WITNESSED: Final = Layout(given_postgres=True, per_second=100.0, has_keys=True, has_shop=True)


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Args:
        name: its name on the command line.
        claim: its name in the table.
        layout: the world that it needs.
        break_it: breaks something, and returns how often.
        told: what the operator must learn of it.
        is_short: whether it is a part of ``make test``.
    """

    name: str
    claim: str
    layout: Layout
    break_it: Callable[[World], Awaitable[int]]
    told: Told = field(default_factory=Told)
    is_short: bool = False


async def expect_status(world: World, path: str, status: int) -> None:
    answer = await world.connections.request(get(path))
    got = answer.status if answer is not None else "no answer"
    world.violations.expect(got == status, f"GET {path}: {got} in place of {status}")


async def until_ready(world: World) -> None:
    """Wait until ``/readyz`` has noticed that webhooks are recorded again."""

    async def is_ready() -> bool:
        answer = await world.connections.request(get("/readyz"))
        return answer is not None and answer.status == OK

    await until_async(is_ready)


def expect_more_refused(world: World, before: int) -> None:
    refused = world.connections.answers[UNAVAILABLE] - before
    world.violations.expect(refused > 0, "nothing was refused: this broke nothing")


async def expect_check_fails(world: World) -> None:
    """Expect that ``check`` finds something wrong."""
    code, output = await world.command("check")
    world.violations.expect(code == 1, "check finds nothing wrong")
    world.operator.findings += [f"check: {line}" for line in output.splitlines() if "WRONG" in line]


async def until_refused(world: World) -> None:
    """Wait until webhooks get 503 and ``/readyz`` has noticed it."""
    before = len(world.load.refused)
    await until_async(condition(lambda: len(world.load.refused) > before))
    await world.operator.until_refused()


async def find_backend(connection: Connection, statement: str, known: list[int]) -> int:
    """Return the server process whose last statement matches, except the known ones."""
    find = """
        SELECT pid FROM pg_stat_activity
        WHERE query LIKE $1 AND pid <> pg_backend_pid() AND pid <> ALL($2::int[])
        ORDER BY query_start DESC LIMIT 1
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (pid := await connection.fetchval(find, statement, known)) is None:  # noqa: ASYNC110 - of the server
            await asyncio.sleep(0.05)
    return int(pid)
