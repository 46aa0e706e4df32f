"""The cost of live readers: the throughput of webhooks with many of them and without."""

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.benchmarks import load
from tests.benchmarks.report import Row, ratio
from tests.benchmarks.serving import ROUNDS, WARM_SECONDS, Contest

READERS: Final = 500
# The time for all readers to connect.
ATTACH_SECONDS: Final = 3.0


def measure_streams(dsn: str, folder: Path, seconds: int) -> Row:
    """Measure the throughput of webhooks with READERS live readers, as a share of that without them."""
    with Contest(dsn, folder, seconds) as contest:
        contest.send_reports(contest.ours, WARM_SECONDS)
        found = []
        for _ in range(ROUNDS):
            alone, _ = contest.send_reports(contest.ours, seconds)
            with readers(contest.ours.port, contest.key):
                with_readers, _ = contest.send_reports(contest.ours, seconds)
            found.append((with_readers.per_second, alone.per_second))
        fault = contest.fault()
    shares = [one / other for one, other in found]
    made = ratio(
        f"durable webhooks/s with {READERS} live readers of orders, as a share of that without them",
        statistics.median(shares),
        f"{statistics.median(one for one, _ in found):,.0f}/s against "
        f"{statistics.median(other for _, other in found):,.0f}/s; by round "
        f"{' '.join(f'{share:.2f}' for share in shares)}",
        least=0.90,
    )
    return made.unless(fault)


@contextmanager
def readers(port: int, key: str) -> Iterator[None]:
    """Run the readers in a separate process for the length of the block."""
    child = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.streams", str(port), key])
    time.sleep(ATTACH_SECONDS)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


async def _read(port: int, key: str, number: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path = f"/orders/{load.order_number(0, number)}/stream"
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n"
    writer.write(head.encode())
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"a reader was refused: {status.decode()}")
    while await reader.read(65_536):
        pass


async def _read_all(port: int, key: str) -> None:
    await asyncio.gather(*(_read(port, key, number) for number in range(READERS)))


if __name__ == "__main__":
    asyncio.run(_read_all(int(sys.argv[1]), sys.argv[2]))
