"""The webhook: a request becomes a recorded report and a receipt. 200 means committed."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final
from uuid import uuid4

import structlog
from aiohttp import web

from domain.order import Arrival
from service.database.log_identity import LogIdentity
from service.http.body import read_body
from service.http.budgets import OverBudgetError
from service.http.problems import ProblemError, ProblemType, only_reads, unavailable
from service.http.request_ids import caller_trace
from service.http.responses import LOG_HEADER, json_response
from service.ingest.hourly_bytes import HourlyBytes
from service.ingest.idempotency import read_key
from service.ingest.parser import UnreadableError, parse
from service.ingest.quarantine import Quarantine
from service.ingest.recorder import Receipt, Recorder, UnrecordableReportError
from service.ingest.refusals import EXPLANATIONS, BodiesFullError, Path, ReaderError, Refusals
from service.ingest.webhook_auth import Sender, WebhookAuth

# The sender documents PUT in its samples and POST in its tips.
METHODS: Final = ("POST", "PUT")

logger = structlog.get_logger()


class Webhook:
    """Receives the sender's reports.

    Args:
        auth: authenticates the sender.
        recorder: records reports.
        quarantine: keeps unparseable bodies.
        volume: counts the bytes of bodies, and limits them.
        refusals: counts and explains the webhooks that get 503.
        log: the log's id, for the receipts' positions.
    """

    def __init__(  # noqa: PLR0913 - the log is named by its caller
        self,
        auth: WebhookAuth,
        recorder: Recorder,
        quarantine: Quarantine,
        volume: HourlyBytes,
        refusals: Refusals,
        *,
        log: LogIdentity,
    ) -> None:
        self._auth = auth
        self._recorder = recorder
        self._quarantine = quarantine
        self._volume = volume
        self._refusals = refusals
        self._log = log

    @property
    def path(self) -> str:
        """The pattern of the webhook's path."""
        return self._auth.path

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, for every method: a wrong token must look like an unknown path.

        An operator may have registered the URL with a slash at its end.
        """
        return _routes(self.path, self.receive)

    async def receive(self, request: web.Request) -> web.Response:
        """Record one report, or quarantine its body, and respond after the commit."""
        sender = _check_head(self._auth, request)
        if request.headers.get(LOG_HEADER) == self._log.log_id:
            # A delivery of this service, whose endpoint leads back here. Recorded, it would be delivered again.
            problem = ProblemError(ProblemType.LOOP_DETECTED, "a subscription of this service leads back to it")
            problem.headers[LOG_HEADER] = self._log.log_id
            raise problem
        arrival = Arrival(
            str(uuid4()),
            datetime.now(UTC),
            sender.address,
            sender.token_name,
            traceparent=caller_trace(request),
        )
        path: Path = "body"
        try:
            body = await self._read(request)
            claim = read_key(request.headers)
            try:
                report = parse(body, arrival)
                path = "plain" if claim is None else "keyed"
                receipt = await self._recorder.record(report, claim)
            except UnreadableError as error:
                path = "quarantine"
                receipt = await self._quarantine_body(body, arrival, str(error), error.order_no)
            except UnrecordableReportError as error:
                path = "quarantine"
                logger.warning("report cannot be recorded", report_id=arrival.report_id, error=str(error))
                receipt = await self._quarantine_body(
                    body, arrival, "the report cannot be recorded", report.order_no
                )
        except (ProblemError, web.HTTPException):
            # The request is at fault, or its sender.
            raise
        except Exception as error:
            cause = await self._refusals.count(error, path)
            if cause == "failed":
                raise
            raise unavailable(EXPLANATIONS[cause], cause=cause) from error
        self._refusals.end(path)
        response = json_response(receipt)
        response.headers[LOG_HEADER] = self._log.log_id
        return response

    async def _read(self, request: web.Request) -> bytes:
        try:
            body = await read_body(request)
        except OverBudgetError as error:
            raise BodiesFullError(str(error)) from None
        self._auth.check_signature(request, body)
        self._volume.accept(len(body))
        return body

    async def _quarantine_body(
        self, body: bytes, arrival: Arrival, reason: str, order_no: str | None
    ) -> Receipt:
        quarantine_id = await self._quarantine.keep(body, reason, arrival, order_no)
        return {
            "outcome": "quarantined",
            "report_id": arrival.report_id,
            "order_no": order_no,
            "version": None,
            "position": None,
            "status": None,
            "reported_status": None,
            "skipped": None,
            "reason": reason,
            "quarantine_id": quarantine_id,
            "ignored": [],
        }


class RefusedWebhook:
    """The webhook of a process that only reads: it refuses every report with 503, before its body is read.

    Args:
        auth: authenticates the sender, since a wrong token must look like an unknown path here too.
        refusals: counts and explains the webhooks that get 503.
    """

    def __init__(self, auth: WebhookAuth, refusals: Refusals) -> None:
        self._auth = auth
        self._refusals = refusals

    def routes(self) -> list[web.RouteDef]:
        """Return the same routes as of a process that records."""
        return _routes(self._auth.path, self.refuse)

    async def refuse(self, request: web.Request) -> web.Response:
        """Refuse one report."""
        _check_head(self._auth, request)
        problem = only_reads()
        await self._refusals.count(ReaderError(problem.detail), "body")
        raise problem


def _routes(path: str, handler: Callable[[web.Request], Awaitable[web.Response]]) -> list[web.RouteDef]:
    return [web.route("*", f"{path}{slash}", handler) for slash in ("", "/")]


def _check_head(auth: WebhookAuth, request: web.Request) -> Sender:
    sender = auth.check_request(request)
    if request.method not in METHODS:
        raise web.HTTPMethodNotAllowed(request.method, METHODS)
    return sender
