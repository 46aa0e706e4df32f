from typing import Annotated

import typer
from yarl import URL

from service.cli.console import EXIT_FAILURE, EXIT_USAGE, err, fail, show
from service.settings import read_settings
from service.simulator import registration
from service.simulator.registration import RegistrationError, UnusableUrlError, has_token


async def register(
    url: Annotated[str, typer.Argument(help="Your webhook's URL, with the token in its path.")],
    *,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow http, for a test.")] = False,
) -> None:
    settings = read_settings()
    for name in ("komerce_base_url", "komerce_api_key"):
        if not getattr(settings, name):
            fail(f"ORDER_TRACKING_{name.upper()} is not set: set it to register a webhook", EXIT_USAGE)
    key = settings.komerce_api_key.get_secret_value()
    try:
        await registration.register(settings.komerce_base_url, key, url, is_insecure=insecure)
    except RegistrationError as error:
        fail(error, EXIT_USAGE if isinstance(error, UnusableUrlError) else EXIT_FAILURE)
    if not has_token(URL(url), [*settings.tokens]):
        err.print(
            "warning: the URL does not end in a token of ORDER_TRACKING_WEBHOOK_TOKENS, "
            "so your service may answer Komerce with 404"
        )
    # The path is not printed, because it may hold a token.
    show(f"registered: Komerce now pushes to {URL(url).origin()}")
