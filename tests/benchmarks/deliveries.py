"""The cost of subscriptions: deliveries against a bare client, and webhooks with subscriptions and without.

``python -m tests.benchmarks.deliveries shop PORT`` is an endpoint that reads a message and accepts it.
``python -m tests.benchmarks.deliveries post URL FILE`` posts the bodies in a file, unsigned, and prints the
seconds.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop
from aiohttp import web

from service.features.subscriptions.delivery import IN_FLIGHT_MAX
from tests.benchmarks.report import Row, ratio
from tests.benchmarks.serving import ROUNDS, WARM_SECONDS, Contest, Process

SUBSCRIPTIONS: Final = 3
# The events of one measured delivery.
EVENTS: Final = 10_000
NETWORKS: Final = "127.0.0.0/8"
POLL_SECONDS: Final = 0.05
DELIVER_SECONDS_MAX: Final = 120


def measure_deliveries(dsn: str, folder: Path, seconds: int) -> Iterator[Row]:
    """Compare deliveries with a bare client, and webhooks with subscriptions with those without."""
    with Contest(dsn, folder, seconds, ORDER_TRACKING_SUBSCRIPTION_NETWORKS=NETWORKS) as contest:
        shop = contest.start("tests.benchmarks.deliveries", "shop", "PORT")
        contest.send_reports(contest.ours, WARM_SECONDS)
        yield _compare_rates(contest, shop, folder)
        found = []
        for _ in range(ROUNDS):
            alone, _ = contest.send_reports(contest.ours, seconds)
            added = [_add(contest, shop) for _ in range(SUBSCRIPTIONS)]
            with_subscriptions, _ = contest.send_reports(contest.ours, seconds)
            for subscription_id in added:
                _ask(contest, "DELETE", f"/subscriptions/{subscription_id}")
            found.append((with_subscriptions.per_second, alone.per_second))
        fault = contest.fault()
    shares = [one / other for one, other in found]
    yield ratio(
        f"durable webhooks/s with {SUBSCRIPTIONS} subscriptions, as a share of that without them",
        statistics.median(shares),
        f"{statistics.median(one for one, _ in found):,.0f}/s against "
        f"{statistics.median(other for _, other in found):,.0f}/s; by round "
        f"{' '.join(f'{share:.2f}' for share in shares)}",
        least=0.90,
    ).unless(fault)


def _compare_rates(contest: Contest, shop: Process, folder: Path) -> Row:
    """Deliver the last events, and post the same bodies with a bare client, in turns."""
    url = f"http://127.0.0.1:{shop.port}/hooks"
    head = _ask(contest, "GET", "/projections")["head"]
    bodies = folder / "bodies"
    bodies.write_text(json.dumps([json.dumps(_message(number)) for number in range(EVENTS)]), encoding="utf-8")
    ours, bare = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subscription_id = _add(contest, shop, from_position=max(0, head - EVENTS))
        path = f"/subscriptions/{subscription_id}"
        while (found := _ask(contest, "GET", path))["lag_events"] or found["held_orders"]:
            if time.perf_counter() > began + DELIVER_SECONDS_MAX:
                raise RuntimeError("the deliveries do not end")
            time.sleep(POLL_SECONDS)
        ours.append(found["delivered"] / (time.perf_counter() - began))
        _ask(contest, "DELETE", path)
        command = [sys.executable, "-m", __name__, "post", url, str(bodies)]
        bare.append(EVENTS / float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    return ratio(
        "deliveries/s to one endpoint, as a share of a bare client's unsigned requests",
        statistics.median(ratios),
        f"{statistics.median(ours):,.0f}/s against {statistics.median(bare):,.0f}/s; by round "
        f"{' '.join(f'{one:.2f}' for one in ratios)}; {EVENTS:,} events",
        least=0.50,
    )


def _message(number: int) -> dict[str, Any]:
    """Return a body of the same members as a message."""
    time_text = "2026-11-26T08:34:05.123456Z"
    data = {
        "order_no": f"KOM001{number:07d}",
        "cnote": f"JNE001{number:07d}",
        "status": "in_transit",
        "status_label": {"id": "Dikirim", "en": "In transit"},
        "previous_status": "picked_up",
        "version": 3,
        "position": number,
        "verdict": "advanced",
        "reported_status": "Dikirim",
        "skipped": [],
        "reason": None,
        "received_at": time_text,
        "occurred_at": None,
    }
    return {"type": "order.advanced", "timestamp": time_text, "data": data}


def _add(contest: Contest, shop: Process, **more: Any) -> str:
    body = {"url": f"http://127.0.0.1:{shop.port}/hooks", "verdicts": [], **more}
    return str(_ask(contest, "POST", "/subscriptions", body)["subscription_id"])


def _ask(contest: Contest, method: str, path: str, body: object = None) -> Any:
    raw = None if body is None else json.dumps(body).encode()
    text, _ = contest.ours.ask(method, path, raw, key=contest.key)
    return json.loads(text) if text else None


async def _serve_shop(port: int) -> None:
    async def accept(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=204)

    app = web.Application()
    app.add_routes([web.post("/hooks", accept), web.get("/livez", accept)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def _post(url: str, bodies: Sequence[bytes]) -> float:
    numbers = count()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            while (number := next(numbers)) < len(bodies):
                headers = {"Content-Type": "application/json"}
                async with session.post(url, data=bodies[number], headers=headers) as response:
                    await response.read()

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT_MAX)))
        return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1] == "shop":
        uvloop.run(_serve_shop(int(sys.argv[2])))
    else:
        texts = [text.encode() for text in json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))]
        sys.stdout.write(f"{uvloop.run(_post(sys.argv[2], texts))}")
