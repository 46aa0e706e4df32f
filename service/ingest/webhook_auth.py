"""Authentication of the webhook's sender: a token in the path, a signature, and the address behind proxies."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from aiohttp import web

from service.http.access import refuse_other_machines, refuse_other_sites
from service.http.addresses import Network, client_address
from service.http.auth_refusals import AuthRefusals, RefusedError
from service.http.problems import ProblemType

PATH: Final = "/webhook"


def sign(body: bytes, secret: bytes) -> str:
    """Return the signature of a body: its hex HMAC-SHA256."""
    return hmac.new(secret, body, hashlib.sha256).hexdigest()


class Sender(NamedTuple):
    """Who sent a webhook: the address, and the name of the token, None if it has no name."""

    address: str | None
    token_name: str | None


class WebhookAuth:
    """Authenticates webhooks: once before the body is read, and once after it.

    Args:
        tokens: the valid tokens at the end of the path, and the name of each, None for a token without one; empty if
            no token is required.
        secret: the secret of the signature; empty if no signature is required.
        signature_header: the header with the signature.
        proxies: networks of proxies whose X-Forwarded-For is trusted.
        refusals: counts the webhooks that are not admitted.
        is_open: whether only this machine may send, without a token and a signature.
    """

    def __init__(  # noqa: PLR0913 - each is named by its caller
        self,
        tokens: Mapping[bytes, str | None],
        secret: bytes,
        signature_header: str,
        proxies: Sequence[Network],
        refusals: AuthRefusals,
        *,
        is_open: bool = False,
    ) -> None:
        self._tokens = tokens
        self._secret = secret
        self._signature_header = signature_header
        self._proxies = proxies
        self._refusals = refusals
        self._is_open = is_open

    @property
    def path(self) -> str:
        """The pattern of the webhook's path."""
        return f"{PATH}/{{token}}" if self._tokens else PATH

    def replace_tokens(self, tokens: Mapping[bytes, str | None]) -> None:
        """Accept these tokens from now on. There must be one if there was one, since the path depends on it."""
        self._tokens = tokens

    def check_request(self, request: web.Request) -> Sender:
        """Check a request before its body is read, and return its sender.

        Raises:
            HTTPNotFound: the token is wrong. The response equals that for an unknown path.
            RefusedError: 403, no token is required, and a page of another site made the request; or only this
                machine may send, and the request may come from another one.
        """
        token_name = None
        if self._tokens:
            token = request.match_info["token"].encode(errors="replace")
            # All tokens are compared, each in constant time, so that the duration reveals nothing.
            matches = [name for valid, name in self._tokens.items() if hmac.compare_digest(token, valid)]
            if not matches:
                self._refusals.count("wrong_token", request)
                raise web.HTTPNotFound
            (token_name,) = matches
        else:
            try:
                refuse_other_sites(request)
                if self._is_open:
                    refuse_other_machines(request)
            except RefusedError as error:
                self._refusals.count(error.cause, request)
                raise
        return Sender(client_address(request, self._proxies), token_name)

    def check_signature(self, request: web.Request, body: bytes) -> None:
        """Check the signature of a decompressed body.

        Raises:
            RefusedError: 401, the signature is missing or wrong.
        """
        if not self._secret:
            return
        expected = sign(body, self._secret).encode()
        signature = request.headers.get(self._signature_header, "").strip().lower().encode(errors="replace")
        if not hmac.compare_digest(signature, expected):
            self._refusals.count("wrong_signature", request)
            detail = f"{self._signature_header} must be the hex HMAC-SHA256 of the body"
            raise RefusedError("wrong_signature", ProblemType.BAD_SIGNATURE, detail)
