"""HTTP load from wrk if it is on the PATH, otherwise from our own generator in a separate process."""

import asyncio
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from tests.support.connections import OK, Answer, Connections
from tests.support.load import request_all

CONNECTIONS: Final = 64
STATUSES: Final = ("Diajukan", "Dijemput", "Dikirim", "Diterima")
# The next report of an order follows the reports of this many other orders, because hours lie between them in
# practice.
ORDERS_INTERLEAVED: Final = 512
# A generator that exceeds its time by this much is ended.
OVERTIME_SECONDS_MAX: Final = 30
# Tokens are enabled, as on the open internet.
WEBHOOK_TOKEN: Final = "a-token-of-the-benchmarks"  # noqa: S105 - of a service that lives for one run
# The run of orders that no load reports.
UNKNOWN_RUN: Final = 999
ORDER_DIGITS: Final = 7
WEBHOOK_PATH: Final = f"/webhook/{WEBHOOK_TOKEN}"
OWN: Final = "an asyncio generator of our own (wrk is not on the PATH)"

LUA_REPORTS: Final = """
local heads, tails, sent = {%(heads)s}, {%(tails)s}, 0
function request()
    local at, order = sent %% %(block)d, nil
    order = string.format("%%07d", (sent - at) / %(statuses)d + at %% %(interleaved)d)
    local status = math.floor(at / %(interleaved)d) + 1
    sent = sent + 1
    return heads[status] .. order .. %(middle)s .. order .. tails[status]
end
"""
LUA_READS: Final = """
math.randomseed(%(orders)d)
function request()
    return %(head)s .. string.format("%%0%(digits)dd", math.random(%(orders)d) - 1) .. %(tail)s
end
"""
LUA_DONE: Final = """
function done(summary, latency)
    local errors = summary.errors
    local cut = errors.connect + errors.read + errors.write + errors.timeout
    io.write(string.format("result %d %d %d %d %d\\n",
        summary.requests, errors.status, cut, summary.duration, latency:percentile(99)))
end
"""


def generator() -> str:
    """Return the name of the load generator on this machine."""
    return "wrk -t1" if shutil.which("wrk") else OWN


def order_number(run: int, order: int) -> str:
    """Return the number of an order of a run. All numbers have the same length, so that all requests do."""
    return f"{order_prefix(run)}{order:0{ORDER_DIGITS}d}"


def order_prefix(run: int) -> str:
    """Return what the numbers of all orders of a run begin with."""
    return f"KOM{run:03d}"


def report(run: int, order: int, status: str) -> bytes:
    """Return the body of a webhook."""
    text = f'{{"order_no":"{order_number(run, order)}","cnote":"JNE{run:03d}{order:07d}","status":"{status}"}}'
    return text.encode()


class Reports(NamedTuple):
    """Endless webhooks, four for each order. ``run`` distinguishes the orders of one load from those of
    another.
    """

    run: int

    def lua(self) -> str:
        """Return the same requests as a wrk script."""
        samples = [_put(report(self.run, 0, status)).decode().split("0000000") for status in STATUSES]
        return LUA_REPORTS % {
            "heads": ", ".join(_quoted(head) for head, _, _ in samples),
            "middle": _quoted(samples[0][1]),
            "tails": ", ".join(_quoted(tail) for _, _, tail in samples),
            "block": len(STATUSES) * ORDERS_INTERLEAVED,
            "statuses": len(STATUSES),
            "interleaved": ORDERS_INTERLEAVED,
        }

    def requests(self) -> Iterator[bytes]:
        """Yield requests without end."""
        first = 0
        while True:
            for status in STATUSES:
                for order in range(first, first + ORDERS_INTERLEAVED):
                    yield _put(report(self.run, order, status))
            first += ORDERS_INTERLEAVED


class Reads(NamedTuple):
    """Reads of random orders, whose numbers are those below ``orders`` behind a prefix.

    Args:
        prefix: the prefix.
        digits: how many digits a number has at least.
        orders: how many orders are read.
        key: the API key of the reader.
        suffix: the rest of the path after the order's number, such as ``/timeline``.
        status: the status of the expected responses.
    """

    prefix: str
    digits: int
    orders: int
    key: str
    suffix: str = ""
    status: int = OK

    def lua(self) -> str:
        """Return the same requests as a wrk script."""
        head, tail = self._get("NUMBER").decode().split("NUMBER")
        return LUA_READS % {
            "orders": self.orders,
            "digits": self.digits,
            "head": _quoted(head),
            "tail": _quoted(tail),
        }

    def requests(self) -> Iterator[bytes]:
        """Yield requests without end."""
        chosen = random.Random(self.orders)
        head, tail = self._get("NUMBER").split(b"NUMBER")
        while True:
            yield b"%s%0*d%s" % (head, self.digits, chosen.randrange(self.orders), tail)

    def _get(self, number: str) -> bytes:
        head = f"GET /orders/{self.prefix}{number}{self.suffix} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        return f"{head}Authorization: Bearer {self.key}\r\n\r\n".encode()


