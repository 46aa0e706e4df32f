"""The settings. Only this module reads the environment and the settings file."""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import platformdirs
from dotenv.parser import parse_stream
from pydantic import BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX: Final = "ORDER_TRACKING_"
# Beside the Makefile, not in the working directory: every command must use the same database.
DEFAULT_FILE: Final = Path(__file__).resolve().parent.parent / ".env"
FILE_VARIABLE: Final = f"{PREFIX}ENV_FILE"

# A shorter secret can be guessed.
SECRET_CHARACTERS_MIN: Final = 16
# Labels of letters, digits, hyphens and underscores. A last label of digits is a malformed IP address.
_HOST_NAME: Final = re.compile(r"(?!.*\.\d+$)(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
# Characters that a URL path holds without an escape.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~-]+")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, which only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def default_state_dir() -> Path:
    """Return the user's data folder; for root one below /var/lib, as PostgreSQL's user cannot enter /root."""
    if os.geteuid() == 0:
        return Path("/var/lib/order-tracking")
    return platformdirs.user_data_path("order-tracking", appauthor=False)


def _split_list(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and not parts:
        raise ValueError("the list is empty: write values between the commas, or remove the setting")
    return parts


class SettingsError(Exception):
    """A setting is invalid. ``str()`` is one line that names it."""


class Settings(BaseSettings):
    """The operator's settings. The variable of each field is its name in capitals after ORDER_TRACKING_."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field(default="127.0.0.1", description="the address to listen on")
    port: int = Field(default=8080, ge=0, le=65_535, description="the port to listen on; 0 for any free port")
    reuse_port: bool = Field(
        default=False, description="whether other processes may listen on the same port (SO_REUSEPORT)"
    )
    database_url: str = Field(
        default="",
        repr=False,
        description="the URL of your own PostgreSQL 15 to 18; empty for the embedded one",
    )
    state_dir: Path = Field(
        default_factory=default_state_dir, description="the embedded PostgreSQL's data folder"
    )
    pg_bindir: Path | None = Field(
        default=None, description="the folder of PostgreSQL's programs; empty for the embedded ones"
    )
    webhook_tokens: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(),
        description="comma-separated tokens; the webhook's path must end with one of them; empty for no token",
    )
    webhook_hmac_secret: SecretStr = Field(
        default=SecretStr(""), description="the secret that signs webhook bodies; empty for no signature"
    )
    webhook_hmac_header: str = Field(
        default="X-Callback-Api-Key",
        pattern=r"^[A-Za-z0-9-]+$",
        description="the header with the body's HMAC-SHA256 in hex",
    )
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(_split_list)] = Field(
        default=(), description="comma-separated networks whose X-Forwarded-For header is trusted"
    )
    # At 64 KiB a body, the quarantine grows by at most 640 MB an hour.
    quarantine_hourly_max: int = Field(
        default=10_000,
        ge=1,
        le=10_000_000,
        description="the maximum number of new quarantined bodies in an hour",
    )
    # A report from Komerce has a few hundred bytes.
    body_bytes_max: int = Field(
        default=65_536, ge=1_024, le=1_048_576, description="the maximum size of a webhook body in bytes"
    )
    # Komerce does not publish its timeout. 3 s is shorter than any usual one.
    request_seconds_max: float = Field(
        default=3.0, gt=0, le=60, description="the maximum time for one request in seconds, waiting included"
    )
    # About one second of work. Behind a longer queue a report would exceed request_seconds_max.
    queue_reports_max: int = Field(
        default=16_384,
        ge=1,
        le=1_000_000,
        description="the maximum number of reports that wait for their commit",
    )
    log_format: Literal["human", "json"] = Field(
        default="human", description="the format of log lines, human or json"
    )
    log_requests: bool = Field(
        default=False, description="whether to log each request: method, route, status, time and id"
    )

    komerce_base_url: str = Field(
        default="", description="the URL of Komerce's API; register sends PUT /webhook to it"
    )
    komerce_api_key: SecretStr = Field(
        default=SecretStr(""), description="the key of Komerce's API, for register and simulate"
    )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service: it listens on loopback and trusts no proxy."""
        return not self.trusted_proxies and is_loopback(self.host)

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if not _is_address(host) and not _HOST_NAME.fullmatch(host):
            raise ValueError(f"{host!r} is not an IP address or a host name")
        return host

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, url: str) -> str:
        if url and not url.startswith(("postgresql://", "postgres://")):
            raise ValueError("the URL must begin with postgresql://")
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ValueError("the port must be a number from 0 to 65535") from None
        try:
            _ = (parts.hostname or "").encode("idna")
        except UnicodeError:
            raise ValueError("the host must be a valid host name or IP address") from None
        return url

    @field_validator("webhook_tokens")
    @classmethod
    def _are_tokens(cls, tokens: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for token in tokens:
            if len(token) < SECRET_CHARACTERS_MIN or not _TOKEN.fullmatch(token.get_secret_value()):
                raise ValueError(
                    f"a token must have {SECRET_CHARACTERS_MIN} or more of the characters A-Z a-z 0-9 . _ ~ - "
                    "('order-tracking token' generates one)"
                )
        return tokens

    @field_validator("webhook_hmac_secret")
    @classmethod
    def _is_long(cls, secret: SecretStr) -> SecretStr:
        if 0 < len(secret) < SECRET_CHARACTERS_MIN:
            raise ValueError(f"the secret must have {SECRET_CHARACTERS_MIN} or more characters")
        return secret

    @field_validator("state_dir")
    @classmethod
    def _is_absolute(cls, state_dir: Path) -> Path:
        return state_dir.expanduser().absolute()


def _read_names(file: Path) -> list[str]:
    """Return the names of the variables in a settings file.

    Raises:
        SettingsError: the file cannot be read, or a line is not NAME=value. The library would skip that line,
            and a mistyped token would leave the webhook open.
    """
    try:
        if not file.exists():
            return []
        with file.open(encoding="utf-8") as lines:
            bindings = [*parse_stream(lines)]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"Cannot read the settings file {file}: {error}") from None
    for binding in bindings:
        # Comments and empty lines have no key.
        if binding.error or (binding.key is not None and binding.value is None):
            raise SettingsError(f"{file}, line {binding.original.line}: expected NAME=value")
    return [binding.key for binding in bindings if binding.key is not None]


def read_settings() -> Settings:
    """Read the settings.

    Raises:
        SettingsError: a setting is invalid, or a variable with the prefix ORDER_TRACKING_ is unknown.
    """
    file = Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE))
    if FILE_VARIABLE in os.environ and (not file.exists() or file.is_dir()):
        raise SettingsError(f"{FILE_VARIABLE}: {file} is not a file. Expected the path of a settings file")
    names = {name.upper() for name in (*os.environ, *_read_names(file))} - {FILE_VARIABLE}
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    unknown = sorted(name for name in names if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise SettingsError(f"Unknown setting {unknown[0]}. Known settings: {', '.join(sorted(known))}")
    try:
        return Settings(_env_file=file)  # type: ignore[call-arg]  # an argument that mypy sees only with a plugin
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{first['loc'][0]}".upper()
        raise SettingsError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
