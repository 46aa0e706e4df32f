"""A sender's idempotency keys: the same key for the same order gets the first receipt, and no event."""

import hashlib
from typing import Final

from domain.order import Order, Report
from service.database.connections import Connection
from service.event_log.store import Claim, Seen, decode_event

# The headers that carry a key, the first one that is there counts: Standard Webhooks', then the IETF draft's.
KEY_HEADERS: Final = ("webhook-id", "Idempotency-Key")
KEY_BYTES_MAX: Final = 256

FIND_KEY: Final = """
    SELECT seen.body_sha256, seen.version, first.notification_id, first.topic, first.state
    FROM idempotency_keys AS seen
    JOIN order_events AS first
      ON first.originator_id = seen.order_no AND first.originator_version = seen.version
    WHERE seen.order_no = $1 AND seen.key = $2
"""

KEEP_KEY: Final = """
    INSERT INTO idempotency_keys (order_no, key, version, body_sha256) VALUES ($1, $2, $3, $4)
"""


async def find(connection: Connection, report: Report) -> Seen | None:
    """Return what the report's key brought before, None where it is new for its order."""
    row = await connection.fetchrow(FIND_KEY, report.order_no, report.idempotency_key)
    if row is None:
        return None
    body_sha256, version, position, topic, state = row
    event = decode_event(report.order_no, version, topic, state)
    return Seen(event, position, body_sha256 == _body_sha256(report))


async def keep(connection: Connection, report: Report, event: Order.StatusReported) -> None:
    """Record that the report's key brought this event; in the transaction that appends it."""
    version = event.originator_version
    await connection.execute(KEEP_KEY, report.order_no, report.idempotency_key, version, _body_sha256(report))


def _body_sha256(report: Report) -> bytes:
    return hashlib.sha256(report.body.encode()).digest()


CLAIM: Final = Claim(find, keep)
