from typing import Annotated

import typer
from yarl import URL

from service import registration
from service.console import EXIT_FAILURE, EXIT_USAGE, err, fail, show
from service.features.settings import read_settings
from service.registration import (
    RegistrationError,
    UnusableUrlError,
    append_token,
    has_token,
    is_token_visible,
)


async def register(
    url: Annotated[
        str,
        typer.Argument(
            help="Your webhook's URL. One that ends in /webhook gets the last token of the setting."
        ),
    ],
    *,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow http, for a test.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Register a URL without a token that this service accepts.")
    ] = False,
) -> None:
    settings = read_settings()
    for name in ("komerce_base_url", "komerce_api_key"):
        if not getattr(settings, name):
            fail(f"ORDER_TRACKING_{name.upper()} is not set: set it to register a webhook", EXIT_USAGE)
    key = settings.komerce_api_key.get_secret_value()
    tokens = [*settings.tokens]
    webhook = append_token(url, tokens)
    if not has_token(URL(webhook), tokens) and not force:
        fail(
            "the URL does not end in a token of ORDER_TRACKING_WEBHOOK_TOKENS, so this service would answer "
            "Komerce with 404: let it end in /webhook, or pass --force if it leads to another service",
            EXIT_USAGE,
        )
    try:
        await registration.register(settings.komerce_base_url, key, webhook, is_insecure=insecure)
    except RegistrationError as error:
        message = str(error)  # Komerce's own message may repeat the URL
        for token in tokens:
            message = message.replace(token, "<token>")
        fail(message, EXIT_USAGE if isinstance(error, UnusableUrlError) else EXIT_FAILURE)
    if webhook == url and is_token_visible(URL(url), tokens):
        err.print(
            "warning: other users can see the token on your command line, in the process list: set "
            "ORDER_TRACKING_WEBHOOK_TOKENS, and let the URL end in /webhook"
        )
    # The path is not printed, because it may hold a token.
    show(f"registered: Komerce now pushes to {URL(url).origin()}")
