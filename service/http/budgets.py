"""Budgets: what strangers, an address and a key may hold at once. Each limit is measured.

Beyond a budget a reader gets 429, a webhook 503, and a connection is closed.
"""

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final, Literal, TypeAlias, get_args

import structlog

from service.http.problems import RETRY_AFTER_SECONDS, LogLimit, ProblemError, ProblemType

# Heads, in bytes of memory, from their first byte until the next request of their connection begins.
HEADS_BYTES_MAX: Final = 8 * 1024 * 1024
HEADS_BYTES_PER_ADDRESS_MAX: Final = 2 * 1024 * 1024
# The first bytes of each head are free: a usual one takes less, so strangers' large heads do not refuse it.
HEAD_BYTES_FREE: Final = 16 * 1024
# Bodies that are arriving, in bytes. Complete reports that wait for their commit have a budget of their own
# (QUEUE_BYTES_MAX), so that half-sent bodies cannot refuse complete ones.
BODIES_BYTES_MAX: Final = 8 * 1024 * 1024
# The first bytes of each body are free: a usual report is shorter, so half-sent large ones do not refuse it.
BODY_BYTES_FREE: Final = 4 * 1024
BODIES_BYTES_PER_ADDRESS_MAX: Final = 4 * 1024 * 1024
# Responses that are being sent, in bytes. Smaller ones are free: the receipts of webhooks are.
RESPONSES_BYTES_MAX: Final = 16 * 1024 * 1024
RESPONSES_BYTES_PER_ADDRESS_MAX: Final = 4 * 1024 * 1024
RESPONSE_BYTES_FREE: Final = 16 * 1024
# A form with an API key and the path of a page.
FORM_BYTES_MAX: Final = 2 * 1024
# Responses of endpoints, in bytes, without the first 4 KiB of each.
ENDPOINTS_BYTES_MAX: Final = 8 * 1024 * 1024
ENDPOINTS_BYTES_PER_ADDRESS_MAX: Final = 2 * 1024 * 1024
# The share of the open files that connections may take. PostgreSQL's connections need the rest.
CONNECTIONS_SHARE_MAX: Final = 0.9
# Connections of one address; this machine and trusted proxies have no share, since they bring others' requests.
CONNECTIONS_PER_ADDRESS_MAX: Final = 256
# Responses that last: live streams, the log as NDJSON, and the list of orders as CSV. Each costs a connection,
# a task and a slice.
STREAMS_MAX: Final = 2_000
STREAMS_PER_KEY_MAX: Final = 1_000
# Reads of an order as of an earlier version or time that are waiting for their turn, or have it.
FOLDS_MAX: Final = 128
FOLDS_PER_KEY_MAX: Final = 64
# Pages of shared orders that are waiting for their turn, or have it.
SHARES_MAX: Final = 128
SHARES_PER_ADDRESS_MAX: Final = 16
# An exhausted budget is logged at most once in this interval.
LOG_SECONDS: Final = 300.0

# Why a connection was closed, besides the budgets.
Excess: TypeAlias = Literal[
    "head_bytes",
    "head_seconds",
    "expectation",
    "response_stall",
    "response_seconds",
    "interim_responses",
    "endpoint_head_bytes",
]

logger = structlog.get_logger()


class OverBudgetError(ProblemError):
    """More is held than a budget allows."""


