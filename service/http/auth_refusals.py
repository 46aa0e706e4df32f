"""The security log: refused requests, counted by cause, and logged at most once a minute."""

from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import Any, Final, Literal, TypeAlias, get_args

import structlog
from aiohttp import web

from service.http.addresses import Network, client_address
from service.http.problems import ProblemError, ProblemType

AuthCause: TypeAlias = Literal[
    "no_key",
    "unknown_key",
    "scope",
    "ended_session",
    "other_site",
    "other_machine",
    "wrong_token",
    "wrong_signature",
    "old_timestamp",
]
AUTH_CAUSES: Final[tuple[AuthCause, ...]] = get_args(AuthCause)
LOG_SECONDS: Final = 60.0

logger = structlog.get_logger()


class RefusedError(ProblemError):
    """A request is refused because of who sent it. ``cause`` is the cause."""

    def __init__(self, cause: AuthCause, problem_type: ProblemType, detail: str, **options: Any) -> None:
        super().__init__(problem_type, detail, **options)
        self.cause: AuthCause = cause


class AuthRefusals:
    """Counts refused requests.

    Args:
        proxies: the networks of trusted proxies.
    """

    def __init__(self, proxies: Sequence[Network]) -> None:
        self._proxies = proxies
        self.counts: Counter[AuthCause] = Counter(dict.fromkeys(AUTH_CAUSES, 0))
        self._logged = 0
        self._log_at = 0.0

    def count(self, cause: AuthCause, request: web.BaseRequest) -> None:
        """Count a refused request. No line names a path, a token or a key: they may be secrets."""
        self.counts[cause] += 1
        if monotonic() >= self._log_at:
            self._log_at = monotonic() + LOG_SECONDS
            refused = self.counts.total() - self._logged
            self._logged += refused
            address = client_address(request, self._proxies)
            logger.warning("requests are refused", cause=cause, address=address, since_last_line=refused)
