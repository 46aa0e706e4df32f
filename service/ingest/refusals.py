"""Refusals: the webhooks that got 503, counted by their cause, which is logged, measured and shown."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import asyncpg
import structlog

from service.batcher import OverloadedError
from service.database.connections import DedicatedConnection, StorageUnavailableError, UnsupportedServerError
from service.database.schema import OldReplicaError
from service.event_log.store import APPEND_LOCK, UnreplicatedCommitError
from service.ingest.volume import VolumeFullError


class BodiesFullError(OverloadedError):
    """Too many bytes of bodies are arriving, so this body was not read to its end."""


class ReaderError(OverloadedError):
    """This process only reads, so it records no report."""


class QuarantineFullError(OverloadedError):
    """The quarantine's hourly cap is reached, so this body was not kept."""


Cause: TypeAlias = Literal[
    "disk_full",
    "read_only",
    "too_many_connections",
    "lock_held",
    "replication_wait",
    "queue_full",
    "bodies_full",
    "quarantine_full",
    "volume_full",
    "unreachable",
    "unusable",
    "no_answer",
]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

# A cause that lasts is logged again after this time.
LOG_SECONDS: Final = 300.0
# A cause that was asked of the server is believed for this long.
DIAGNOSIS_SECONDS: Final = 1.0
DIAGNOSIS_SECONDS_MAX: Final = 0.3
# A refusal is recent for this long. Without webhooks, nothing shows whether its cause is gone.
RECENT_SECONDS: Final = 10.0

CAUSES_BY_SQLSTATE: Final[dict[str, Cause]] = {
    "25006": "read_only",
    "53100": "disk_full",
    "53300": "too_many_connections",
    "55P03": "lock_held",
    # The role's rights were revoked.
    "42501": "unusable",
    # The database does not exist.
    "3D000": "unusable",
    # The login was rejected.
    "28000": "unusable",
    "28P01": "unusable",
}
# Valid reports are still recorded, or will be in a moment.
PASSING: Final[frozenset[Cause]] = frozenset({"queue_full", "bodies_full", "quarantine_full"})
# The first that fits decides.
CAUSES_BY_TYPE: Final[dict[type[BaseException], Cause]] = {
    ReaderError: "read_only",
    QuarantineFullError: "quarantine_full",
    VolumeFullError: "volume_full",
    BodiesFullError: "bodies_full",
    OverloadedError: "queue_full",
    UnreplicatedCommitError: "replication_wait",
    UnsupportedServerError: "unusable",
    OldReplicaError: "unusable",
    # Of several servers, none can be written.
    asyncpg.TargetServerAttributeNotMatched: "read_only",
}
# What an append waits for. A commit that waits for its standby also keeps the append lock, even after its time
# limit. Every role can see locks, but not what other roles' sessions wait for: if a standby is required and
# nothing waits for a lock, the commit waits for the standby.
DIAGNOSE: Final = """
    SELECT CASE
        WHEN EXISTS (
            SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep')
            THEN 'replication_wait'
        WHEN EXISTS (
            SELECT FROM pg_locks
            WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
              AND (relation = 'public.order_events'::regclass
                   OR locktype = 'advisory' AND classid::bigint << 32 | objid::bigint = $1))
            THEN 'lock_held'
        WHEN current_setting('synchronous_standby_names') <> ''
             AND current_setting('synchronous_commit') NOT IN ('off', 'local')
            THEN 'replication_wait'
        ELSE 'no_answer'
    END
"""

logger = structlog.get_logger()


class Refusal(NamedTuple):
    """The present reason why webhooks get 503."""

    cause: Cause
    detail: str
    since: datetime


class Refusals:
    """Counts and explains the webhooks that got 503.

    Args:
        dedicated: the connection to ask the server with; not the one that appends.
        trouble: returns the error of the last attempt to append, None if it was committed.
    """

    def __init__(self, dedicated: DedicatedConnection, trouble: Callable[[], Exception | None]) -> None:
        self._dedicated = dedicated
        self._trouble = trouble
        self.counts: Counter[Cause] = Counter(dict.fromkeys(CAUSES, 0))
        self.current: Refusal | None = None
        self._last_at = 0.0
        self._log_at = 0.0
        self._diagnosis: Cause = "no_answer"
        self._diagnose_at = 0.0
        self._turn = asyncio.Lock()

    async def count(self, error: Exception) -> None:
        """Count a refused webhook, and log its cause if it is new or has lasted."""
        reason = error if isinstance(error, OverloadedError) else self._trouble() or error
        cause = find_cause(reason)
        if cause == "no_answer":
            cause = await self._diagnose()
        self.counts[cause] += 1
        self._last_at = monotonic()
        if cause in PASSING and (recent := self.recent) is not None and recent.cause not in PASSING:
            # The queue is full because of that cause.
            return
        is_new = self.current is None or self.current.cause != cause
        if is_new:
            # Only the first line: PostgreSQL's further lines may quote a row.
            detail = str(reason).partition("\n")[0]
            self.current = Refusal(cause, detail, datetime.now(UTC))
        if is_new or monotonic() >= self._log_at:
            self._log_at = monotonic() + LOG_SECONDS
            logger.error("webhooks are refused", cause=cause, refused=self.counts[cause], error=str(reason))

    @property
    def recent(self) -> Refusal | None:
        """The present refusal if a webhook was refused within RECENT_SECONDS."""
        return self.current if monotonic() - self._last_at < RECENT_SECONDS else None

    def end(self) -> None:
        """Note that a webhook was recorded."""
        if self.current is not None:
            logger.info("webhooks are recorded again", cause=self.current.cause)
            self.current = None

    async def _diagnose(self) -> Cause:
        """Ask the server what the append waits for."""
        async with self._turn:
            if monotonic() >= self._diagnose_at:
                try:
                    async with self._dedicated.connection(DIAGNOSIS_SECONDS_MAX) as connection:
                        self._diagnosis = await connection.fetchval(DIAGNOSE, APPEND_LOCK)
                except StorageUnavailableError as error:
                    self._diagnosis = find_cause(error)
                self._diagnose_at = monotonic() + DIAGNOSIS_SECONDS
        return self._diagnosis


def find_cause(error: BaseException) -> Cause:
    """Return the cause of a refusal; ``no_answer`` if the error and its own causes do not show it."""
    for link in _chain(error):
        if isinstance(link, asyncpg.PostgresError) and link.sqlstate in CAUSES_BY_SQLSTATE:
            return CAUSES_BY_SQLSTATE[link.sqlstate]
        for kind, cause in CAUSES_BY_TYPE.items():
            if isinstance(link, kind):
                return cause
    return "unreachable" if any(_is_loss(link) for link in _chain(error)) else "no_answer"


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, StorageUnavailableError | TimeoutError):
        return False
    return isinstance(error, OSError | asyncpg.CannotConnectNowError | asyncpg.PostgresConnectionError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
