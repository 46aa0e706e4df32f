"""The operator's view of a service: its readiness, its metrics, and its log."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service.ingest.refusals import Cause
from tests.support.account import Violations
from tests.support.connections import OK, UNAVAILABLE, Connections, get
from tests.support.waiting import condition, until_async

LOOK_SECONDS: Final = 0.1
# Each look checks the readiness; a scrape costs the service more.
LOOKS_A_SCRAPE: Final = 10
# The database does not respond to the check itself.
NO_CAUSE: Final = ""
REFUSED: Final = "webhooks are refused"
RECORDED_AGAIN: Final = "webhooks are recorded again"
COUNTER: Final = re.compile(rb'^webhook_refusals_total\{cause="(\w+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class Told:
    """The information that an operator must get about a fault.

    Args:
        causes: the causes of refused webhooks. At least one must be logged, counted and shown by ``/readyz``.
        is_ready: whether ``/readyz`` may stay 200: the fault is brief, or other processes cannot help.
        logged: texts that lines of the service's log must contain.
    """

    causes: tuple[Cause, ...] = ()
    is_ready: bool = False
    logged: tuple[str, ...] = ()


class Operator:
    """Looks at the service during the whole run, on separate connections.

    Args:
        port: the service's port.
        read_logs: returns the log of every service process until now.
    """

    def __init__(self, port: int, read_logs: Callable[[], str]) -> None:
        self._connections = Connections(port)
        self._read_logs = read_logs
        self._counted: Counter[str] = Counter()
        self._shown: set[str] = set()
        # Further information that a fault has found, such as a line of ``order-tracking check``.
        self.findings: list[str] = []

    async def watch(self) -> None:
        """Look until cancelled."""
        try:
            for number in range(10**9):
                await self._check_readiness()
                if number % LOOKS_A_SCRAPE == 0:
                    await self._scrape()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._connections.close()

    async def _check_readiness(self) -> bool:
        response = await self._connections.request(get("/readyz"))
        if response is not None and response.status == UNAVAILABLE:
            self._shown.add(json.loads(response.body).get("cause", NO_CAUSE))
        return response is not None and response.status == OK

    async def _scrape(self) -> None:
        response = await self._connections.request(get("/metrics"))
        if response is not None and response.status == OK:
            for cause, value in COUNTER.findall(response.body):
                # A killed process loses its counters.
                self._counted[cause.decode()] = max(self._counted[cause.decode()], int(float(value)))

    async def until_shown(self, cause: Cause) -> None:
        """Wait until ``/readyz`` has given a cause."""
        await until_async(condition(lambda: cause in self._shown), lambda: sorted(self._shown))

    async def until_refused(self) -> None:
        """Wait until ``/readyz`` has been 503."""
        await until_async(condition(lambda: bool(self._shown)))

    async def account(self, told: Told, refused: int, violations: Violations, *, was_restarted: bool) -> None:
        """Compare everything that the operator saw with the declaration.

        Args:
            told: the declaration of the fault.
            refused: the number of webhooks that got 503.
            violations: receives a line for each missing piece of information.
            was_restarted: whether a process with its counters was killed.
        """
        await self._wait_until_ready(violations)
        await self._scrape()
        self._connections.close()
        entries = [*self._entries()]
        logged = {entry["cause"] for entry in entries if entry["event"] == REFUSED}
        total = self._counted.total()
        if refused and not was_restarted:
            violations.expect(total >= refused, f"{refused} webhooks got 503, the metrics have {total}")
        if refused:
            violations.expect(bool(logged), "no log line gives the cause of the refused webhooks")
        last = [entry["event"] for entry in entries if entry["event"] in (REFUSED, RECORDED_AGAIN)][-1:]
        violations.expect(last != [REFUSED], "no log line reports that webhooks are recorded again")
        if told.causes:
            places = {"the log": logged, "the metrics": {cause for cause, n in self._counted.items() if n}}
            if not told.is_ready:
                places["/readyz"] = self._shown
            for place, causes in places.items():
                expected = " or ".join(told.causes)
                is_told = bool(causes.intersection([*told.causes, NO_CAUSE]))
                violations.expect(is_told, f"{place} does not give the cause {expected}: {sorted(causes)}")
        text = self._read_logs()
        for part in told.logged:
            violations.expect(part in text, f"no log line contains {part!r}")

    async def _wait_until_ready(self, violations: Violations) -> None:
        try:
            await until_async(self._check_readiness)
        except AssertionError:
            violations.lines.append("/readyz is 503 after the end of the fault")

    def _entries(self) -> Iterator[dict[str, Any]]:
        for line in self._read_logs().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def summary(self, told: Told) -> str:
        """Return what the operator saw, as a cell of the table."""
        causes = [f"{cause} {times:,}" for cause, times in self._counted.most_common() if times]
        logged: Sequence[str] = [f"log: {part}" for part in told.logged if part in self._read_logs()]
        return "; ".join([*causes, *logged, *self.findings])
