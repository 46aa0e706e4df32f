"""Authentication of the webhook's sender: a token in the path, a signature, and the address behind proxies."""

import hmac
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from aiohttp import web

from service.http.access import refuse_other_machines, refuse_other_sites
from service.http.addresses import Network, client_address
from service.http.auth_refusals import AuthRefusals, RefusedError
from service.ingest.signatures import Scheme

PATH: Final = "/webhook"
PATH_WITH_TOKEN: Final = f"{PATH}/{{token}}"


class Sender(NamedTuple):
    """Who sent a webhook: the address, and the name of the token, None if it has no name."""

    address: str | None
    token_name: str | None


class WebhookAuth:
    """Authenticates webhooks: once before the body is read, and once after it.

    Args:
        tokens: the valid tokens at the end of the path, and the name of each, None for a token without one;
            empty if no token is required.
        scheme: checks the signature of bodies; None if no signature is required.
        proxies: networks of proxies whose X-Forwarded-For is trusted.
        refusals: counts the webhooks that are not admitted.
        is_open: whether only this machine may send, without a token and a signature.
    """

    def __init__(
        self,
        tokens: Mapping[str, str | None],
        scheme: Scheme | None,
        proxies: Sequence[Network],
        refusals: AuthRefusals,
        *,
        is_open: bool = False,
    ) -> None:
        self.replace_tokens(tokens)
        self._scheme = scheme
        self._proxies = proxies
        self._refusals = refusals
        self._is_open = is_open

    @property
    def path(self) -> str:
        """The pattern of the webhook's path."""
        return PATH_WITH_TOKEN if self._tokens else PATH

    @property
    def has_tokens(self) -> bool:
        """Whether a token is required."""
        return bool(self._tokens)

    def replace_tokens(self, tokens: Mapping[str, str | None]) -> None:
        """Accept these tokens from now on. There must be one if there was one, since the path depends on it."""
        self._tokens = {token.encode(): name for token, name in tokens.items()}

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
            RefusedError: 401, the signature is missing, wrong or too old.
        """
        if self._scheme is None:
            return
        try:
            self._scheme.check(request.headers, body)
        except RefusedError as error:
            self._refusals.count(error.cause, request)
            raise
