"""The settings. Only this module reads the environment and the settings file."""

import os
import re
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

import platformdirs
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.command_name import command_name
from service.dsn import SCHEMES, as_reader, read_hosts, read_target
from service.standard_webhooks import SECRET_PREFIX
from service.vocabulary import VocabularyFile, read_vocabulary

PREFIX: Final = "ORDER_TRACKING_"
# Beside the Makefile, not in the working directory, so that every command uses the same database.
DEFAULT_FILE: Final = Path(__file__).resolve().parent.parent / ".env"
FILE_VARIABLE: Final = f"{PREFIX}ENV_FILE"

# The settings of earlier releases that have no effect, each with what replaces it.
REMOVED: Final = {
    f"{PREFIX}PROCESSES": "to use more cores, start several services on one database: see docs/operations.md",
}
AnySettings = TypeVar("AnySettings", bound="CoreSettings")

# The permissions of a file's group and of all other users.
OTHER_USERS: Final = 0o077

# In the place of the features' names.
NO_FEATURE: Final = "none"
# A shorter secret can be guessed.
SECRET_CHARACTERS_MIN: Final = 16
# Labels of letters, digits, hyphens and underscores. A last label of digits is a malformed IP address.
_HOST_NAME: Final = re.compile(r"(?!.*\.\d+$)(?=.{1,253}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
# Characters that need no escape in a URL path.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~-]+")
_BASE64: Final = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,32}")


