import secrets
from typing import Final

from service.console import show

TOKEN_BYTES: Final = 32


def token() -> None:
    show(secrets.token_urlsafe(TOKEN_BYTES))
