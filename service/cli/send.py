from typing import Annotated, Final

import aiohttp
import orjson
import typer

from service.console import EXIT_FAILURE, EXIT_USAGE, fail, show
from service.features.settings import read_settings
from service.ingest.signatures import make_scheme
from service.registration import UnusableUrlError, parse_url, webhook_url

SEND_SECONDS_MAX: Final = 10.0
OK: Final = 200


async def send(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    cnote: Annotated[str, typer.Argument(help="The airway bill number.")],
    status: Annotated[str, typer.Argument(help="The status, in any word that Komerce uses.")],
    url: Annotated[str | None, typer.Option(help="Webhook URL; the configured one if left out.")] = None,
) -> int | None:
    settings = read_settings()
    try:
        target = webhook_url(settings) if url is None else parse_url(url, "--url")
    except UnusableUrlError as error:
        fail(error, EXIT_USAGE)
    body = orjson.dumps({"order_no": order_no, "cnote": cnote, "status": status})
    headers = {"Content-Type": "application/json"}
    scheme = make_scheme(settings.webhook_hmac_secret.get_secret_value(), settings.webhook_hmac_header)
    if scheme is not None:
        headers |= scheme.sign(body)
    timeout = aiohttp.ClientTimeout(total=SEND_SECONDS_MAX)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            # A redirect could lead the report elsewhere.
            session.put(target, data=body, headers=headers, allow_redirects=False) as response,
        ):
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Neither the error's own text nor the path is printed: the path may hold a token.
        cause = error.strerror if isinstance(error, OSError) else type(error).__name__
        fail(f"cannot send to {target.origin()}: {cause or f'no response within {SEND_SECONDS_MAX:g} s'}")
    show(text.rstrip())
    is_expected = '"outcome":"advanced"' in text or '"outcome":"repeated"' in text
    return None if response.status == OK and is_expected else EXIT_FAILURE
