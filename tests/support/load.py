"""The load generator: it sends reports on a schedule or without a pause, and follows the log's tail."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.support.connections import GONE, OK, UNAVAILABLE, Answer, Connections, get, put
from tests.support.waiting import PATIENCE_SECONDS, until_async

# At this limit, due reports are skipped and counted, because the load no longer follows its schedule.
IN_FLIGHT_MAX: Final = 4_000
HOT_ORDERS: Final = 8
STATUSES: Final = ("Diajukan", "Dijemput", "Dikirim", "Diantar", "Diterima", "Kendala", "Retur", "Batal")
# The pause before a report with an unknown outcome is sent again.
RETRY_SECONDS: Final = 0.25
# The time for pending retries after the load has ended.
FINISH_SECONDS_MAX: Final = PATIENCE_SECONDS
TAIL_PAUSE_SECONDS: Final = 0.05
TAIL_PAGE_EVENTS: Final = 1_000


class Journal:
    """The intents, one line for each attempt, written before the report is sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w", encoding="utf-8")

    def write(self, body: str) -> None:
        self._file.write(body + "\n")
        self._file.flush()

    def attempts(self) -> Counter[str]:
        """Return the number of intended attempts for each body."""
        with self._path.open(encoding="utf-8") as lines:
            return Counter(line.rstrip("\n") for line in lines)

    def close(self) -> None:
        self._file.close()


class Acknowledged(NamedTuple):
    """A 200 response: the body that was sent, the receipt, the time of arrival and the duration."""

    body: str
    receipt: dict[str, Any]
    at: float
    seconds: float


class Refused(NamedTuple):
    """A 503 response: the body that was sent, and when it was sent and answered, by the machine's clock."""

    body: str
    sent_at: float
    answered_at: float


class NotRecoveredError(Exception):
    """The service does not acknowledge reports again after the end of a fault."""


