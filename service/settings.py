"""The settings, read from the environment and a file; nothing else in the service reads either."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.database.embedded_postgres import default_state_dir

PREFIX: Final = "ORDER_TRACKING_"
# Beside the Makefile, wherever a command is called from: two commands must never mean two databases.
DEFAULT_FILE: Final = Path(__file__).resolve().parent.parent / ".env"
FILE_VARIABLE: Final = f"{PREFIX}ENV_FILE"


# Short ones can be guessed.
SECRET_CHARACTERS_MIN: Final = 16
# Labels of letters, digits and hyphens; one of digits alone at the end would be a broken address.
_HOST_NAME: Final = re.compile(r"(?!.*\.\d+$)(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
# What stands in a path as it is.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~-]+")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach what listens on a host."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and not parts:
        raise ValueError("there is nothing between its commas")
    return parts


class SettingsError(Exception):
    """A setting is wrong. ``str()`` is one line that names it."""


class Settings(BaseSettings):
    """What an operator can choose. Each field is the variable of its name with ORDER_TRACKING_ before it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field(default="127.0.0.1", description="the address to listen on")
    port: int = Field(default=8080, ge=0, le=65_535, description="the port to listen on; 0: any free one")
    reuse_port: bool = Field(
        default=False, description="whether other processes may listen on the same port (SO_REUSEPORT)"
    )
    database_url: str = Field(
        default="", repr=False, description="a PostgreSQL 15 to 18 to use; empty: the embedded one"
    )
    state_dir: Path = Field(
        default_factory=default_state_dir, description="where the embedded PostgreSQL keeps its data"
    )
    pg_bindir: Path | None = Field(
        default=None, description="the folder of PostgreSQL's programs, in place of the embedded ones"
    )
    webhook_tokens: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_listed)] = Field(
        default=(), description="a comma list of tokens, one of which must end the webhook's path; empty: open"
    )
    webhook_hmac_secret: SecretStr = Field(
        default=SecretStr(""), description="the secret of the body's signature; empty: none is asked for"
    )
    webhook_hmac_header: str = Field(
        default="X-Callback-Api-Key",
        pattern=r"^[A-Za-z0-9-]+$",
        description="the header that holds the hex HMAC-SHA256 of the body",
    )
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(_listed)] = Field(
        default=(), description="a comma list of networks whose X-Forwarded-For is believed"
    )
    # At 64 KiB each, 640 MB an hour at the very worst.
    quarantine_hourly_max: int = Field(
        default=10_000, ge=1, le=10_000_000, description="how many bodies an hour the quarantine takes"
    )
    # A report of the sender's has some hundred bytes.
    body_bytes_max: int = Field(
        default=65_536, ge=1_024, le=1_048_576, description="the size of a webhook's body"
    )
    # The sender's patience is not published; 3 s is short of any.
    request_seconds_max: float = Field(
        default=3.0, gt=0, le=60, description="how long one request may take, waiting included"
    )
    # About a second's work: what waited behind more would be past its time before its turn came.
    queue_reports_max: int = Field(
        default=16_384, ge=1, le=1_000_000, description="how many reports may wait for their commit"
    )
    log_format: Literal["human", "json"] = Field(
        default="human", description="how log lines are written, human or json"
    )
    log_requests: bool = Field(
        default=False, description="whether each request has a log line: method, route, status, time and id"
    )

    komerce_base_url: str = Field(
        default="", description="where Komerce's API is, for register; PUT /webhook below it is asked"
    )
    komerce_api_key: SecretStr = Field(
        default=SecretStr(""), description="the key of Komerce's API, for register and simulate"
    )

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine can reach the service, by way of a proxy neither."""
        return not self.trusted_proxies and is_loopback(self.host)

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if not _is_address(host) and not _HOST_NAME.fullmatch(host):
            raise ValueError("it must be an IP address or a host name")
        return host

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, url: str) -> str:
        if url and not url.startswith(("postgresql://", "postgres://")):
            raise ValueError("it must begin with postgresql://")
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("its port is no port") from None
        try:
            _ = (parts.hostname or "").encode("idna")
        except UnicodeError:
            raise ValueError("its host is no host name") from None
        return url

    @field_validator("webhook_tokens")
    @classmethod
    def _are_tokens(cls, tokens: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for token in tokens:
            if len(token) < SECRET_CHARACTERS_MIN or not _TOKEN.fullmatch(token.get_secret_value()):
                raise ValueError(
                    f"each must have {SECRET_CHARACTERS_MIN} or more of the characters A-Z a-z 0-9 . _ ~ - "
                    "('order-tracking token' makes one)"
                )
        return tokens

    @field_validator("webhook_hmac_secret")
    @classmethod
    def _is_long(cls, secret: SecretStr) -> SecretStr:
        if 0 < len(secret) < SECRET_CHARACTERS_MIN:
            raise ValueError(f"it must have {SECRET_CHARACTERS_MIN} or more characters")
        return secret

    @field_validator("state_dir")
    @classmethod
    def _is_absolute(cls, state_dir: Path) -> Path:
        return state_dir.expanduser().absolute()


def _names_in(file: Path) -> list[str]:
    """Return the names that a file of settings has; a line that is not one must not pass for no setting."""
    try:
        if not file.exists():
            return []
        with file.open(encoding="utf-8") as lines:
            found = [*parse_stream(lines)]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from None
    for line in found:
        # A comment and an empty line have no key.
        if line.error or (line.key is not None and line.value is None):
            raise SettingsError(f"{file}, line {line.original.line}, is no setting: NAME=value is one")
    return [line.key for line in found if line.key is not None]


def read_settings() -> Settings:
    """Read the settings.

    Raises:
        SettingsError: one is wrong, or a variable with our prefix is none of ours.
    """
    file = Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE))
    if FILE_VARIABLE in os.environ and (not file.exists() or file.is_dir()):
        raise SettingsError(f"{FILE_VARIABLE} names {file}, which is no file")
    given = {name.upper() for name in (*os.environ, *_names_in(file))} - {FILE_VARIABLE}
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    unknown = sorted(name for name in given if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise SettingsError(f"{unknown[0]} is no setting; there are {', '.join(sorted(known))}")
    try:
        return Settings(_env_file=file)  # type: ignore[call-arg]  # an argument that only its plugin knows
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{first['loc'][0]}".upper()
        raise SettingsError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
