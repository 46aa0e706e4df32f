"""``send`` and ``token``: the webhook, from the sender's side."""

import asyncio
import secrets
from typing import Annotated, Final

import aiohttp
import typer
from yarl import URL

from service.commands.console import (
    WRONG,
    end,
    out,
    plain_errors,
)
from service.settings import read_settings

# For one webhook that a person sends by hand.
SEND_SECONDS_MAX: Final = 10.0

TOKEN_BYTES: Final = 32


def send(
    order_no: str,
    cnote: str,
    status: str,
    url: Annotated[str | None, typer.Option(help="Where to; the configured host and port if left out.")] = None,
) -> None:
    """Send one webhook as Komerce would, and print the receipt."""
    with plain_errors():
        settings = read_settings()
        token = "".join(f"/{token.get_secret_value()}" for token in settings.webhook_tokens[:1])
        target = url or f"http://{settings.host}:{settings.port}/webhook{token}"
        body = {"order_no": order_no, "cnote": cnote, "status": status}
        code, text = asyncio.run(_put(target, body))
    out.print(text, markup=False)
    if code != 200:  # noqa: PLR2004 - the one answer that means committed
        raise typer.Exit(WRONG)
    raise typer.Exit(0 if '"outcome":"advanced"' in text or '"outcome":"repeated"' in text else WRONG)


async def _put(url: str, body: dict[str, str]) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=SEND_SECONDS_MAX)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.put(url, json=body) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Its path may hold a token.
        end(f"cannot send to {URL(url).origin()}: {error or 'no answer in time'}")


def token() -> None:
    """Make a good webhook token for ORDER_TRACKING_WEBHOOK_TOKENS."""
    out.print(secrets.token_urlsafe(TOKEN_BYTES), markup=False)
