"""Registration of a webhook with Komerce: ``PUT {base}/webhook``.

The documentation puts the URL in the request's body, but names neither its JSON member nor the key's header.
Both are constants of this module, with the names that Komerce's other interfaces use.
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

import aiohttp
import orjson
from yarl import URL

from service.settings import CoreSettings

PATH: Final = "/webhook"
KEY_HEADER: Final = "x-api-key"
URL_MEMBER: Final = "webhook_url"
REGISTER_SECONDS_MAX: Final = 10.0
# The length to which Komerce's own message is cut in an error.
MESSAGE_CHARACTERS_MAX: Final = 200
OK: Final = frozenset({200, 201, 204})
HINTS: Final = {
    401: "check the key in ORDER_TRACKING_KOMERCE_API_KEY",
    403: "the key in ORDER_TRACKING_KOMERCE_API_KEY may not register webhooks",
    404: "check ORDER_TRACKING_KOMERCE_BASE_URL",
}


class RegistrationError(Exception):
    """The webhook is not registered. ``str()`` is one line, with Komerce's own message as it was received."""


class UnusableUrlError(RegistrationError):
    """The webhook's URL or the base URL is unusable. ``str()`` does not quote it, as it may hold a token."""


def parse_url(text: str, name: str) -> URL:
    """Return an http or https URL with a host. For anything else raise UnusableUrlError, with ``name``."""
    try:
        url = URL(text)
        if url.scheme in ("http", "https") and url.host and url.port is not None:
            return url
    except ValueError:
        pass
    raise UnusableUrlError(f"{name} is not a valid URL: expected https://host/path")


def check_url(text: str, name: str, *, is_insecure: bool) -> URL:
    """Return the URL of a webhook or of Komerce's API, after checking it.

    Args:
        text: the URL as a user wrote it.
        name: the URL's name in an error.
        is_insecure: whether http is allowed.

    Raises:
        UnusableUrlError: the URL is invalid, insecure, or holds a user, a password, a query or a fragment.
    """
    url = parse_url(text, name)
    if url.scheme != "https" and not is_insecure:
        raise UnusableUrlError(f"{name} must begin with https:// (for a test, --insecure allows http://)")
    if url.user is not None or url.password is not None:
        raise UnusableUrlError(f"{name} must not contain a user or a password: put a token in its path")
    if "?" in text or "#" in text:
        raise UnusableUrlError(f"{name} must not contain ? or #: put a token in its path")
    return url


def append_token(url: str, tokens: Sequence[str]) -> str:
    """Return a webhook's URL with the last token, the newest one, if the URL ends in /webhook."""
    webhook = url.removesuffix("/")
    return f"{webhook}/{tokens[-1]}" if tokens and webhook.endswith(PATH) else url


def has_token(url: URL, tokens: Collection[str]) -> bool:
    """Return whether a webhook's URL ends in one of the tokens, or no tokens are configured."""
    return not tokens or url.name in tokens


def is_token_visible(url: URL, tokens: Collection[str]) -> bool:
    """Return whether a webhook's URL, as a user wrote it, ends in a token."""
    return url.name in tokens or (url.name != "" and url.parent.path.endswith(PATH))


async def register(base: str, key: str, url: str, *, is_insecure: bool = False) -> None:
    """Register a webhook's URL; it replaces the previous one.

    Args:
        base: the base URL of Komerce's API.
        key: the API key.
        url: the webhook's URL.
        is_insecure: whether either URL may use http.

    Raises:
        RegistrationError: a URL is unusable, or Komerce cannot be reached or refused the registration.
    """
    webhook = check_url(url, "the webhook's URL", is_insecure=is_insecure)
    endpoint = check_url(base.rstrip("/") + PATH, "ORDER_TRACKING_KOMERCE_BASE_URL", is_insecure=is_insecure)
    headers = {KEY_HEADER: key, "Accept": "application/json"}
    body = {URL_MEMBER: str(webhook)}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REGISTER_SECONDS_MAX)) as session,
            # Following a redirect would send the key elsewhere.
            session.put(endpoint, json=body, headers=headers, allow_redirects=False) as response,
        ):
            message = _read_message(await response.read())
    except (aiohttp.ClientError, OSError) as error:
        cause = error or f"no response within {REGISTER_SECONDS_MAX:g} s"
        raise RegistrationError(f"cannot reach {endpoint.origin()}: {cause}") from None
    if response.status not in OK:
        hint = HINTS.get(response.status, "the webhook is not registered")
        raise RegistrationError(f"{endpoint} returned {response.status}: {hint}{message and f' ({message})'}")


def _read_message(body: bytes) -> str:
    """Return the message in the envelope of Komerce's responses, or an empty text."""
    try:
        message: Any = orjson.loads(body)["meta"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return str(message)[:MESSAGE_CHARACTERS_MAX]


def webhook_url(settings: CoreSettings) -> URL:
    """Return the webhook's URL on the configured host and port, with the first token if there are tokens."""
    token = next((f"/{token}" for token in settings.tokens), "")
    return URL.build(scheme="http", host=settings.host, port=settings.port, path=f"/webhook{token}")
