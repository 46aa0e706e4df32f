"""The responses of a service that waits for its database: it is alive, but not ready."""

import asyncio
from collections import Counter
from time import monotonic
from typing import Final

import structlog
from aiohttp import web

from service.background import wait_for_event
from service.http.problems import unavailable
from service.http.responses import json_response
from service.http.server import RequestHandler
from service.ingest.refusals import Cause, find_cause
from service.version import build_info

# How often a cause that lasts is logged again.
REMINDER_SECONDS: Final = 300.0
LIVENESS_PATH: Final = "/livez"
READINESS_PATH: Final = "/readyz"
WEBHOOK_PATH: Final = "/webhook"

logger = structlog.get_logger()


class Starting:
    """Responds to requests until the service is ready, and explains why it is not.

    Until the first attempt to reach the database has failed, requests are held back: usually the service can
    serve them in a moment.

    Args:
        database: the database's hosts, without secrets.
        seconds_max: how long a request is held back.
        reminder_seconds: how often a cause that lasts is logged again.
    """

    def __init__(self, database: str, seconds_max: float, reminder_seconds: float = REMINDER_SECONDS) -> None:
        self.database = database
        # Until the first attempt has failed, nothing else is known.
        self.cause: Cause = "no_answer"
        # The webhooks that got 503.
        self.refused: Counter[Cause] = Counter()
        self._seconds_max = seconds_max
        self._reminder_seconds = reminder_seconds
        self._logged: Cause | None = None
        self._log_at = 0.0
        self._is_decided = asyncio.Event()
        self._successor: RequestHandler | None = None

    def note(self, error: Exception) -> bool:
        """Note why an attempt failed, and log it if it is new or has lasted; return whether it is the first."""
        is_first = self._logged is None
        self.cause = find_cause(error)
        if self.cause != self._logged or monotonic() >= self._log_at:
            self._logged = self.cause
            self._log_at = monotonic() + self._reminder_seconds
            logger.warning(
                "waiting for the database", database=self.database, cause=self.cause, error=str(error)
            )
        self._is_decided.set()
        return is_first

    def end(self, successor: RequestHandler | None = None) -> None:
        """Respond to the requests that are held back.

        Args:
            successor: handles them; None if the process ends.
        """
        self._successor = successor
        self._is_decided.set()
        if successor is not None and self._logged is not None:
            logger.info("the database is ready", database=self.database, refused=self.refused.total())

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Respond to a request that no application has routed yet. Its body is not read.

        Raises:
            ProblemError: the service is not ready.
        """
        if request.path == LIVENESS_PATH:
            return json_response({"status": "alive", **build_info()})
        if request.path == READINESS_PATH:
            raise unavailable("the service waits for its database", cause=self.cause)
        await wait_for_event(self._is_decided, self._seconds_max)
        if self._successor is not None:
            return await self._successor(request)
        if request.path.startswith(WEBHOOK_PATH):
            self.refused[self.cause] += 1
        raise unavailable("the service waits for its database, so it neither records nor reads yet")
