"""``send`` and ``token``: the webhook, from the sender's side."""

import asyncio
import secrets
from typing import Annotated, Final

import aiohttp
import orjson
import typer
from yarl import URL

from service.cli.console import (
    MISUSED,
    WRONG,
    end,
    out,
    plain_errors,
)
from service.ingest.webhook_auth import signature_of
from service.settings import Settings, read_settings

# For one webhook that a person sends by hand.
SEND_SECONDS_MAX: Final = 10.0

TOKEN_BYTES: Final = 32


def send(
    order_no: str,
    cnote: str,
    status: str,
    url: Annotated[str | None, typer.Option(help="Where to; the configured host and port if left out.")] = None,
) -> None:
    with plain_errors():
        settings = read_settings()
        target = _checked(url) if url is not None else webhook_url(settings)
        body = orjson.dumps({"order_no": order_no, "cnote": cnote, "status": status})
        headers = {"Content-Type": "application/json"}
        if secret := settings.webhook_hmac_secret.get_secret_value():
            headers[settings.webhook_hmac_header] = signature_of(body, secret.encode())
        code, text = asyncio.run(_put(target, body, headers))
    out.print(text, markup=False)
    if code != 200:  # noqa: PLR2004 - the one answer that means committed
        raise typer.Exit(WRONG)
    raise typer.Exit(0 if '"outcome":"advanced"' in text or '"outcome":"repeated"' in text else WRONG)


def webhook_url(settings: Settings) -> URL:
    """Return where the service of these settings takes reports."""
    token = "".join(f"/{token.get_secret_value()}" for token in settings.webhook_tokens[:1])
    return URL.build(scheme="http", host=settings.host, port=settings.port, path=f"/webhook{token}")


def _checked(url: str) -> URL:
    # What a library says of a bad URL quotes it whole, with the token that its path may hold.
    try:
        target = URL(url)
        is_good = target.scheme in ("http", "https") and target.host is not None and target.port is not None
    except ValueError:
        is_good = False
    if not is_good:
        end("--url must be an http or https URL", MISUSED)
    return target


async def _put(url: URL, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=SEND_SECONDS_MAX)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.put(url, data=body, headers=headers) as response,
        ):
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Its path may hold a token.
        said = error.strerror if isinstance(error, OSError) else type(error).__name__
        end(f"cannot send to {url.origin()}: {said or 'no answer in time'}")


def token() -> None:
    out.print(secrets.token_urlsafe(TOKEN_BYTES), markup=False)
