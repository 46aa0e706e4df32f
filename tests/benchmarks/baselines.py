"""The HTTP baselines of the service, each an aiohttp application in a separate process.

``python -m tests.benchmarks.baselines nothing PORT ANSWERS`` parses a body, stores nothing and responds.
``python -m tests.benchmarks.baselines library PORT DSN`` records with the eventsourcing library's own classes.
"""

import asyncio
import gc
import json
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import orjson
import uvloop
from aiohttp import web
from eventsourcing.application import AggregateNotFoundError, Application
from psycopg.conninfo import conninfo_to_dict

from domain.order import Arrival, Order, Report
from tests.benchmarks.load import WEBHOOK_PATH

# The threads and connections of the library's application. 4, 8, 16 and 32 were tried: because each commit
# locks the table, more threads only wait for the lock and for each other.
LIBRARY_THREADS: Final = 4


def do_nothing(answers: dict[str, Any]) -> web.Application:
    """Parse the same body as the service, store nothing, and send responses of the same size.

    Args:
        answers: the responses to a webhook, ``receipt``, and to reads, ``order`` and ``timeline``; each of
            them a body and its headers.
    """
    receipt_text, receipt_headers = answers["receipt"]
    receipt = receipt_text.encode()

    async def receive(request: web.Request) -> web.Response:
        orjson.loads(await request.read())
        return web.Response(body=receipt, headers=receipt_headers)

    def show(name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        text, headers = answers[name]
        body = text.encode()

        async def respond(_request: web.Request) -> web.Response:
            return web.Response(body=body, headers=headers)

        return respond

    app = web.Application()
    app.add_routes(
        [
            web.put(WEBHOOK_PATH, receive),
            web.get("/orders/{order_no}", show("order")),
            web.get("/orders/{order_no}/timeline", show("timeline")),
        ]
    )
    return app


class Orders(Application[str]):
    """The library's application with its own repository, recorder and transcoder."""

    def record(self, raw: bytes) -> dict[str, Any]:
        """Record one report, and return its receipt after the commit."""
        body = orjson.loads(raw)
        order_no, status = body["order_no"], body["status"]
        arrival = Arrival(str(uuid4()), datetime.now(UTC))
        report = Report(arrival, order_no, status, body["cnote"], raw.decode())
        try:
            order: Order = self.repository.get(order_no)
        except AggregateNotFoundError:
            order = Order.new(order_no)
        event = order.report(report)
        (recording,) = self.save(order)
        return {
            "outcome": event.verdict,
            "report_id": event.report_id,
            "order_no": order_no,
            "version": event.originator_version,
            "position": recording.notification.id,
            "status": event.status,
            "reported_status": status,
            "skipped": event.skipped,
            "reason": event.reason,
        }


def library(dsn: str) -> web.Application:
    """Record each report when it arrives with the library's Application and PostgreSQL recorder, in threads."""
    parts = conninfo_to_dict(dsn)
    orders = Orders(
        env={
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "ORIGINATOR_ID_TYPE": "text",
            "POSTGRES_HOST": str(parts["host"]),
            "POSTGRES_PORT": str(parts["port"]),
            "POSTGRES_USER": str(parts["user"]),
            "POSTGRES_PASSWORD": "none is asked for",
            "POSTGRES_DBNAME": str(parts["dbname"]),
            "POSTGRES_POOL_SIZE": str(LIBRARY_THREADS),
            "POSTGRES_MAX_OVERFLOW": "4",
        }
    )
    threads = ThreadPoolExecutor(LIBRARY_THREADS)

    async def receive(request: web.Request) -> web.Response:
        raw = await request.read()
        receipt = await asyncio.get_running_loop().run_in_executor(threads, orders.record, raw)
        return web.Response(body=orjson.dumps(receipt), content_type="application/json")

    app = web.Application()
    app.add_routes([web.put(WEBHOOK_PATH, receive)])
    return app


if __name__ == "__main__":
    kind, port, argument = sys.argv[1:]
    application = do_nothing(json.loads(argument)) if kind == "nothing" else library(argument)
    gc.freeze()
    web.run_app(
        application,
        host="127.0.0.1",
        port=int(port),
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
