"""Refusals: the webhooks that got 503, counted by their cause, which is logged, measured and shown."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from time import monotonic
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import asyncpg
import structlog

from projections.postgres import Connection
from service.batcher import OverloadedError
from service.database.connections import DedicatedConnection, StorageUnavailableError, UnsupportedServerError
from service.database.schema import OldReplicaError
from service.event_log.store import LOCK_TABLE, UnreplicatedCommitError, take_append_lock
from service.ingest.hourly_bytes import VolumeFullError


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
    "failed",
]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

# A cause that lasts is logged again after this time.
LOG_SECONDS: Final = 300.0
# A cause that was asked of the server is believed for this long.
DIAGNOSIS_SECONDS: Final = 1.0
DIAGNOSIS_SECONDS_MAX: Final = 0.3
# A refusal ends when a webhook was recorded on the same path and, for this long, none was refused there: while
# some are recorded and some refused, it lasts.
QUIET_SECONDS: Final = 1.0
# A refusal is recent for this long. Without webhooks, nothing shows whether its cause is gone.
RECENT_SECONDS: Final = 10.0

# The ways of a webhook, each of which can be refused for a cause of its own: every webhook's body is read; then
# it is recorded as a plain report or as one with an idempotency key, or its body is quarantined.
Path: TypeAlias = Literal["body", "plain", "keyed", "quarantine"]

# For the sender, whose operator can do nothing but pass it on.
EXPLANATIONS: Final[dict[Cause, str]] = {
    "disk_full": "the database's disk is full",
    "read_only": "the database is read-only",
    "too_many_connections": "the database accepts no more connections",
    "lock_held": "another session holds a lock on the log",
    "replication_wait": "the commit waits for a standby",
    "queue_full": "too many reports are waiting",
    "bodies_full": "too many large bodies are arriving",
    "quarantine_full": "too many unparseable bodies were kept in this hour",
    "volume_full": "the limit of bytes in an hour is reached",
    "unreachable": "the database cannot be reached",
    "unusable": "the database cannot be used as it is",
    "no_answer": "the database did not answer in time",
    "failed": "the service failed",
}

# By the whole code, or by its first two characters.
CAUSES_BY_SQLSTATE: Final[dict[str, Cause]] = {
    "25006": "read_only",
    "53100": "disk_full",
    "53300": "too_many_connections",
    "55P03": "lock_held",
    # The database does not exist.
    "3D000": "unusable",
    # The login was rejected.
    "28000": "unusable",
    "28P01": "unusable",
    # A schema or a table is missing, or the role has lost its rights on it.
    "3F": "unusable",
    "42": "unusable",
    # A sequence is at its end; a constraint or a trigger that the schema does not have rejects a report.
    "22": "unusable",
    "23": "unusable",
    "P0": "unusable",
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
# What an append waits for, if the lock was held ($1) for a moment. A commit that waits for its standby also
# keeps the append lock, even after its time limit. Every role can see locks, but not what other roles' sessions
# wait for: if a standby is required and no session holds the lock, the commit waits for the standby.
DIAGNOSE: Final = """
    SELECT CASE
        WHEN EXISTS (
            SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep')
            THEN 'replication_wait'
        WHEN $1 THEN 'lock_held'
        WHEN current_setting('synchronous_standby_names') <> ''
             AND current_setting('synchronous_commit') NOT IN ('off', 'local')
            THEN 'replication_wait'
        ELSE 'no_answer'
    END
"""
# A lock that is not free for this long is held: an append takes a few milliseconds.
LOCK_TIMEOUT: Final = "SET LOCAL lock_timeout = '100ms'"

logger = structlog.get_logger()


class Refusal(NamedTuple):
    """The present reason why webhooks get 503."""

    cause: Cause
    detail: str
    since: datetime


class _PathRefusal:
    """The refusals on one path."""

    def __init__(self) -> None:
        self.current: Refusal | None = None
        self.last_at = 0.0
        self.log_at = 0.0
        # When a webhook was last recorded on this path.
        self.recorded_at = 0.0

    def is_over(self, now: float) -> bool:
        return self.recorded_at > self.last_at and now - self.last_at >= QUIET_SECONDS


class Refusals:
    """Counts and explains the webhooks that got 503.

    Args:
        dedicated: the connection to ask the server with; not the one that appends.
        trouble: returns why reports are not being committed now, None if they are. It is called with whether
            they have idempotency keys.
    """

    def __init__(self, dedicated: DedicatedConnection, trouble: Callable[[bool], Exception | None]) -> None:
        self._dedicated = dedicated
        self._trouble = trouble
        self.counts: Counter[Cause] = Counter(dict.fromkeys(CAUSES, 0))
        self._paths: dict[Path, _PathRefusal] = {path: _PathRefusal() for path in get_args(Path)}
        self._diagnosis: Cause = "no_answer"
        self._diagnose_at = 0.0
        self._turn = asyncio.Lock()

    async def count(self, error: Exception, path: Path) -> Cause:
        """Count a refused webhook, log its cause if it is new or has lasted, and return the cause.

        Args:
            error: why the webhook was refused.
            path: the path on which it was refused.
        """
        reason, cause = error, find_cause(error)
        if cause in {"queue_full", "no_answer"} and path in {"plain", "keyed"}:
            # A queue is full because nothing is being committed, or because too much arrives.
            reason = self._trouble(path == "keyed") or error
            cause = find_cause(reason)
        if cause == "no_answer":
            cause = await self._diagnose()
        self.counts[cause] += 1
        refusal = self._paths[path]
        # The last success may be older than this refusal, but not yet have ended an earlier one.
        self._end_if_over(refusal)
        now = refusal.last_at = monotonic()
        is_new = refusal.current is None or refusal.current.cause != cause
        if is_new:
            # Only the first line: PostgreSQL's further lines may quote a row.
            detail = str(reason).partition("\n")[0]
            refusal.current = Refusal(cause, detail, datetime.now(UTC))
        if is_new or now >= refusal.log_at:
            refusal.log_at = now + LOG_SECONDS
            logger.error(
                "webhooks are refused", cause=cause, path=path, refused=self.counts[cause], error=str(reason)
            )
        return cause

    @property
    def recent(self) -> Refusal | None:
        """The present refusal, of a lasting cause if there is one, if it was within RECENT_SECONDS."""
        now = monotonic()
        found: Refusal | None = None
        for refusal in self._paths.values():
            self._end_if_over(refusal)
            if refusal.current is not None and now - refusal.last_at < RECENT_SECONDS:
                found = refusal.current
                if found.cause not in PASSING:
                    break
        return found

    def end(self, path: Path) -> None:
        """Note that a webhook was recorded on a path."""
        paths: tuple[Path, Path] = ("body", path)
        for each in paths:
            refusal = self._paths[each]
            if refusal.current is None:
                continue
            if refusal.recorded_at <= refusal.last_at:
                # The first success after a refusal.
                asyncio.get_running_loop().call_later(QUIET_SECONDS, self._end_if_over, refusal)
            refusal.recorded_at = monotonic()

    def _end_if_over(self, refusal: _PathRefusal) -> None:
        if refusal.current is not None and refusal.is_over(monotonic()):
            logger.info("webhooks are recorded again", cause=refusal.current.cause)
            refusal.current = None

    async def _diagnose(self) -> Cause:
        """Ask the server what the append waits for."""
        async with self._turn:
            if monotonic() >= self._diagnose_at:
                try:
                    async with self._dedicated.connection(DIAGNOSIS_SECONDS_MAX) as connection:
                        self._diagnosis = await connection.fetchval(DIAGNOSE, await _is_locked(connection))
                except StorageUnavailableError as error:
                    self._diagnosis = find_cause(error)
                self._diagnose_at = monotonic() + DIAGNOSIS_SECONDS
        return self._diagnosis


async def _is_locked(connection: Connection) -> bool:
    """Return whether another session keeps appends from their locks."""
    try:
        async with connection.transaction():
            await connection.execute(LOCK_TIMEOUT)
            await connection.execute(LOCK_TABLE)
            await take_append_lock(connection)
    except asyncpg.LockNotAvailableError:
        return True
    return False


def find_cause(error: BaseException) -> Cause:
    """Return the cause of a refusal; ``no_answer`` if the errors of the database do not show it."""
    for link in _chain(error):
        if isinstance(link, asyncpg.PostgresError) and (cause := _find_by_code(link.sqlstate or "")):
            return cause
        for kind, cause in CAUSES_BY_TYPE.items():
            if isinstance(link, kind):
                return cause
    if any(_is_loss(link) for link in _chain(error)):
        return "unreachable"
    return "no_answer" if any(_is_of_database(link) for link in _chain(error)) else "failed"


def _find_by_code(sqlstate: str) -> Cause | None:
    return CAUSES_BY_SQLSTATE.get(sqlstate) or CAUSES_BY_SQLSTATE.get(sqlstate[:2])


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, StorageUnavailableError | TimeoutError):
        return False
    return isinstance(error, OSError | asyncpg.CannotConnectNowError | asyncpg.PostgresConnectionError)


def _is_of_database(error: BaseException) -> bool:
    return isinstance(error, OSError | TimeoutError | asyncpg.PostgresError | asyncpg.InterfaceError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
