"""Settings: each wrong one is one clear line that names it, wherever it was written."""

from pathlib import Path

import pytest

from service.cli.send import webhook_url
from service.settings import Settings, SettingsError, read_settings

TOKEN = "a-token-of-16-characters"  # noqa: S105 - of no service


@pytest.fixture(autouse=True)
def _no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .env of the developer's is read."""
    (tmp_path / ".env").touch()
    monkeypatch.setenv("ORDER_TRACKING_ENV_FILE", str(tmp_path / ".env"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "x", "ORDER_TRACKING_PORT: "),
        ("PORT", "70000", "ORDER_TRACKING_PORT: "),
        ("DATABASE_URL", "mysql://x", "ORDER_TRACKING_DATABASE_URL: it must begin with postgresql://"),
        ("BODY_BYTES_MAX", "1", "ORDER_TRACKING_BODY_BYTES_MAX: "),
        ("PROT", "8080", "ORDER_TRACKING_PROT is no setting; there are "),
        ("prot", "8080", "ORDER_TRACKING_PROT is no setting; there are "),
        ("HOST", "x" * 64, "ORDER_TRACKING_HOST: it must be an IP address or a host name"),
        ("HOST", "999.1.1.1", "ORDER_TRACKING_HOST: it must be an IP address or a host name"),
        ("WEBHOOK_TOKENS", "short", "ORDER_TRACKING_WEBHOOK_TOKENS: each must have 16 or more "),
        (
            "WEBHOOK_TOKENS",
            "has/a/slash-in-it-1234",
            "ORDER_TRACKING_WEBHOOK_TOKENS: each must have 16 or more ",
        ),
        ("WEBHOOK_TOKENS", ",", "ORDER_TRACKING_WEBHOOK_TOKENS: there is nothing between its commas"),
        ("WEBHOOK_HMAC_SECRET", "short", "ORDER_TRACKING_WEBHOOK_HMAC_SECRET: it must have 16 or more "),
        ("TRUSTED_PROXIES", "10.0.0.0/8,x", "ORDER_TRACKING_TRUSTED_PROXIES: "),
        ("ENV_FILE", "/nowhere/at/all", "ORDER_TRACKING_ENV_FILE names /nowhere/at/all, which is no file"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    """The message is one line and begins with the setting."""
    monkeypatch.setenv(f"ORDER_TRACKING_{name}", value)
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ORDER_TRACKING_LOG_FORMAT=loud", "ORDER_TRACKING_LOG_FORMAT: "),
        ("ORDER_TRACKING_PROT=8091", "ORDER_TRACKING_PROT is no setting; there are "),
        # A reader of such files would skip these lines, and leave the webhook open.
        ("#\nORDER_TRACKING_WEBHOOK_TOKENS='abcdefghijklmnopqrst", "{file}, line 2, is no setting: "),
        ("ORDER_TRACKING_WEBHOOK_TOKENS", "{file}, line 1, is no setting: NAME=value"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    """A file's lines are held to the same rules as the environment."""
    file = tmp_path / ".env"
    file.write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(SettingsError) as raised:
        read_settings()
    assert str(raised.value).startswith(message.format(file=file))


def test_the_environment_comes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is in both has the environment's value; a setting of the file alone counts."""
    (tmp_path / ".env").write_text("ORDER_TRACKING_PORT=1\nORDER_TRACKING_HOST=localhost\n", encoding="utf-8")
    monkeypatch.setenv("ORDER_TRACKING_PORT", "2")
    settings = read_settings()
    assert (settings.port, settings.host) == (2, "localhost")


def test_the_webhook_is_found_by_the_settings() -> None:
    """With the first token in its path, and an IPv6 address in brackets."""
    settings = Settings(host="::1", port=8080, webhook_tokens=f"{TOKEN},another-{TOKEN}")  # type: ignore[arg-type]
    assert str(webhook_url(settings)) == f"http://[::1]:8080/webhook/{TOKEN}"