def _parse_address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, which only this machine can reach."""
    address = _parse_address(host)
    return address.is_loopback if address else host.lower() == "localhost"


def default_state_dir() -> Path:
    """Return the user's data folder; for root, one in /var/lib, since PostgreSQL's user cannot enter /root."""
    if os.geteuid() == 0:
        return Path("/var/lib/order-tracking")
    return platformdirs.user_data_path("order-tracking", appauthor=False)


def split_list(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and not parts:
        raise ValueError("the list is empty: write values between the commas, or remove the setting")
    return parts


def _check_host(host: str) -> str:
    if not _parse_address(host) and not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{host!r} is not an IP address or a host name")
    return host


def _check_vocabulary_file(path: Path | None) -> Path | None:
    return read_vocabulary(path and path.expanduser().absolute()).path


def _check_database_url(url: str) -> str:
    if url and not url.startswith(SCHEMES):
        raise ValueError("the URL must begin with postgresql://")
    _ = read_hosts(url), read_target(url)
    return url


def _check_timezone(name: str) -> str:
    try:
        zone = ZoneInfo(name)
    # OSError: the name of a folder, or a name that is too long for a file.
    except (ZoneInfoNotFoundError, ValueError, OSError):
        similar = get_close_matches(name, sorted(available_timezones()), 1)
        hint = f". Did you mean {similar[0]}?" if similar else ""
        raise ValueError(
            f"{name!r} is not a time zone of the IANA database, such as Asia/Jakarta{hint}"
        ) from None
    january = datetime(datetime.now(UTC).year, 1, 1, tzinfo=UTC)
    offsets = {(january + timedelta(days=days)).astimezone(zone).utcoffset() for days in range(0, 366, 30)}
    # Reports are counted by hours of UTC, so each day must begin with one.
    if any((offset or timedelta()) % timedelta(hours=1) for offset in offsets):
        raise ValueError(f"{name} differs from UTC by a part of an hour. Expected a difference of whole hours")
    return name


def _split_token(token: SecretStr) -> tuple[str | None, str]:
    """Return the name of a token, None if it has none, and the token itself."""
    before, colon, after = token.get_secret_value().partition(":")
    return (before, after) if colon else (None, before)


def _check_token(token: SecretStr) -> SecretStr:
    name, secret = _split_token(token)
    if name is not None and not _TOKEN_NAME.fullmatch(name):
        raise ValueError(
            "a token's name must have 1 to 32 of the characters A-Z a-z 0-9 . _ -, as in shop:TOKEN"
        )
    if len(secret) < SECRET_CHARACTERS_MIN or not _TOKEN.fullmatch(secret):
        raise ValueError(
            f"a token must have {SECRET_CHARACTERS_MIN} or more of the characters A-Z a-z 0-9 . _ ~ - "
            f"('{command_name()} token' generates one)"
        )
    return token


Token: TypeAlias = Annotated[SecretStr, AfterValidator(_check_token)]


def _check_tokens(tokens: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if len({_split_token(token)[1] for token in tokens}) < len(tokens):
        raise ValueError("a token occurs twice, perhaps with two names: keep one of them")
    return tokens


def _check_secret(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if 0 < len(text.removeprefix(SECRET_PREFIX)) < SECRET_CHARACTERS_MIN or text == SECRET_PREFIX:
        raise ValueError(f"the secret must have {SECRET_CHARACTERS_MIN} or more characters")
    if text.startswith(SECRET_PREFIX) and not _BASE64.fullmatch(text.removeprefix(SECRET_PREFIX)):
        raise ValueError(f"after {SECRET_PREFIX}, the secret must be base64")
    return secret


def _check_features(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if names is None or names == (NO_FEATURE,):
        return names and ()
    if NO_FEATURE in names:
        raise ValueError(f"{NO_FEATURE} stands alone, without other names")
    return tuple(dict.fromkeys(names))


class SettingsError(Exception):
    """A setting is invalid. ``str()`` is one line that names it."""


class CoreSettings(BaseSettings):
    """The settings of the core. A field's variable is ORDER_TRACKING_ and the field's name in capitals.

    Features extend it by their own.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    host: Annotated[str, AfterValidator(_check_host)] = "127.0.0.1"
    """the address to listen on"""
    port: int = Field(default=8080, ge=0, le=65_535)
    """the port to listen on; 0 for any free port"""
    reuse_port: bool = False
    """whether other processes may listen on the same port (SO_REUSEPORT)"""
    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """a further port, on HOST, for this service's own /metrics, /livez and /readyz; 0 for any free port"""
    database_url: Annotated[str, AfterValidator(_check_database_url)] = Field(default="", repr=False)
    """the URL of your own PostgreSQL 15 to 18; empty for the embedded one"""
    read_only: bool = False
    """whether the service only reads, as on a standby, and refuses webhooks"""
    replica_age_seconds_max: float = Field(default=30.0, gt=0, le=86_400)
    """with READ_ONLY, the seconds of commits that a ready service's standby may have missed"""
    state_dir: Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())] = Field(
        default_factory=default_state_dir
    )
    """the embedded PostgreSQL's data folder"""
    pg_bindir: Path | None = None
    """the folder of PostgreSQL's programs; empty for the embedded ones"""
    webhook_tokens: Annotated[
        tuple[Token, ...], NoDecode, BeforeValidator(split_list), AfterValidator(_check_tokens)
    ] = ()
    """comma-separated tokens, alone or as name:token; the webhook's path must end with one; empty for none"""
    webhook_hmac_secret: Annotated[SecretStr, AfterValidator(_check_secret)] = SecretStr("")
    """the secret that signs webhook bodies, whsec_... for Standard Webhooks; empty for no signature"""
    webhook_hmac_header: str = Field(default="X-Callback-Api-Key", pattern=r"^[A-Za-z0-9-]+$")
    """the header with the body's HMAC-SHA256 in hex"""
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(split_list)] = ()
    """comma-separated networks whose X-Forwarded-For header is trusted"""
    # At 64 KiB per body, the quarantine grows by at most 640 MB an hour.
    quarantine_hourly_max: int = Field(default=10_000, ge=1, le=10_000_000)
    """the maximum number of new quarantined bodies in an hour"""
    # At 500 bytes per body, twenty million reports an hour. Without a limit, a stolen token fills any disk.
    webhook_bytes_hourly_max: int = Field(default=10 * 1024**3, ge=1024**2)
    """the maximum bytes of all bodies within an hour; further ones get 503"""
    # A report from Komerce has a few hundred bytes.
    body_bytes_max: int = Field(default=65_536, ge=1_024, le=1_048_576)
    """the maximum size of a webhook body in bytes"""
    # Komerce does not publish its timeout. 3 s is shorter than any common one.
    request_seconds_max: float = Field(default=3.0, gt=0, le=60)
    """the maximum seconds to record a report or run a read, queue included"""
    # About one second of work, so that the last report of a full queue keeps within request_seconds_max.
    queue_reports_max: int = Field(default=16_384, ge=1, le=1_000_000)
    """the maximum number of reports that wait for their commit"""
    body_retention_days: int = Field(default=0, ge=0, le=36_500)
    """the days after which bodies of settled orders are erased; 0 for never"""
    features: Annotated[
        tuple[str, ...] | None, NoDecode, BeforeValidator(split_list), AfterValidator(_check_features)
    ] = None
    """the comma-separated features that are on, "none" for no feature; empty for the default"""
    timezone: Annotated[str, AfterValidator(_check_timezone)] = "Asia/Jakarta"
    """the time zone of the pages' times and of the days of the statistics, as an IANA name"""
    log_format: Literal["human", "json"] = "human"
    """the format of log lines, human or json"""
    log_requests: bool = False
    """whether to log each request: method, route, status, time and id"""
    vocabulary_file: Annotated[Path | None, AfterValidator(_check_vocabulary_file)] = None
    """a TOML file of further status words, such as "antar ulang" = "problem"; empty for none"""
    komerce_base_url: str = ""
    """the URL of Komerce's API; register sends PUT /webhook to it"""
    komerce_api_key: SecretStr = SecretStr("")
    """the key of Komerce's API, for register and simulate"""

    @model_validator(mode="after")
    def _check_reader(self) -> Self:
        """Refuse settings that contradict ``read_only``. The error of a model must name its settings itself."""
        if not self.read_only:
            return self
        if not self.database_url:
            raise ValueError(
                f"{PREFIX}READ_ONLY needs {PREFIX}DATABASE_URL, the URL of a standby or of a primary: "
                "the embedded PostgreSQL belongs to the service that records"
            )
        if self.body_retention_days:
            raise ValueError(
                f"{PREFIX}READ_ONLY contradicts {PREFIX}BODY_RETENTION_DAYS, which is "
                f"{self.body_retention_days}: set the latter only for the service that records"
            )
        try:
            as_reader(self.database_url)
        except ValueError as error:
            raise ValueError(f"{PREFIX}READ_ONLY contradicts {PREFIX}DATABASE_URL: {error}") from None
        return self

    @property
    def own_dsn(self) -> str:
        """The DSN of your own PostgreSQL, with which a reader only reads; empty for the embedded one."""
        return as_reader(self.database_url) if self.read_only else self.database_url

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service: it listens on loopback and trusts no proxy."""
        return not self.trusted_proxies and is_loopback(self.host)

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of the pages and of the statistics."""
        return ZoneInfo(self.timezone)

    @property
    def vocabulary(self) -> VocabularyFile:
        """The vocabulary, with the words of the file.

        Raises:
            ValueError: the file has become invalid since the settings were read.
        """
        return read_vocabulary(self.vocabulary_file)

    @property
    def tokens(self) -> dict[str, str | None]:
        """The webhook's tokens, each with its name, None if it has none."""
        return {token: name for name, token in map(_split_token, self.webhook_tokens)}

    @property
    def is_open(self) -> bool:
        """Whether programs of this machine need no token, and no API key until one exists.

        A token or a secret shows that strangers are expected, perhaps through a proxy on this machine.
        """
        return self.is_local and not self.webhook_tokens and not self.webhook_hmac_secret


