"""Where a subscription may send: public addresses by https, and the operator's own networks also by http.

An address is checked twice: when the subscription is declared, and again by the connector, on the address
that it is about to connect to. A name that resolves to another address by then leads nowhere.
"""

import asyncio
import errno
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final
from urllib.parse import urlsplit

from aiohttp import DefaultResolver, TCPConnector
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from service.http.addresses import Network, is_within

URL_CHARACTERS_MAX: Final = 2_048
# Of a URL in an error.
SHOWN_CHARACTERS_MAX: Final = 200
RESOLVE_SECONDS_MAX: Final = 5.0
# What the kernel holds of a response until it is read, so that the event loop never parses much at a time.
RECEIVE_BYTES_MAX: Final = 8 * 1024
SETTING: Final = "ORDER_TRACKING_SUBSCRIPTION_NETWORKS"
# The only global unicast addresses of IPv6 in use. Outside are those that stand for IPv4 addresses, and others.
GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
# Addresses that Python's is_global lets pass, in some of its versions. Except the first, they are of IANA's
# registries of special-purpose addresses, of which no block belongs to a shop.
SPECIAL: Final[tuple[Network, ...]] = tuple(
    map(
        ip_network,
        (
            "168.63.129.16",  # in Azure, the host of the virtual machine
            "192.0.0.0/24",  # protocol assignments; in Oracle's cloud, services of the host
            *("192.31.196.0/24", "192.175.48.0/24", "2620:4f:8000::/48"),  # AS112
            "192.52.193.0/24",  # multicast tunnels
            "192.88.99.0/24",  # relays to 6to4
            "2001::/23",  # protocol assignments, tunnels among them
            "3fff::/20",  # documentation
        ),
    )
)


class UnusableUrlError(Exception):
    """The endpoint's URL is invalid or leads to a forbidden address. ``str()`` says what is expected."""


class ForbiddenAddressError(OSError):
    """The address is neither public nor in an allowed network. No packet was sent to it.

    It is an OSError with an error number, since aiohttp shows the text of such errors alone.
    """

    def __init__(self, text: str) -> None:
        super().__init__(errno.EACCES, text)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address belongs to the public internet, and to no tunnel from it to IPv4."""
    if not address.is_global or address.is_multicast or address.is_reserved or is_within(address, SPECIAL):
        return False
    return isinstance(address, IPv4Address) or (address in GLOBAL_UNICAST and address.sixtofour is None)


def check_address(text: str, networks: Sequence[Network], *, allows_public: bool) -> None:
    """Check the address of a connection.

    Args:
        text: the address.
        networks: the networks that are allowed besides the public internet.
        allows_public: whether public addresses are allowed: with http, they are not.

    Raises:
        ForbiddenAddressError: the address is not allowed.
    """
    address = _parse_address(text)
    if address is None:
        raise ForbiddenAddressError(f"{text} is not an IP address")
    # The operating system connects to the IPv4 address.
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if is_within(address, networks) or (allows_public and is_public(address)):
        return
    if is_public(address):
        raise ForbiddenAddressError(f"{address} is a public address, where http is not allowed: use https")
    raise ForbiddenAddressError(
        f"{address} is not a public address. To allow it, add its network to {SETTING}, and restart the service"
    )


class CheckedNames(AbstractResolver):
    """Resolves a name only if all of its addresses are allowed.

    Args:
        resolver: resolves the names.
        networks: the networks that are allowed besides the public internet.
        allows_public: whether public addresses are allowed.
    """

    def __init__(self, resolver: AbstractResolver, networks: Sequence[Network], *, allows_public: bool) -> None:
        self._resolver = resolver
        self._networks = networks
        self._allows_public = allows_public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Resolve a name; see ``AbstractResolver``.

        Raises:
            ForbiddenAddressError: one of its addresses is not allowed.
        """
        found = await self._resolver.resolve(host, port, family)
        for result in found:
            check_address(result["host"], self._networks, allows_public=self._allows_public)
        return found

    async def close(self) -> None:
        """Close the resolver."""
        await self._resolver.close()


def make_connector(
    networks: Sequence[Network], resolver: AbstractResolver | None, *, is_secure: bool
) -> TCPConnector:
    """Return a connector that connects only to allowed addresses.

    Args:
        networks: the networks that are allowed besides the public internet.
        resolver: resolves host names; None for the system's.
        is_secure: whether the connections use TLS. Without it, only ``networks`` are allowed.
    """

    def open_socket(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        check_address(address[0], networks, allows_public=is_secure)
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES_MAX)
        return opened

    # Each subscription limits its own connections.
    names = CheckedNames(resolver or DefaultResolver(), networks, allows_public=is_secure)
    return TCPConnector(limit=0, resolver=names, socket_factory=open_socket)


def parse_url(text: str, networks: Sequence[Network]) -> URL:
    """Return the URL of an endpoint, without resolving its name.

    Raises:
        UnusableUrlError: the URL is malformed, or has a user, a password, a fragment or another scheme.
    """
    if len(text) > URL_CHARACTERS_MAX or not text.isprintable() or " " in text:
        raise UnusableUrlError(
            f"the URL must have at most {URL_CHARACTERS_MAX} printable characters, without spaces"
        )
    try:
        url = URL(text)
        is_valid = bool(url.host) and bool(url.port)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise UnusableUrlError(f"{text[:SHOWN_CHARACTERS_MAX]!r} is not a URL. Expected https://host/path")
    if url.scheme != "https" and not (url.scheme == "http" and networks):
        raise UnusableUrlError(
            f"{text[:SHOWN_CHARACTERS_MAX]} must begin with https://; http:// is only possible within the "
            f"networks of {SETTING}"
        )
    if "@" in urlsplit(text).netloc:
        raise UnusableUrlError(
            "the URL must not contain a user or a password: put a token in its path or its query"
        )
    if "#" in text:
        raise UnusableUrlError("the URL must not contain a fragment (#): it would never be sent")
    return url


async def check_url(text: str, networks: Sequence[Network], resolver: AbstractResolver | None = None) -> URL:
    """Return the URL of an endpoint, after resolving its name and checking each of its addresses.

    Args:
        text: the URL as an operator wrote it.
        networks: the networks that are allowed besides the public internet.
        resolver: resolves host names; None for the system's.

    Raises:
        UnusableUrlError: the URL is invalid, its name does not resolve, or one of its addresses is not allowed.
    """
    url = parse_url(text, networks)
    host = url.host or ""
    try:
        if (address := _parse_address(host)) is not None:
            check_address(str(address), networks, allows_public=url.scheme == "https")
        else:
            await _resolve(host, url.port or 0, resolver, networks, allows_public=url.scheme == "https")
    except ForbiddenAddressError as error:
        raise UnusableUrlError(f"{text[:SHOWN_CHARACTERS_MAX]}: {error.strerror}") from None
    return url


async def _resolve(
    host: str,
    port: int,
    resolver: AbstractResolver | None,
    networks: Sequence[Network],
    *,
    allows_public: bool,
) -> None:
    used = resolver or DefaultResolver()
    names = CheckedNames(used, networks, allows_public=allows_public)
    try:
        async with asyncio.timeout(RESOLVE_SECONDS_MAX):
            found = await names.resolve(host, port, socket.AF_UNSPEC)
    except ForbiddenAddressError:
        raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer in time"
        raise UnusableUrlError(
            f"the host name {host} does not resolve ({reason}): check its spelling, and this machine's DNS"
        ) from None
    finally:
        if resolver is None:
            await used.close()
    if not found:
        raise UnusableUrlError(f"the host name {host} does not resolve: it has no address")


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None
