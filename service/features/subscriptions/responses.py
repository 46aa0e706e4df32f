"""The protocol that receives endpoints' responses, and what it holds of them: see docs/SECURITY.md."""

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler

from service.http.budgets import Budgets, Excess, OverBudgetError

# Only a response within this time counts, from the resolution of the name to the end of the head.
ATTEMPT_SECONDS_MAX: Final = 15.0
# The heads of a response and of the interim responses before it, in all.
HEAD_BYTES_MAX: Final = 32 * 1024
# Endpoints rarely send one. An endless sequence of them would occupy the event loop.
INTERIM_RESPONSES_MAX: Final = 8
# A longer or slower body of a response is cut off.
BODY_SECONDS_MAX: Final = 2.0
BODY_BYTES_MAX: Final = 64 * 1024
# How much of a body waits until it is read; twice as much pauses the connection.
UNREAD_BYTES_MAX: Final = 16 * 1024
# The first bytes of each response do not count for the budget: most have no more.
BYTES_FREE: Final = 4 * 1024
# From here on, a response is final; so is 101 (switching protocols).
FINAL: Final = 200
SWITCHING: Final = 101


@dataclass(frozen=True, slots=True)
class ResponseLimits:
    """The limits of each response, which only tests change. The constants of the same names explain them."""

    attempt_seconds_max: float = ATTEMPT_SECONDS_MAX
    head_bytes_max: int = HEAD_BYTES_MAX
    interim_responses_max: int = INTERIM_RESPONSES_MAX
    body_seconds_max: float = BODY_SECONDS_MAX
    body_bytes_max: int = BODY_BYTES_MAX


LIMITS: Final = ResponseLimits()


class ExcessError(aiohttp.ClientError):
    """An endpoint's response exceeds a limit. ``str()`` says which."""


class EndpointConnection(ResponseHandler):
    """A connection to an endpoint, which is closed if a response exceeds a limit.

    Args:
        loop: the event loop.
        limits: the limits of each response.
        budgets: the budgets of the process.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: ResponseLimits, budgets: Budgets) -> None:
        super().__init__(loop)
        self._limits = limits
        self._budgets = budgets
        self._address: str | None = None
        # Of the present response: its bytes, those that count for the budget, its interim responses, and
        # whether its own head has arrived.
        self._received = self._held = self._interim = 0
        self._has_head = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._address, *_ = transport.get_extra_info("peername") or (None,)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._begin()
        super().connection_lost(exc)

    def set_response_params(self, **options: Any) -> None:
        """Begin to receive another response."""
        self._begin()
        super().set_response_params(**options)

    def _begin(self) -> None:
        self._budgets.endpoints.give_back(self._address, self._held)
        self._received = self._held = self._interim = 0
        self._has_head = False

    def data_received(self, data: bytes) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        self._received += len(data)
        super().data_received(data)
        limits = self._limits
        if self._interim > limits.interim_responses_max:
            self._refuse("interim_responses", f"more than {limits.interim_responses_max} interim responses")
        elif not self._has_head and self._received > limits.head_bytes_max:
            self._refuse("endpoint_head_bytes", f"the head has more than {limits.head_bytes_max} bytes")
        elif (more := self._received - BYTES_FREE - self._held) > 0:
            try:
                self._budgets.endpoints.take(self._address, more)
                self._held += more
            except OverBudgetError as error:
                self._cut(f"too many bytes of responses are arriving: {error}")

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Receive the head of a response, with its body to come."""
        code = data[0].code
        is_interim = code < FINAL and code != SWITCHING
        self._interim += is_interim
        if self._interim <= self._limits.interim_responses_max:
            self._has_head = not is_interim
            super().feed_data(data, size)

    def _refuse(self, excess: Excess, detail: str) -> None:
        self._budgets.excesses.count(excess, self._address)
        self._cut(detail)

    def _cut(self, detail: str) -> None:
        """Close the connection. If the head has arrived, the status is the answer all the same."""
        if not self._has_head:
            self.set_exception(ExcessError(detail))
        if self.transport is not None:
            self.transport.abort()
