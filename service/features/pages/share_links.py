"""Share links: a token in a path that lets a buyer read one order, without a key.

A token is base64url, without padding, of a MAC (16 bytes), the expiry (5 bytes, in seconds since 1970, 0 for
never) and the order number in UTF-8. The buyer knows the order number, so it need not be hidden. No token is
stored. Its id, a hash of it, names it in the record of actions and in the table of revoked links.
"""

import hashlib
import hmac
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from projections.postgres import Connection
from service.database.operations import Actor, record_operation
from service.http.times import to_rfc3339

SHARE_PATH: Final = "/t"
SETTING: Final = "ORDER_TRACKING_SHARE_SECRET"
# How long a link works by default: longer than a delivery with all its returns and claims.
EXPIRY_DEFAULT: Final = timedelta(days=180)
# The same secret used for another purpose would give another key.
_PURPOSE: Final = b"order-tracking share link 1"
_DIGEST: Final = "sha256"
# A forger would have to try 2^127 tokens on average.
MAC_BYTES: Final = 16
EXPIRY_BYTES: Final = 5
# An order number has at most 128 characters of at most 4 bytes, and base64 makes 4 characters of 3 bytes.
TOKEN_CHARACTERS_MAX: Final = -(-(MAC_BYTES + EXPIRY_BYTES + 128 * 4) * 4 // 3)
_SHARE_ID: Final = re.compile(r"[0-9a-f]{32}")

IS_REVOKED: Final = "SELECT EXISTS (SELECT FROM public.revoked_shares WHERE share_id = $1)"
REVOKE: Final = "INSERT INTO public.revoked_shares (share_id) VALUES ($1) ON CONFLICT DO NOTHING"
# What the record says of a link with this id.
MADE: Final = """
    SELECT reason FROM public.operations WHERE action = 'share_made' AND subject = $1
    ORDER BY operation_id LIMIT 1
"""


class UnknownShareError(Exception):
    """The text is neither a link that this secret signed nor an id in the record. ``str()`` says what to do."""


class ShareLink(NamedTuple):
    """A link: its path, and when it expires; None for never, as by default in earlier releases."""

    path: str
    expires_at: datetime | None

    @property
    def share_id(self) -> str:
        """The id of the link."""
        return identify(self.path.rpartition("/")[2])


def identify(token: str) -> str:
    """Return the id of a token. The token cannot be derived from it."""
    return hashlib.sha256(token.encode()).hexdigest()[:32]


class ShareLinks:
    """Signs and checks share links. A different secret revokes every link.

    Args:
        secret: the secret that signs links; not empty.
    """

    def __init__(self, secret: str) -> None:
        self._key = hmac.digest(secret.encode(), _PURPOSE, _DIGEST)

    def make(
        self, order_no: str, expires_in: timedelta | None = EXPIRY_DEFAULT, now: datetime | None = None
    ) -> ShareLink:
        """Sign the link to an order.

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

        Whether it was revoked, only the database knows.

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


async def make_share(
    connection: Connection, links: ShareLinks, order_no: str, expires_in: timedelta, actor: Actor
) -> ShareLink:
    """Make the link to an order, and record it.

    Args:
        connection: the connection.
        links: signs the link.
        order_no: the order number.
        expires_in: how long the link works.
        actor: who makes it.
    """
    link = links.make(order_no, expires_in)
    # Two links that end in the same second are one.
    while await is_revoked(connection, link.share_id):
        expires_in += timedelta(seconds=1)
        link = links.make(order_no, expires_in)
    until = "" if link.expires_at is None else f", until {to_rfc3339(link.expires_at, 'seconds')}"
    await record_operation(connection, actor, "share_made", link.share_id, f"order {order_no}{until}")
    return link


async def is_revoked(connection: Connection, share_id: str) -> bool:
    """Return whether a link was revoked."""
    revoked: bool = await connection.fetchval(IS_REVOKED, share_id)
    return revoked


async def revoke_share(connection: Connection, links: ShareLinks | None, text: str, actor: Actor) -> str:
    """Revoke a link permanently, record that, and return the link's id.

    Args:
        connection: a connection outside any transaction.
        links: recognises links; None if sharing is off, and then only ids are known.
        text: the link, with or without the address before it, or the id of one in the record.
        actor: who revokes it.

    Raises:
        UnknownShareError: there is no such link.
    """
    token = text.partition("?")[0].rpartition("/")[2]
    # An expired link may be revoked too.
    order_no = links and links.read(token, datetime.fromtimestamp(0, UTC))
    if order_no is not None:
        share_id, about = identify(token), f"order {order_no}"
    elif _SHARE_ID.fullmatch(token) and (made := await connection.fetchval(MADE, token)) is not None:
        share_id, about = token, made
    else:
        raise UnknownShareError(
            "there is no such share link: pass the whole link, or its id as GET /audit/operations shows it"
        )
    async with connection.transaction():
        await connection.execute(REVOKE, share_id)
        await record_operation(connection, actor, "share_revoked", share_id, about)
    return share_id


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
