"""Share links: a token in a path that lets a buyer read one order, without a key and without a database.

A token is base64url, without padding, of a MAC (16 bytes), the expiry (5 bytes, in seconds since 1970, 0 for
never) and the order number in UTF-8. The buyer knows the order number, so it need not be hidden.
"""

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from urllib.parse import urlsplit

SHARE_PATH: Final = "/t"
SETTING: Final = "ORDER_TRACKING_SHARE_SECRET"
# The same secret used for another purpose would give another key.
_PURPOSE: Final = b"order-tracking share link 1"
_DIGEST: Final = "sha256"
# A forger would have to try 2^127 tokens on average.
MAC_BYTES: Final = 16
EXPIRY_BYTES: Final = 5
# An order number has at most 128 characters of at most 4 bytes, and base64 makes 4 characters of 3 bytes.
TOKEN_CHARACTERS_MAX: Final = -(-(MAC_BYTES + EXPIRY_BYTES + 128 * 4) * 4 // 3)


class ShareLink(NamedTuple):
    """A link: its path, and when it expires; None for never."""

    path: str
    expires_at: datetime | None


class ShareLinks:
    """Makes and checks share links. A different secret revokes every link.

    Args:
        secret: the secret that signs links; not empty.
    """

    def __init__(self, secret: str) -> None:
        self._key = hmac.digest(secret.encode(), _PURPOSE, _DIGEST)

    def make(
        self, order_no: str, expires_in: timedelta | None = None, now: datetime | None = None
    ) -> ShareLink:
        """Make the link to an order.

        Args:
            order_no: the order number.
            expires_in: how long the link works; None for always.
            now: the time from which it works; None for the present.
        """
        expires_at = None
        if expires_in is not None:
            # To the second, because the token has whole seconds.
            expires_at = ((now or datetime.now(UTC)) + expires_in).replace(microsecond=0)
        seconds = 0 if expires_at is None else int(expires_at.timestamp())
        content = seconds.to_bytes(EXPIRY_BYTES) + order_no.encode()
        return ShareLink(f"{SHARE_PATH}/{self._sign(content)}", expires_at)

    def read(self, token: str, now: datetime | None = None) -> str | None:
        """Return the order number in a token; None if the token is forged, changed or expired.

        Args:
            token: the last segment of a link's path.
            now: the time for the expiry; None for the present.
        """
        if len(token) > TOKEN_CHARACTERS_MAX:
            return None
        try:
            content = urlsafe_b64decode(token.encode("ascii") + b"=" * (-len(token) % 4))[MAC_BYTES:]
        except ValueError:
            return None
        # All of the token is compared, because several texts are base64 of the same bytes.
        if len(content) <= EXPIRY_BYTES or not hmac.compare_digest(self._sign(content), token):
            return None
        seconds = int.from_bytes(content[:EXPIRY_BYTES])
        is_expired = seconds and (now or datetime.now(UTC)).timestamp() >= seconds
        return None if is_expired else content[EXPIRY_BYTES:].decode()

    def _sign(self, content: bytes) -> str:
        mac = hmac.digest(self._key, content, _DIGEST)[:MAC_BYTES]
        return urlsafe_b64encode(mac + content).rstrip(b"=").decode()


def read_base_url(url: str) -> str:
    """Return the address of a service, without a final slash.

    Raises:
        ValueError: it is not ``http://HOST`` or ``https://HOST``, with or without a port.
    """
    parts = urlsplit(url)
    is_origin = parts.path in {"", "/"} and not (parts.query or parts.fragment or parts.username)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not is_origin:
        raise ValueError(f"{url!r} is not the address of a service: expected one such as https://your.host")
    _ = parts.port  # raises ValueError for an invalid one
    return f"{parts.scheme}://{parts.netloc}"