class Budget:
    """An amount that may be held at once.

    Args:
        name: its label in the metrics.
        what: what is held, for the message to its holder.
        maximum: the most that all holders together may hold.
        maximum_each: the most that one holder may hold; None: no share.

    Attributes:
        held: how much is held.
        refusals: how often a holder wanted more than it may have.
    """

    def __init__(self, name: str, what: str, maximum: int, maximum_each: int | None = None) -> None:
        self.name = name
        self.maximum = maximum
        self.held = 0
        self.refusals = 0
        self._what = what
        self._maximum_each = maximum_each
        self._held_by: Counter[str] = Counter()
        self._log_at = 0.0

    def is_full(self) -> bool:
        """Return whether all holders together hold the maximum."""
        return self.held >= self.maximum

    def is_full_for(self, holder: str | None) -> bool:
        """Return whether a holder has its whole share."""
        return (
            holder is not None
            and self._maximum_each is not None
            and (self._held_by[holder] >= self._maximum_each)
        )

    def take(self, holder: str | None = None, amount: int = 1) -> None:
        """Hold more.

        Args:
            holder: who holds it; None for a holder without a share, whom only the total limits.
            amount: how much.

        Raises:
            OverBudgetError: a budget would be exceeded; nothing was taken.
        """
        if self.held + amount > self.maximum:
            raise self.refusal(f"at most {self.maximum} {self._what} are served at once")
        if holder is not None and self._maximum_each is not None:
            if self._held_by[holder] + amount > self._maximum_each:
                raise self.refusal(f"you hold {self._maximum_each} {self._what}, which is the maximum")
            self._held_by[holder] += amount
        self.held += amount

    def give_back(self, holder: str | None = None, amount: int = 1) -> None:
        """Hold less. The arguments are those of ``take``."""
        self.held -= amount
        if holder is not None and self._maximum_each is not None:
            self._held_by[holder] -= amount
            if not self._held_by[holder]:
                del self._held_by[holder]

    @contextmanager
    def hold(self, holder: str | None = None) -> Iterator[None]:
        """Hold one until the block ends; see ``take``."""
        self.take(holder)
        try:
            yield
        finally:
            self.give_back(holder)

    def refusal(self, detail: str) -> OverBudgetError:
        """Count a refusal, log it if none was logged lately, and return its error."""
        self.refusals += 1
        if monotonic() >= self._log_at:
            self._log_at = monotonic() + LOG_SECONDS
            logger.warning("a budget is exhausted", budget=self.name, refusals=self.refusals, detail=detail)
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return OverBudgetError(ProblemType.OVER_BUDGET, detail, headers=headers, budget=self.name)


class Excesses:
    """The connections that were closed because they exceeded a limit of their own.

    Attributes:
        counts: how many, by the limit.
    """

    def __init__(self) -> None:
        self.counts: Counter[Excess] = Counter(dict.fromkeys(get_args(Excess), 0))
        self._lines = LogLimit()

    def count(self, excess: Excess, address: str | None) -> None:
        """Count a connection that is closed, and log it unless another one was logged lately.

        Args:
            excess: the limit.
            address: the address of the other side; None for this machine and for proxies.
        """
        self.counts[excess] += 1
        if (suppressed := self._lines.admit(excess)) is not None:
            logger.warning(
                "a connection is closed: it exceeds a limit",
                limit=excess,
                address=address,
                suppressed=suppressed,
            )


class Budgets:
    """The budgets of one process.

    Attributes:
        excesses: the connections that exceeded a limit of their own.
    """

    def __init__(self) -> None:
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections_max = int(CONNECTIONS_SHARE_MAX * open_files)
        self.excesses = Excesses()
        self.heads = Budget("head_bytes", "bytes of heads", HEADS_BYTES_MAX, HEADS_BYTES_PER_ADDRESS_MAX)
        self.bodies = Budget("body_bytes", "bytes of bodies", BODIES_BYTES_MAX, BODIES_BYTES_PER_ADDRESS_MAX)
        self.responses = Budget(
            "response_bytes", "bytes of responses", RESPONSES_BYTES_MAX, RESPONSES_BYTES_PER_ADDRESS_MAX
        )
        self.endpoints = Budget(
            "endpoint_bytes",
            "bytes of endpoints' responses",
            ENDPOINTS_BYTES_MAX,
            ENDPOINTS_BYTES_PER_ADDRESS_MAX,
        )
        self.connections = Budget("connections", "connections", connections_max, CONNECTIONS_PER_ADDRESS_MAX)
        self.streams = Budget("streams", "streams", STREAMS_MAX, STREAMS_PER_KEY_MAX)
        self.folds = Budget("folds", "reads of earlier states", FOLDS_MAX, FOLDS_PER_KEY_MAX)
        self.shares = Budget("shares", "pages of shared orders", SHARES_MAX, SHARES_PER_ADDRESS_MAX)

    def __iter__(self) -> Iterator[Budget]:
        return iter(
            (
                *(self.heads, self.bodies, self.responses, self.endpoints),
                *(self.connections, self.streams, self.folds, self.shares),
            )
        )