def _settings_file() -> Path:
    return Path(os.environ.get(FILE_VARIABLE, DEFAULT_FILE))


def _find_file() -> Path:
    """Return the settings file, which need not exist if no variable names it.

    Raises:
        SettingsError: a variable names something else than a file.
    """
    file = _settings_file()
    if FILE_VARIABLE in os.environ and (not file.exists() or file.is_dir()):
        raise SettingsError(f"{FILE_VARIABLE}: {file} is not a file. Expected the path of a settings file")
    return file


def _read_file(file: Path) -> dict[str, str]:
    """Return the variables in a settings file, with their names in capitals.

    Raises:
        SettingsError: the file cannot be read, or a line is not NAME=value. The library would skip such a line:
            a mistyped line with the tokens would leave the webhook open.
    """
    try:
        if not file.exists():
            return {}
        with file.open(encoding="utf-8") as lines:
            bindings = [*parse_stream(lines)]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"Cannot read the settings file {file}: {error}") from None
    for binding in bindings:
        # Comments and empty lines have no key.
        if binding.error or (binding.key is not None and binding.value is None):
            raise SettingsError(f"{file}, line {binding.original.line}: expected NAME=value")
    return {binding.key.upper(): binding.value or "" for binding in bindings if binding.key is not None}


def find_removed() -> dict[str, str]:
    """Return the settings that are set and have no effect any more, each with what replaces it.

    Raises:
        SettingsError: the settings file cannot be read.
    """
    names = {name.upper() for name in (*os.environ, *_read_file(_settings_file()))}
    return {name: replacement for name, replacement in REMOVED.items() if name in names}


