"""Signatures of outgoing messages, by Standard Webhooks."""

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Final

from standardwebhooks import Webhook

ID_HEADER: Final = "webhook-id"
TIMESTAMP_HEADER: Final = "webhook-timestamp"
SIGNATURE_HEADER: Final = "webhook-signature"
# Two secrets of each subscription; decoding one takes as long as signing with it.
SIGNERS_CACHED_MAX: Final = 256


@lru_cache(SIGNERS_CACHED_MAX)
def _signer(secret: str) -> Webhook:
    return Webhook(secret)


def sign(secrets: Sequence[str], message_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """Return the headers that sign a message.

    Args:
        secrets: the secrets, two during a rotation. A receiver accepts the message if it has one of them.
        message_id: the message's id.
        at: the time of this attempt, in UTC.
        body: the body, in UTF-8.
    """
    text = body.decode()
    signatures = (_signer(secret).sign(message_id, at, text) for secret in secrets)
    return {
        ID_HEADER: message_id,
        TIMESTAMP_HEADER: str(int(at.timestamp())),
        SIGNATURE_HEADER: " ".join(signatures),
    }