class Load:
    """A steady rate of reports that does not depend on the responses.

    Half of the reports go to a few hot orders, and each has a unique mark in its body. The other half go to one
    new order each and are sent again, byte for byte, until the response is 200. If ``retries`` is off, no
    report is sent again. If ``has_keys`` is on, every fourth of them has an idempotency key.
    """

    def __init__(self, connections: Connections, journal: Journal, chance: random.Random, name: str) -> None:
        self.connections = connections
        self.journal = journal
        self.acknowledged: list[Acknowledged] = []
        # The duration of each response of 503, in seconds.
        self.refused: list[float] = []
        self.refusals: list[Refused] = []
        self.unanswered: list[str] = []
        self.skipped = 0
        self.retries = True
        self.has_keys = False
        # After so many reports of each hot order, other orders become hot; None for never.
        self.reports_by_order: int | None = None
        self._chance = chance
        self._name = name
        self._numbers = count(1)
        self._stopped = asyncio.Event()
        self._sending = asyncio.Event()
        self._sending.set()
        self._given_up = asyncio.Event()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._keys: set[str] = set()
        self._has_key = cycle((True, False, False, False))

    async def run(self, per_second: float) -> None:
        """Send on schedule until ``finish``."""
        began = time.monotonic()
        for number in count():
            await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
            if not self._sending.is_set():
                paused = time.monotonic()
                await self._sending.wait()
                began += time.monotonic() - paused
            if self._stopped.is_set():
                return
            if len(self._in_flight) >= IN_FLIGHT_MAX:
                self.skipped += 1
                continue
            task = asyncio.create_task(self._report())
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    def pause(self) -> None:
        """Send no new reports until ``resume``. Unanswered ones are still sent again."""
        self._sending.clear()

    def resume(self) -> None:
        """Continue the schedule."""
        self._sending.set()

    async def quiet(self) -> None:
        """Pause, and wait until every report has its final response."""
        self.pause()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self._in_flight:
                await asyncio.wait({*self._in_flight})

    async def finish(self) -> None:
        """End the schedule, and wait for the reports in flight."""
        self._stopped.set()
        if self._in_flight:
            await asyncio.wait({*self._in_flight}, timeout=FINISH_SECONDS_MAX)
        self._given_up.set()
        if self._in_flight:
            await asyncio.wait({*self._in_flight})

    async def drop(self) -> None:
        """End the load at once, without waiting for the reports in flight."""
        self._stopped.set()
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    async def attempt(self, body: str, key: str = "") -> Answer | None:
        """Send one report once. All attempts with one idempotency key are one intent."""
        if not key or key not in self._keys:
            self._keys.add(key)
            self.journal.write(body)
        sent_at = time.time()
        answer = await self.connections.request(put(body, key))
        if answer is not None and answer.status == OK:
            receipt = json.loads(answer.body)
            self.acknowledged.append(Acknowledged(body, receipt, time.monotonic(), answer.seconds))
        elif answer is not None and answer.status == UNAVAILABLE:
            self.refused.append(answer.seconds)
            self.refusals.append(Refused(body, sent_at, time.time()))
        return answer

    async def attempt_all(self, bodies: Iterator[str], callers: int) -> None:
        """Send reports without a pause: a caller sends its next report after the response to its last one."""

        async def call() -> None:
            for body in bodies:
                await self.attempt(body)

        await asyncio.gather(*(call() for _ in range(callers)))

    def next_body(self) -> tuple[str, bool]:
        """Return the next report, and whether it may be sent again: only the single report of an order may."""
        number = next(self._numbers)
        is_single = number % 2 == 0
        order = f"{self._name}-S{number}" if is_single else f"{self._name}-H{number % (2 * HOT_ORDERS)}"
        if not is_single and self.reports_by_order is not None:
            order += f"-{number // (2 * HOT_ORDERS * self.reports_by_order)}"
        status = self._chance.choice(STATUSES)
        text = {"order_no": order, "cnote": f"C{number}", "status": status, "mark": f"{self._name}-{number}"}
        return json.dumps(text), is_single

    async def recovered(self, more: int = 100) -> None:
        """Wait until the service acknowledges the load again.

        Raises:
            NotRecoveredError: the service does not do so within PATIENCE_SECONDS.
        """
        target = len(self.acknowledged) + more
        due = time.monotonic() + PATIENCE_SECONDS
        while len(self.acknowledged) < target:
            if time.monotonic() > due:
                raise NotRecoveredError(f"no reports are acknowledged: {dict(self.connections.answers)}")
            await asyncio.sleep(0.02)

    async def proceeds(self, more: int = 100) -> bool:
        """Wait until the service acknowledges the load; return whether it did so without a refusal."""
        target, refused = len(self.acknowledged) + more, len(self.refused)

        async def is_decided() -> bool:
            return len(self.acknowledged) >= target or len(self.refused) > refused

        await until_async(is_decided)
        return len(self.refused) == refused

    def p99_seconds(self, since: float) -> float:
        """Return the 99th percentile of the duration of the 200 responses after a moment."""
        took = sorted(one.seconds for one in self.acknowledged if one.at > since)
        return took[len(took) * 99 // 100] if took else 0.0

    async def _report(self) -> None:
        body, is_single = self.next_body()
        # Reports with keys are recorded one by one, so a service can take fewer of them.
        key = json.loads(body)["mark"] if is_single and self.has_keys and next(self._has_key) else ""
        while True:
            answer = await self.attempt(body, key)
            if not (is_single and self.retries) or (answer is not None and answer.status != UNAVAILABLE):
                return
            if self._given_up.is_set():
                self.unanswered.append(body)
                return
            pause = float(answer.retry_after_seconds or 0) if answer is not None else RETRY_SECONDS
            await asyncio.sleep(pause * self._chance.uniform(1.0, 1.5))


async def request_all(connections: Connections, requests: Iterator[bytes], callers: int) -> list[Answer | None]:
    """Send requests without a pause, and return their responses; None stands for a missing one."""
    answers: list[Answer | None] = []

    async def call() -> None:
        for request in requests:
            answers.append(await connections.request(request))  # noqa: PERF401 - as they come

    await asyncio.gather(*(call() for _ in range(callers)))
    return answers


class Tail:
    """A reader that follows the growing log over HTTP and never rereads an event.

    If the log has lost its last event (410), it begins again.
    """

    def __init__(self, connections: Connections) -> None:
        self.seen: list[tuple[int, str, int, str]] = []
        self.times_gone = 0
        self._connections = connections

    async def follow(self) -> None:
        """Read until cancelled, and try again after an error or a missing response."""
        while True:
            place = ""
            if self.seen:
                position, _, _, report_id = self.seen[-1]
                place = f"&after={position}&last={report_id}"
            answer = await self._connections.request(get(f"/events?limit={TAIL_PAGE_EVENTS}{place}"))
            if answer is not None and answer.status == OK:
                page = json.loads(answer.body)["events"]
                self.seen += [
                    (event["position"], event["order_no"], event["version"], event["data"]["report_id"])
                    for event in page
                ]
                if len(page) == TAIL_PAGE_EVENTS:
                    continue
            elif answer is not None and answer.status == GONE:
                self.times_gone += 1
                self.seen.clear()
            await asyncio.sleep(TAIL_PAUSE_SECONDS)
