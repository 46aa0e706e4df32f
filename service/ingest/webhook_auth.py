"""Authentication of the webhook's sender: a token in the path, a signature, and the address behind proxies."""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, TypeAlias

from aiohttp import hdrs, web

from service.http.access import refuse_other_machines, refuse_other_sites
from service.http.problems import ProblemError, ProblemType

Network: TypeAlias = IPv4Network | IPv6Network

PATH: Final = "/webhook"
# Each proxy adds one address. A longer header is an attack.
FORWARDED_CHARACTERS_MAX: Final = 2_048


def sign(body: bytes, secret: bytes) -> str:
    """Return the signature of a body: its hex HMAC-SHA256."""
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


class WebhookAuth:
    """Authenticates webhooks: once before the body is read, and once after it.

    Args:
        tokens: the valid tokens at the end of the path; empty if no token is required.
        secret: the secret of the signature; empty if no signature is required.
        signature_header: the header with the signature.
        proxies: networks of proxies whose X-Forwarded-For is trusted.
        is_open: whether only this machine may send, without a token and a signature.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        secret: bytes,
        signature_header: str,
        proxies: Sequence[Network],
        *,
        is_open: bool = False,
    ) -> None:
        self._tokens = tokens
        self._secret = secret
        self._signature_header = signature_header
        self._proxies = proxies
        self._is_open = is_open

    @property
    def path(self) -> str:
        """The pattern of the webhook's path."""
        return f"{PATH}/{{token}}" if self._tokens else PATH

    def check_request(self, request: web.Request) -> str | None:
        """Check a request before its body is read, and return the sender's address.

        Raises:
            HTTPNotFound: the token is wrong. The response equals that for an unknown path.
            ProblemError: 403, no token is required, and a page of another site made the request; or only this
                machine may send, and the request may come from another one.
        """
        if self._tokens:
            token = request.match_info["token"].encode(errors="replace")
            # All tokens are compared, each in constant time, so that the duration reveals nothing.
            if not sum(hmac.compare_digest(token, valid) for valid in self._tokens):
                raise web.HTTPNotFound
        else:
            refuse_other_sites(request)
        if self._is_open:
            refuse_other_machines(request)
        return self._sender_address(request)

    def check_signature(self, request: web.Request, body: bytes) -> None:
        """Check the signature of a decompressed body.

        Raises:
            ProblemError: 401, the signature is missing or wrong.
        """
        if not self._secret:
            return
        expected = sign(body, self._secret).encode()
        signature = request.headers.get(self._signature_header, "").strip().lower().encode(errors="replace")
        if not hmac.compare_digest(signature, expected):
            detail = f"{self._signature_header} must be the hex HMAC-SHA256 of the body"
            raise ProblemError(ProblemType.BAD_SIGNATURE, detail)

    def _sender_address(self, request: web.Request) -> str | None:
        """Return the rightmost forwarded address that is not a trusted proxy's.

        Each proxy appends its caller's address, so only addresses that trusted proxies appended are trusted.
        """
        address = request.remote
        if not self._proxies or address is None or not self._is_proxy(address):
            return address
        forwarded = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))[-FORWARDED_CHARACTERS_MAX:]
        for hop in reversed(forwarded.split(",")):
            try:
                forwarded_address = str(ip_address(hop.strip()))
            except ValueError:
                # Trusted proxies append only addresses, so nothing to the left of other text is trustworthy.
                break
            address = forwarded_address
            if not self._is_proxy(forwarded_address):
                break
        return address

    def _is_proxy(self, address: str) -> bool:
        try:
            ip = ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._proxies)
