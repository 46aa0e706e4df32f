"""The webhook: HTTP to raw bytes, and the receipt back. 200 means committed."""

from collections.abc import Iterator
from datetime import UTC, datetime
from os import urandom
from typing import Final, NamedTuple

import structlog
from aiohttp import web

from service.http.problems import answer
from service.http.server import read_body
from service.ingest.idempotency import KEY_BYTES_MAX, KEY_HEADERS
from service.ingest.parser import UnreadableError, parse
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Recorder, RefusedReportError
from service.ingest.webhook_auth import Sender

# The sender documents PUT in its samples and POST in its tips.
METHODS: Final = ("POST", "PUT")
UUIDS_AT_ONCE: Final = 64

log = structlog.get_logger()


class _Unread(NamedTuple):
    """A body that could not be understood, and what is known of its arrival."""

    raw: bytes
    report_id: str
    remote: str | None
    received_at: datetime


class Webhook:
    """Takes what the sender pushes.

    Args:
        sender: whom it takes them from.
        recorder: for what can be understood.
        quarantine: for what cannot.
    """

    def __init__(self, sender: Sender, recorder: Recorder, quarantine: Quarantine) -> None:
        self._sender = sender
        self._recorder = recorder
        self._quarantine = quarantine
        self._report_ids = _random_uuids()

    def routes(self) -> list[web.RouteDef]:
        """Every method, since a wrong token must not learn that there is anything here."""
        return [web.route("*", self._sender.path, self.receive)]

    async def receive(self, request: web.Request) -> web.Response:
        """Record one report, or keep what cannot be understood; answer when it is committed."""
        received_at = datetime.now(UTC)
        self._sender.check_caller(request)
        if request.method not in METHODS:
            raise web.HTTPMethodNotAllowed(request.method, METHODS)
        raw = await read_body(request)
        self._sender.check_signature(request, raw)
        remote = self._sender.address_of(request)
        report_id = next(self._report_ids)
        try:
            report = parse(raw, report_id, remote, _idempotency_key(request))
            receipt = await self._recorder.record(report, received_at)
        except UnreadableError as error:
            unread = _Unread(raw, report_id, remote, received_at)
            return await self._keep(unread, str(error), error.order_no)
        except RefusedReportError as error:
            log.warning("report cannot be recorded", report_id=report_id, error=str(error))
            unread = _Unread(raw, report_id, remote, received_at)
            return await self._keep(unread, "it cannot be recorded", report.order_no)
        return answer(receipt)

    async def _keep(self, unread: _Unread, reason: str, order_no: str | None) -> web.Response:
        quarantine_id = await self._quarantine.keep(unread.raw, reason, unread.remote, unread.received_at)
        return answer(
            {
                "outcome": "quarantined",
                "report_id": unread.report_id,
                "order_no": order_no,
                "version": None,
                "position": None,
                "status": None,
                "reported_status": None,
                "skipped": None,
                "reason": reason,
                "quarantine_id": quarantine_id,
            }
        )


def _random_uuids() -> Iterator[str]:
    """Yield random UUIDs (RFC 9562, version 4), a handful for each call to the system's randomness.

    The standard library asks the system for each of them, which takes longer than judging a report.
    """
    while True:
        digits = urandom(16 * UUIDS_AT_ONCE).hex()
        for start in range(0, len(digits), 32):
            one = digits[start : start + 32]
            variant = "89ab"[int(one[16], 16) & 3]
            yield f"{one[:8]}-{one[8:12]}-4{one[13:16]}-{variant}{one[17:20]}-{one[20:]}"


def _idempotency_key(request: web.Request) -> str | None:
    for name in KEY_HEADERS:
        key = request.headers.get(name)
        if key:
            return key if key.isascii() and len(key) <= KEY_BYTES_MAX else None
    return None
