"""Signatures of webhook bodies, in the two schemes that a gateway before this service may use."""

import hashlib
import hmac
import time
from collections.abc import Mapping
from typing import Final, Protocol
from uuid import uuid4

from service.http.auth_refusals import RefusedError
from service.http.problems import ProblemType
from service.standard_webhooks import (
    ID_HEADER,
    SECRET_PREFIX,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    sign,
    signature,
)

# How far the time of a signature may differ from ours, before and after. The scheme suggests five minutes.
TOLERANCE_SECONDS: Final = 300
# A longer id is not an idempotency key, and a copy would be another report. A test compares this with the limit
# of keys, since the one module may not import the other.
ID_BYTES_MAX: Final = 256
_DIGITS_MAX: Final = 12


class Scheme(Protocol):
    """A scheme of signatures."""

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Check the signature of a decompressed body.

        Raises:
            RefusedError: 401, the signature is missing, wrong or too old.
        """
        ...

    def sign(self, body: bytes) -> dict[str, str]:
        """Return the headers that sign a body now."""
        ...


class HexScheme:
    """The hex HMAC-SHA256 of the body in a header. It has no time, so a copy of a signed body stays valid.

    Args:
        secret: the secret.
        header: the name of the header.
    """

    def __init__(self, secret: bytes, header: str) -> None:
        self._secret = secret
        self._header = header

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Check the signature; see ``Scheme``."""
        expected = self.sign(body)[self._header].encode()
        signature = headers.get(self._header, "").strip().lower().encode(errors="replace")
        if not hmac.compare_digest(signature, expected):
            detail = f"{self._header} must be the hex HMAC-SHA256 of the body"
            raise RefusedError("wrong_signature", ProblemType.BAD_SIGNATURE, detail)

    def sign(self, body: bytes) -> dict[str, str]:
        """Sign a body; see ``Scheme``."""
        return {self._header: hmac.new(self._secret, body, hashlib.sha256).hexdigest()}


class StandardScheme:
    """Standard Webhooks: the signature covers ``webhook-id``, ``webhook-timestamp`` and the body.

    Args:
        secret: the secret, after its prefix in base64.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def check(self, headers: Mapping[str, str], body: bytes) -> None:
        """Check the signature; see ``Scheme``. ``webhook-signature`` may list several, during a rotation."""
        webhook_id, timestamp = headers.get(ID_HEADER, ""), headers.get(TIMESTAMP_HEADER, "")
        is_id = webhook_id.isascii() and 0 < len(webhook_id) <= ID_BYTES_MAX
        if not (is_id and timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= _DIGITS_MAX):
            detail = f"webhook-id (1 to {ID_BYTES_MAX} ASCII characters) and webhook-timestamp are required"
            raise RefusedError("wrong_signature", ProblemType.BAD_SIGNATURE, detail)
        expected = signature(self._secret, webhook_id, timestamp, body).encode()
        signatures = headers.get(SIGNATURE_HEADER, "").encode(errors="replace").split()
        # All are compared, each in constant time.
        if not sum(hmac.compare_digest(one, expected) for one in signatures):
            detail = "webhook-signature has no signature of this id, time and body"
            raise RefusedError("wrong_signature", ProblemType.BAD_SIGNATURE, detail)
        if abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
            detail = f"webhook-timestamp differs from the present time by more than {TOLERANCE_SECONDS} s"
            raise RefusedError("old_timestamp", ProblemType.BAD_SIGNATURE, detail)

    def sign(self, body: bytes) -> dict[str, str]:
        """Sign a body under a new id; see ``Scheme``."""
        return sign([self._secret], f"msg_{uuid4()}", time.time(), body)


def make_scheme(secret: str, header: str) -> Scheme | None:
    """Return the scheme that a secret chooses, None without a secret. The setting was checked before."""
    if secret.startswith(SECRET_PREFIX):
        return StandardScheme(secret)
    return HexScheme(secret.encode(), header) if secret else None
