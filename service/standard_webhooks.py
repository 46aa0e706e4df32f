"""Signatures by Standard Webhooks, of the webhooks that arrive and of the messages that are sent.

Its library signs texts, but a webhook's body is whatever bytes the sender chose.
"""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - the part of a secret that all share
ID_HEADER: Final = "webhook-id"
TIMESTAMP_HEADER: Final = "webhook-timestamp"
SIGNATURE_HEADER: Final = "webhook-signature"
# Two secrets of each subscription, and that of the webhook.
SECRETS_CACHED_MAX: Final = 256


@lru_cache(SECRETS_CACHED_MAX)
def _decode(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(SECRET_PREFIX))


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """Return the signature of a message.

    Args:
        secret: the secret, in base64, after SECRET_PREFIX.
        message_id: the message's id.
        timestamp: the time of the message in seconds since 1970.
        body: the body.
    """
    message = f"{message_id}.{timestamp}.".encode(errors="replace") + body
    return "v1," + base64.b64encode(hmac.digest(_decode(secret), message, hashlib.sha256)).decode()


def sign(secrets: Sequence[str], message_id: str, seconds: float, body: bytes) -> dict[str, str]:
    """Return the headers that sign a message.

    Args:
        secrets: the secrets, two during a rotation. A receiver accepts the message if it has one of them.
        message_id: the message's id.
        seconds: the time of this attempt, in seconds since 1970.
        body: the body.
    """
    timestamp = str(int(seconds))
    signatures = (signature(secret, message_id, timestamp, body) for secret in secrets)
    return {ID_HEADER: message_id, TIMESTAMP_HEADER: timestamp, SIGNATURE_HEADER: " ".join(signatures)}
