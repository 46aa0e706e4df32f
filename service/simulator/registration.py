"""The registration of a webhook with Komerce: ``PUT {base}/webhook``.

The documentation says that the URL stands in the request's body, and neither the member's name nor the key's
header. Both are here as Komerce's other interfaces have them, and only here.
"""

from collections.abc import Collection
from typing import Any, Final

import aiohttp
import orjson
from yarl import URL

from service.text import printable

PATH: Final = "/webhook"
KEY_HEADER: Final = "x-api-key"
URL_MEMBER: Final = "webhook_url"
REGISTER_SECONDS_MAX: Final = 10.0
# Of what Komerce says to a refusal.
MESSAGE_CHARACTERS_MAX: Final = 200
OK: Final = frozenset({200, 201, 204})


class RegistrationError(Exception):
    """The webhook is not registered. ``str()`` is one line."""


class UnusableUrlError(RegistrationError):
    """A URL is none to register, or none to register at."""


def check_url(text: str, what: str, *, is_insecure: bool) -> URL:
    """Return a URL that can be used.

    Args:
        text: as given.
        what: it is, for the message.
        is_insecure: whether http will do.

    Raises:
        UnusableUrlError: it cannot be used.
    """
    try:
        url = URL(text)
        usable = url.scheme in ("http", "https") and bool(url.host) and url.port is not None
    except ValueError:
        usable = False
    if not usable:
        raise UnusableUrlError(f"{what} is no https:// URL")
    if url.scheme != "https" and not is_insecure:
        raise UnusableUrlError(f"{what} must begin with https:// (--insecure lets http pass, for a test)")
    if url.user is not None or url.password is not None:
        raise UnusableUrlError(f"{what} must not hold a user or a password")
    if "?" in text or "#" in text:
        raise UnusableUrlError(f"{what} must have no ? and no #: a token belongs into its path")
    return url


def has_token(url: URL, tokens: Collection[str]) -> bool:
    """Tell whether a webhook's URL ends in one of the tokens that the service asks for."""
    return not tokens or url.name in tokens


async def register(base: str, key: str, url: str, *, is_insecure: bool = False) -> None:
    """Register a webhook's URL; it takes the place of the one before.

    Args:
        base: of Komerce's API.
        key: for it.
        url: that every push shall go to.
        is_insecure: whether either may be http.

    Raises:
        RegistrationError: it is not registered.
    """
    wanted = check_url(url, "the webhook's URL", is_insecure=is_insecure)
    at = check_url(base.rstrip("/") + PATH, "ORDER_TRACKING_KOMERCE_BASE_URL", is_insecure=is_insecure)
    timeout = aiohttp.ClientTimeout(total=REGISTER_SECONDS_MAX)
    headers = {KEY_HEADER: key, "Accept": "application/json"}
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            # A redirect would carry the key elsewhere.
            session.put(at, json={URL_MEMBER: str(wanted)}, headers=headers, allow_redirects=False) as response,
        ):
            said = _message(await response.read())
    except (aiohttp.ClientError, OSError) as error:
        raise RegistrationError(f"cannot reach {at.origin()}: {error or 'no answer in time'}") from None
    if response.status in OK:
        return
    reason = {
        401: "it does not know the key of ORDER_TRACKING_KOMERCE_API_KEY",
        403: "the key of ORDER_TRACKING_KOMERCE_API_KEY may not do this",
        404: "there is nothing: look at ORDER_TRACKING_KOMERCE_BASE_URL",
    }.get(response.status, "it is not registered")
    raise RegistrationError(f"{at} answers {response.status}: {reason}{said and f' ({said})'}")


def _message(body: bytes) -> str:
    """Return what stands in the envelope of Komerce's answers, fit for a terminal."""
    try:
        said: Any = orjson.loads(body)["meta"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return printable(str(said)[:MESSAGE_CHARACTERS_MAX])
