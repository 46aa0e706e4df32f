"""Share links: only the service's own secret makes a token that it accepts, until the token expires."""

import string
from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.features.pages.share_links import TOKEN_CHARACTERS_MAX, ShareLinks, read_base_url

NOW = datetime(2026, 11, 26, 8, 30, 0, 250_000, UTC)
DAY = timedelta(days=1)
LINKS = ShareLinks("a-secret-of-16-characters")
ALPHABET = string.ascii_letters + string.digits + "-_"


def token(order_no: str, expires_in: timedelta | None = None, links: ShareLinks = LINKS) -> str:
    path = links.make(order_no, expires_in, NOW).path
    assert path.startswith("/t/")
    return path.removeprefix("/t/")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128))
def test_a_link_carries_any_order_number(order_no: str) -> None:
    """Every order number comes back unchanged, whatever its characters, with and without an expiry."""
    for expires_in in (None, DAY):
        made = token(order_no, expires_in)
        assert set(made) <= set(ALPHABET)
        assert LINKS.read(made, NOW) == order_no


def test_the_longest_order_number_fits() -> None:
    """A token of 128 characters of four bytes has the maximum length, and a longer text is not even decoded."""
    made = token("\U0001f69a" * 128, DAY)
    assert len(made) == TOKEN_CHARACTERS_MAX
    assert LINKS.read(made, NOW) == "\U0001f69a" * 128
    assert LINKS.read(token("\U0001f69a" * 129), NOW) is None


@pytest.mark.parametrize("order_no", ["K", "KO", "KOM", "KOM1"])
@pytest.mark.parametrize("expires_in", [None, DAY])
def test_a_changed_token_is_refused(order_no: str, expires_in: timedelta | None) -> None:
    """Every other character at every place, a missing one and a further one make a token invalid.

    That includes characters that base64 decodes to the same bytes.
    """
    made = token(order_no, expires_in)
    for place, present in enumerate(made):
        for other in set(f"{ALPHABET}=+/. \n\u00e9") - {present}:
            assert LINKS.read(made[:place] + other + made[place + 1 :], NOW) is None, (place, other)
        assert LINKS.read(made[:place] + made[place + 1 :], NOW) is None, place
    for changed in (f"{made}A", f"{made}=", f"{made}==", f"A{made}", made * 2, "", "\u00e9", "=" * 40):
        assert LINKS.read(changed, NOW) is None, changed


def test_a_token_without_an_order_number_is_refused() -> None:
    """A token that is too short for an order number is refused, even if its MAC is right."""
    assert LINKS.read(token(""), NOW) is None


def test_a_link_ends_at_its_expiry() -> None:
    """A link works until the second of its expiry, and a link without one works always."""
    link = LINKS.make("KOM1", DAY, NOW)
    assert link.expires_at == datetime(2026, 11, 27, 8, 30, 0, tzinfo=UTC)
    made = link.path.removeprefix("/t/")
    assert LINKS.read(made, link.expires_at - timedelta(microseconds=1)) == "KOM1"
    assert LINKS.read(made, link.expires_at) is None
    assert LINKS.make("KOM1", None, NOW).expires_at is None
    assert LINKS.read(token("KOM1"), NOW + 36_500 * DAY) == "KOM1"
    assert LINKS.read(token("KOM1", 36_500 * DAY), NOW + 36_499 * DAY) == "KOM1"


def test_the_expiry_cannot_be_moved() -> None:
    """The expiry is signed: with other bytes in its place, a token is invalid."""
    content = urlsafe_b64decode(token("KOM1", DAY) + "==")
    assert content[21:] == b"KOM1"
    for expiry in (b"\x00" * 5, b"\xff" * 5, content[16:20] + bytes([content[20] ^ 1])):
        moved = urlsafe_b64encode(content[:16] + expiry + content[21:]).rstrip(b"=").decode()
        assert LINKS.read(moved, NOW) is None


def test_another_secret_revokes_every_link() -> None:
    """A token of another secret is invalid, also one that differs in case or by one character."""
    for secret in ("A-secret-of-16-characters", "a-secret-of-16-characters.", "another-secret-of-16"):
        assert LINKS.read(token("KOM1", None, ShareLinks(secret)), NOW) is None


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://tracking.example", "https://tracking.example"),
        ("https://tracking.example/", "https://tracking.example"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
    ],
)
def test_a_base_url_is_an_address(url: str, base: str) -> None:
    """An address may end in a slash."""
    assert read_base_url(url) == base


@pytest.mark.parametrize(
    "url",
    [
        *(
            "tracking.example",
            "ftp://tracking.example",
            "https://",
            "https:///t",
            "https://tracking.example/shop",
        ),
        *("https://tracking.example?x=1", "https://tracking.example#x", "https://user@tracking.example"),
        *("https://tracking.example:99999", "https://[::1", ""),
    ],
)
def test_another_base_url_is_refused(url: str) -> None:
    """A link on anything but the root of a host would not work."""
    with pytest.raises(ValueError, match=r"tracking\.example|address|Port|IPv6"):
        read_base_url(url)
