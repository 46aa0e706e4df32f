"""Each invalid setting, from the environment or the file, causes a one-line error that names it."""

import os
import re
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo, reset_tzpath

import pytest

from service.features.settings import Settings, read_settings
from service.registration import webhook_url
from service.settings import SettingsError, default_state_dir, find_exposed_file

TOKEN = "a-token-of-16-characters"  # noqa: S105 - not a real token


@pytest.fixture(autouse=True)
def _no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own .env file."""
    (tmp_path / ".env").touch()
    monkeypatch.setenv("ORDER_TRACKING_ENV_FILE", str(tmp_path / ".env"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "x", "ORDER_TRACKING_PORT: "),
        ("PORT", "70000", "ORDER_TRACKING_PORT: "),
        (
            "DATABASE_URL",
            "postgresql://u@h1:5432,h2:x/db",
            "ORDER_TRACKING_DATABASE_URL: the port 'x' of h2 is not a number from 1 to 65535",
        ),
        (
            "DATABASE_URL",
            "postgresql://u@h1,h2/db?target_session_attrs=master",
            "ORDER_TRACKING_DATABASE_URL: target_session_attrs is 'master', but must be one of any, ",
        ),
        (
            "DATABASE_URL",
            "postgresql:///db?host=h1,h2&port=1,2,3",
            "ORDER_TRACKING_DATABASE_URL: it names 2 hosts and 3 ports: name one port, or one for each host",
        ),
        ("DATABASE_URL", "mysql://x", "ORDER_TRACKING_DATABASE_URL: the URL must begin with postgresql://"),
        ("BODY_BYTES_MAX", "1", "ORDER_TRACKING_BODY_BYTES_MAX: "),
        (
            "PROT",
            "8080",
            "Unknown setting ORDER_TRACKING_PROT. Known settings: ORDER_TRACKING_BODY_BYTES_MAX, ",
        ),
        (
            "prot",
            "8080",
            "Unknown setting ORDER_TRACKING_PROT. Known settings: ORDER_TRACKING_BODY_BYTES_MAX, ",
        ),
        ("TIMEZONE", "WIB", "ORDER_TRACKING_TIMEZONE: 'WIB' is not a time zone of the IANA database, "),
        ("HOST", "x" * 64, f"ORDER_TRACKING_HOST: '{'x' * 64}' is not an IP address or a host name"),
        ("HOST", "999.1.1.1", "ORDER_TRACKING_HOST: '999.1.1.1' is not an IP address or a host name"),
        ("WEBHOOK_TOKENS", "short", "ORDER_TRACKING_WEBHOOK_TOKENS: a token must have 16 or more "),
        (
            "WEBHOOK_TOKENS",
            "has/a/slash-in-it-1234",
            "ORDER_TRACKING_WEBHOOK_TOKENS: a token must have 16 or more ",
        ),
        ("WEBHOOK_TOKENS", ",", "ORDER_TRACKING_WEBHOOK_TOKENS: the list is empty: "),
        ("WEBHOOK_TOKENS", f"a:{TOKEN},{TOKEN}", "ORDER_TRACKING_WEBHOOK_TOKENS: a token occurs twice, "),
        ("WEBHOOK_TOKENS", f"a b:{TOKEN}", "ORDER_TRACKING_WEBHOOK_TOKENS: a token's name must have "),
        (
            "WEBHOOK_HMAC_SECRET",
            "short",
            "ORDER_TRACKING_WEBHOOK_HMAC_SECRET: the secret must have 16 or more ",
        ),
        ("SHARE_SECRET", "short", "ORDER_TRACKING_SHARE_SECRET: the secret must have 16 or more "),
        ("TRUSTED_PROXIES", "10.0.0.0/8,x", "ORDER_TRACKING_TRUSTED_PROXIES: "),
        ("ENV_FILE", "/nowhere/at/all", "ORDER_TRACKING_ENV_FILE: /nowhere/at/all is not a file. Expected "),
    ],
)
def test_an_invalid_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """The error is one line with the setting's name."""
    monkeypatch.setenv(f"ORDER_TRACKING_{name}", value)
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Asia/Makasar", ", such as Asia/Jakarta. Did you mean Asia/Makassar?"),
        ("../UTC", "'../UTC' is not a time zone of the IANA database, such as Asia/Jakarta"),
        ("Asia", "'Asia' is not a time zone of the IANA database"),
        ("x" * 300, f"'{'x' * 300}' is not a time zone of the IANA database"),
        ("Asia/Kolkata", "differs from UTC by a part of an hour. Expected a difference of whole hours"),
        ("Australia/Lord_Howe", "Australia/Lord_Howe differs from UTC by a part of an hour"),
    ],
)
def test_a_time_zone_is_one_of_whole_hours(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    """An unknown time zone is compared with the known names, and one with a part of an hour is refused."""
    monkeypatch.setenv("ORDER_TRACKING_TIMEZONE", name)
    with pytest.raises(SettingsError, match=re.escape(message)):
        read_settings()


@pytest.mark.parametrize("name", ["Asia/Jakarta", "Asia/Makassar", "Asia/Jayapura"])
def test_a_time_zone_needs_no_files_of_the_system(name: str) -> None:
    """The zones of Indonesia are known on a system without time zones, such as a small container."""
    reset_tzpath(to=[])
    try:
        zone = ZoneInfo.no_cache(Settings(timezone=name).timezone)
    finally:
        reset_tzpath()
    assert zone.utcoffset(datetime(2026, 1, 1)) in {timedelta(hours=hours) for hours in (7, 8, 9)}  # noqa: DTZ001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ORDER_TRACKING_LOG_FORMAT=loud", "ORDER_TRACKING_LOG_FORMAT: "),
        (
            "ORDER_TRACKING_PROT=8091",
            "Unknown setting ORDER_TRACKING_PROT. Known settings: ORDER_TRACKING_BODY_BYTES_MAX, ",
        ),
        (
            "WEBHOOK_TOKENS=abcdefghijklmnopqrst",
            "{file}: WEBHOOK_TOKENS has no effect: write ORDER_TRACKING_WEBH",
        ),
        ("port=8091", "{file}: PORT has no effect: write ORDER_TRACKING_PORT"),
        # The dotenv library skips these lines, which would leave the webhook open.
        ("#\nORDER_TRACKING_WEBHOOK_TOKENS='abcdefghijklmnopqrst", "{file}, line 2: expected NAME=value"),
        ("ORDER_TRACKING_WEBHOOK_TOKENS", "{file}, line 1: expected NAME=value"),
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The same rules apply to the file and to the environment."""
    file = tmp_path / ".env"
    file.write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert str(raised.value).startswith(message.format(file=file))


def test_a_similar_setting_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name is answered with the one that was meant; other programs' settings are ignored."""
    monkeypatch.setenv("ORDER_TRACKING_WEBHOOK_TOKEN", "abcdefghijklmnopqrst")
    with pytest.raises(SettingsError, match=r"Did you mean ORDER_TRACKING_WEBHOOK_TOKENS\?$"):
        read_settings()
    monkeypatch.delenv("ORDER_TRACKING_WEBHOOK_TOKEN")
    monkeypatch.setenv("WEBHOOK_TOKENS", "of another program")
    assert read_settings().webhook_tokens == ()


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment overrides the file, and a setting that only the file has also counts."""
    (tmp_path / ".env").write_text("ORDER_TRACKING_PORT=1\nORDER_TRACKING_HOST=localhost\n", encoding="utf-8")
    monkeypatch.setenv("ORDER_TRACKING_PORT", "2")
    settings = read_settings()
    assert (settings.port, settings.host) == (2, "localhost")


@pytest.mark.parametrize(
    ("line", "holds_secret"),
    [
        (f"ORDER_TRACKING_WEBHOOK_TOKENS={TOKEN}", True),
        (f"export order_tracking_webhook_tokens='{TOKEN}'", True),
        (f"ORDER_TRACKING_WEBHOOK_HMAC_SECRET={TOKEN}", True),
        (f"ORDER_TRACKING_SHARE_SECRET={TOKEN}", True),
        ("ORDER_TRACKING_KOMERCE_API_KEY=a-key", True),
        ("ORDER_TRACKING_DATABASE_URL=postgresql://tracking:hunter2@db1,db2/tracking", True),
        ("ORDER_TRACKING_DATABASE_URL=postgresql://db/tracking?user=tracking&password=hunter2", True),
        ("ORDER_TRACKING_DATABASE_URL=postgresql://tracking@db/tracking", False),
        ("ORDER_TRACKING_WEBHOOK_TOKENS=", False),
        ("#ORDER_TRACKING_KOMERCE_API_KEY=a-key\nORDER_TRACKING_PORT=8080", False),
    ],
)
def test_a_file_with_secrets_must_be_private(tmp_path: Path, line: str, *, holds_secret: bool) -> None:
    """A file that other users can read is found only if it holds a secret."""
    file = tmp_path / ".env"
    file.write_text(f"{line}\n", encoding="utf-8")
    found = {}
    for mode in (0o600, 0o400, 0o640, 0o604):
        file.chmod(mode)
        found[mode] = find_exposed_file(Settings)
    exposed = file if holds_secret else None
    assert found == {0o600: None, 0o400: None, 0o640: exposed, 0o604: exposed}


def test_a_missing_file_is_not_exposed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a settings file, there is nothing to protect."""
    monkeypatch.setattr("service.settings.DEFAULT_FILE", tmp_path / "absent")
    monkeypatch.delenv("ORDER_TRACKING_ENV_FILE")
    assert find_exposed_file(Settings) is None


def test_the_webhook_url_comes_from_the_settings() -> None:
    """The URL has the first token in its path, and an IPv6 address in brackets."""
    settings = Settings(host="::1", port=8080, webhook_tokens=f"{TOKEN},another-{TOKEN}")  # type: ignore[arg-type]
    assert str(webhook_url(settings)) == f"http://[::1]:8080/webhook/{TOKEN}"


def test_the_default_state_folder_is_one_that_postgresql_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's default is below /var/lib, a user's in that user's data folder."""
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_state_dir().name == "order-tracking"
    assert default_state_dir().is_relative_to("/var/lib" if os.geteuid() == 0 else Path.home())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {},
            "ORDER_TRACKING_READ_ONLY needs ORDER_TRACKING_DATABASE_URL, the URL of a standby or ",
        ),
        (
            {"DATABASE_URL": "postgresql://h1/db", "BODY_RETENTION_DAYS": "30"},
            "ORDER_TRACKING_READ_ONLY contradicts ORDER_TRACKING_BODY_RETENTION_DAYS, which is 30: set ",
        ),
        (
            {"DATABASE_URL": "postgresql://h1,h2/db?target_session_attrs=read-write"},
            "ORDER_TRACKING_READ_ONLY contradicts ORDER_TRACKING_DATABASE_URL: target_session_attrs is ",
        ),
    ],
)
def test_settings_that_contradict_a_reader_are_refused(
    monkeypatch: pytest.MonkeyPatch, others: dict[str, str], message: str
) -> None:
    """The error names both settings, and what to do."""
    for name, value in {**others, "READ_ONLY": "true"}.items():
        monkeypatch.setenv(f"ORDER_TRACKING_{name}", value)
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}"):
        read_settings()


def test_a_reader_only_reads_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The DSN of every command has the setting, and only with READ_ONLY."""
    monkeypatch.setenv("ORDER_TRACKING_DATABASE_URL", "postgresql://h1/db")
    assert read_settings().own_dsn == "postgresql://h1/db"
    monkeypatch.setenv("ORDER_TRACKING_READ_ONLY", "true")
    assert "default_transaction_read_only=on" in read_settings().own_dsn