def find_exposed_file(model: type[CoreSettings]) -> Path | None:
    """Return the settings file if other users can read it and it holds a secret.

    Args:
        model: all settings.

    Raises:
        SettingsError: the file cannot be read.
    """
    file = _settings_file()
    values = _read_file(file)
    names = [name for name, field in model.model_fields.items() if "Secret" in str(field.annotation)]
    secrets = [values.get(f"{PREFIX}{name}".upper()) for name in names]
    is_secret = any(secrets) or _has_password(values.get(f"{PREFIX}DATABASE_URL", ""))
    return file if is_secret and file.stat().st_mode & OTHER_USERS else None


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password) or "password" in parse_qs(parts.query)


def refuse_unknown(model: type[CoreSettings]) -> None:
    """Refuse settings that have no effect, such as one with a mistyped name.

    Args:
        model: all settings.

    Raises:
        SettingsError: a variable with the prefix ORDER_TRACKING_ is unknown, a setting in the file lacks the
            prefix, or there is no settings file where a variable says that it is.
    """
    known = {f"{PREFIX}{name}".upper() for name in model.model_fields}
    file = _find_file()
    in_file = _read_file(file)
    # In the environment, other programs use such names. In this file, a token would silently have no effect.
    if unprefixed := [name for name in in_file if f"{PREFIX}{name}".upper() in known]:
        raise SettingsError(f"{file}: {unprefixed[0]} has no effect: write {PREFIX}{unprefixed[0].upper()}")
    names = {name.upper() for name in (*os.environ, *in_file)} - {FILE_VARIABLE, *REMOVED}
    unknown = sorted(name for name in names if name.startswith(PREFIX) and name not in known)
    if unknown:
        similar = get_close_matches(unknown[0], sorted(known), 1)
        hint = f". Did you mean {similar[0]}?" if similar else ""
        raise SettingsError(f"Unknown setting {unknown[0]}. Known settings: {', '.join(sorted(known))}{hint}")


def read(model: type[AnySettings]) -> AnySettings:
    """Read settings.

    Args:
        model: those of the core, of a feature, or all.

    Raises:
        SettingsError: a setting is invalid, or there is no settings file where a variable says that it is.
    """
    file = _find_file()
    try:
        return model(_env_file=file)  # type: ignore[call-arg]  # an argument that mypy sees only with a plugin
    except ValidationError as error:
        first = error.errors()[0]
        name = f"{PREFIX}{first['loc'][0]}: ".upper() if first["loc"] else ""
        raise SettingsError(f"{name}{first['msg'].removeprefix('Value error, ')}") from None
