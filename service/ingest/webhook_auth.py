"""Who sends a webhook: whether it is the sender, told by a token and a signature, and from which address."""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, TypeAlias

from aiohttp import hdrs, web

from service.http.access import refuse_other_sites
from service.http.problems import Kind, ProblemError

Network: TypeAlias = IPv4Network | IPv6Network

PATH: Final = "/webhook"
# Addresses that proxies have added, one each; a longer list is somebody's game.
FORWARDED_CHARACTERS_MAX: Final = 2_048


def signature_of(body: bytes, secret: bytes) -> str:
    """Return what stands in the signature's header: the hex HMAC-SHA256 of the body."""
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


class Sender:
    """What is asked of whoever sends.

    Args:
        tokens: any of which the path must end in; without tokens any path of the webhook will do.
        secret: of the signature; empty where none is asked for.
        signature_header: where the signature stands.
        proxies: the addresses whose X-Forwarded-For is believed.
    """

    def __init__(
        self, tokens: Sequence[bytes], secret: bytes, signature_header: str, proxies: Sequence[Network]
    ) -> None:
        self._tokens = tokens
        self._secret = secret
        self._signature_header = signature_header
        self._proxies = proxies

    @property
    def path(self) -> str:
        """Where the sender sends to."""
        return f"{PATH}/{{token}}" if self._tokens else PATH

    def check_caller(self, request: web.Request) -> None:
        """Refuse a path without the right token like a path that there is none of.

        Raises:
            HTTPNotFound: the token is wrong.
            ProblemError: 403, no token is asked for, and another site's page had a browser ask.
        """
        if not self._tokens:
            refuse_other_sites(request)
            return
        given = request.match_info["token"].encode(errors="replace")
        # Every token is compared, and each in constant time: how long it takes tells nothing.
        if not sum(hmac.compare_digest(given, token) for token in self._tokens):
            raise web.HTTPNotFound

    def check_signature(self, request: web.Request, body: bytes) -> None:
        """Check the hex HMAC-SHA256 of the body, as it is out of its content coding.

        Raises:
            ProblemError: 401, it is missing or wrong.
        """
        if not self._secret:
            return
        wanted = signature_of(body, self._secret).encode()
        given = request.headers.get(self._signature_header, "").strip().lower().encode(errors="replace")
        if not hmac.compare_digest(given, wanted):
            detail = f"{self._signature_header} must be the hex HMAC-SHA256 of the body"
            raise ProblemError(Kind.BAD_SIGNATURE, detail)

    def address_of(self, request: web.Request) -> str | None:
        """Return the address that a request comes from: the rightmost that is not a trusted proxy's.

        A proxy appends the address that it was called from, so only what trusted ones appended is believed.
        """
        address = request.remote
        if not self._proxies or address is None or not self._is_proxy(address):
            return address
        forwarded = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))[-FORWARDED_CHARACTERS_MAX:]
        for hop in reversed(forwarded.split(",")):
            try:
                further = str(ip_address(hop.strip()))
            except ValueError:
                # Not an address: what a proxy appends is one, so nothing to the left of it is known.
                break
            address = further
            if not self._is_proxy(further):
                break
        return address

    def _is_proxy(self, address: str) -> bool:
        try:
            ip = ip_address(address)
        except ValueError:
            return False
        return any(ip in network for network in self._proxies)
