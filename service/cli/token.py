import secrets
from typing import Final

from service.cli.console import out

TOKEN_BYTES: Final = 32


def token() -> None:
    out.print(secrets.token_urlsafe(TOKEN_BYTES))
