"""Idempotency keys: the same key for the same order gets the first receipt again, and no second event."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from domain.order import Order, Report
from projections.postgres import Connection
from service.event_log.codec import decode_event
from service.ingest.recorder import ClaimedEvent

# The headers that may hold a key; the first one present wins: from Standard Webhooks, then from the IETF draft.
KEY_HEADERS: Final = ("webhook-id", "Idempotency-Key")
KEY_BYTES_MAX: Final = 256

# The event that was recorded with a key, and the hash of its body.
FIND_KEY: Final = """
    SELECT keys.body_sha256, keys.version, first.notification_id, first.topic, first.state
    FROM idempotency_keys AS keys
    JOIN order_events AS first
      ON first.originator_id = keys.order_no AND first.originator_version = keys.version
    WHERE keys.order_no = $1 AND keys.key = $2
"""

KEEP_KEY: Final = """
    INSERT INTO idempotency_keys (order_no, key, version, body_sha256) VALUES ($1, $2, $3, $4)
"""


class IdempotencyKey(NamedTuple):
    """The sender's key for a report: a claim for the recorder."""

    key: str

    async def find(self, connection: Connection, report: Report) -> ClaimedEvent | Sequence[Report]:
        """Return the event that was recorded with this key for the report's order, or else the report."""
        row = await connection.fetchrow(FIND_KEY, report.order_no, self.key)
        if row is None:
            return [report]
        body_sha256, version, position, topic, state = row
        event = decode_event(report.order_no, version, topic, state)
        # An erasure keeps the hash of the reported status in place of the body's.
        hashes = {_hash(report.body), _hash("" if _is_erased(event) else report.reported_status)}
        return ClaimedEvent(event, position, body_sha256 in hashes)

    async def keep(self, connection: Connection, report: Report, event: Order.StatusReported) -> None:
        """Keep the key, in the transaction that appends its event."""
        await connection.execute(
            KEEP_KEY, report.order_no, self.key, event.originator_version, _hash(report.body)
        )


def read_key(headers: Mapping[str, str]) -> IdempotencyKey | None:
    """Return the sender's key, None if absent or invalid."""
    for name in KEY_HEADERS:
        if key := headers.get(name):
            return IdempotencyKey(key) if key.isascii() and len(key) <= KEY_BYTES_MAX else None
    return None


def _is_erased(event: Order.StatusReported) -> bool:
    """Return whether an erasure has emptied a word outside the vocabulary: any report may be the same one."""
    return event.verdict == "unrecognised" and not event.reported_status


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