class Load(NamedTuple):
    """The result of a load: expected responses, requests with another response or none, and the duration."""

    answered: int
    failed: int
    seconds: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Return the number of expected responses a second."""
        return self.answered / self.seconds


Loads = list[Load] | tuple[Load, ...]


def median(loads: Loads) -> float:
    """Return the median of the responses a second."""
    return statistics.median(done.per_second for done in loads)


def by_round(ours: Loads, others: Loads) -> str:
    """Return the ratio within each round."""
    return " ".join(f"{one.per_second / other.per_second:.2f}" for one, other in zip(ours, others, strict=True))


def median_ratio(ours: Loads, others: Loads) -> float:
    """Return the median of the ratios within the rounds."""
    return statistics.median(one.per_second / other.per_second for one, other in zip(ours, others, strict=True))


def compared(ours: Loads, others: Loads) -> str:
    """Describe two contenders: responses a second, by round, and the 99th percentiles."""
    return (
        f"{median(ours):,.0f}/s against {median(others):,.0f}/s; by round {by_round(ours, others)}; "
        f"p99 {statistics.median(one.p99_ms for one in ours):.1f} ms against "
        f"{statistics.median(one.p99_ms for one in others):.1f} ms"
    )


def run(requests: Reports | Reads, port: int, seconds: int, folder: Path) -> Load:
    """Send requests for some seconds over CONNECTIONS connections without pipelining."""
    time_max = seconds + OVERTIME_SECONDS_MAX
    if wrk := shutil.which("wrk"):
        script = folder / "load.lua"
        script.write_text(requests.lua() + LUA_DONE, encoding="utf-8")
        command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script)]
        output = _output([*command, f"http://127.0.0.1:{port}"], time_max)
        found = re.search(r"^result (\d+) (\d+) (\d+) (\d+) (\d+)$", output, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"wrk gave no result: {output}")
        total, refused, cut, duration_us, p99_us = map(int, found.groups())
        # wrk counts errors, not each status.
        expected = total - refused if _expected_status(requests) == OK else refused
        return Load(expected, total - expected + cut, duration_us / 1e6, p99_us / 1e3)
    arguments = json.dumps([type(requests).__name__, list(requests), port, seconds, 0])
    return Load(*json.loads(_output([sys.executable, "-m", __name__, arguments], time_max)))


def run_at(requests: Reports | Reads, port: int, seconds: int, per_second: int) -> Load:
    """Send requests on schedule, whether or not earlier ones were answered, with our own generator."""
    arguments = json.dumps([type(requests).__name__, list(requests), port, seconds, per_second])
    return Load(
        *json.loads(_output([sys.executable, "-m", __name__, arguments], seconds + OVERTIME_SECONDS_MAX))
    )


def _expected_status(requests: Reports | Reads) -> int:
    return requests.status if isinstance(requests, Reads) else OK


def _output(command: list[str], seconds_max: float) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds_max).stdout


def _quoted(text: str) -> str:
    # JSON and Lua have the same escapes for these texts.
    return json.dumps(text)


def _put(body: bytes) -> bytes:
    head = f"PUT {WEBHOOK_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _until(due: float, requests: Iterator[bytes]) -> Iterator[bytes]:
    while time.perf_counter() < due:
        yield next(requests)


async def _send_on_schedule(
    connections: Connections, requests: Iterator[bytes], seconds: int, per_second: int
) -> list[Answer | None]:
    began = time.perf_counter()
    sent: list[asyncio.Task[Answer | None]] = []
    for number in range(seconds * per_second):
        await asyncio.sleep(max(0.0, began + number / per_second - time.perf_counter()))
        sent.append(asyncio.create_task(connections.request(next(requests))))
    return await asyncio.gather(*sent)


async def _generate(requests: Reports | Reads, port: int, seconds: int, per_second: int) -> Load:
    connections = Connections(port)
    await connections.open(CONNECTIONS)
    began = time.perf_counter()
    if per_second:
        answers = await _send_on_schedule(connections, requests.requests(), seconds, per_second)
    else:
        answers = await request_all(connections, _until(began + seconds, requests.requests()), CONNECTIONS)
    took = time.perf_counter() - began
    connections.close()
    status = _expected_status(requests)
    answered = [answer.seconds for answer in answers if answer is not None and answer.status == status]
    p99 = statistics.quantiles(answered, n=100)[-1]
    return Load(len(answered), len(answers) - len(answered), took, p99 * 1e3)


if __name__ == "__main__":
    kind, values, to_port, for_seconds, at_rate = json.loads(sys.argv[1])
    wanted = {"Reports": Reports, "Reads": Reads}[kind](*values)
    sys.stdout.write(json.dumps(uvloop.run(_generate(wanted, to_port, for_seconds, at_rate))))
