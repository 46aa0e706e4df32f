"""Addresses of clients: in their usual form, and behind proxies."""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

from aiohttp import hdrs, web

Network: TypeAlias = IPv4Network | IPv6Network

LOOPBACK: Final[tuple[Network, ...]] = (ip_network("127.0.0.0/8"), ip_network("::1"))
# Each proxy adds one address. A longer header is an attack.
FORWARDED_CHARACTERS_MAX: Final = 2_048
# Most requests come from a few addresses, and to parse one takes longer than to route a request.
CACHED_MAX: Final = 1_024
# The network of one IPv6 subscriber.
IPV6_PREFIX: Final = 64
# Some proxies write the port too: 198.51.100.1:443 or [2001:db8::1]:443.
_WITH_PORT: Final = re.compile(r"\[(?P<v6>[^\]]*)\](:\d+)?|(?P<v4>[\d.]+):\d+")


@lru_cache(CACHED_MAX)
def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return an address, None for other text.

    A port and the name of an interface (``fe80::1%eth0``) are dropped; an IPv4 address inside IPv6
    (``::ffff:198.51.100.1``) becomes plain.
    """
    text = text.strip()
    if (match := _WITH_PORT.fullmatch(text)) is not None:
        text = match["v6"] or match["v4"] or ""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (isinstance(address, IPv6Address) and address.ipv4_mapped) or address


@lru_cache(CACHED_MAX)
def _to_text(address: IPv4Address | IPv6Address) -> str:
    return str(address)


def is_within(address: IPv4Address | IPv6Address, networks: Sequence[Network]) -> bool:
    """Return whether an address is in one of the networks."""
    return any(address in network for network in networks)


def subscriber(address: str | None, exempt: Sequence[Network]) -> str | None:
    """Return whose share of a budget an address uses: its own, or that of its IPv6 network.

    Args:
        address: the address.
        exempt: networks without a share, because they bring the requests of others.

    Returns:
        None for an address without a share, and for an unknown one.
    """
    ip = parse_address(address or "")
    if ip is None or is_within(ip, exempt):
        return None
    return str(ip_network((ip, IPV6_PREFIX), strict=False)) if isinstance(ip, IPv6Address) else str(ip)


def client_address(request: web.BaseRequest, proxies: Sequence[Network]) -> str | None:
    """Return the rightmost address of a request that is not a trusted proxy's, None if it is unknown.

    Each proxy appends its caller's address, so only addresses that trusted proxies appended are trusted.

    Args:
        request: the request.
        proxies: the networks of trusted proxies, whose X-Forwarded-For is trusted.
    """
    address = parse_address(request.remote or "")
    if address is None:
        return request.remote
    if proxies and is_within(address, proxies):
        forwarded = ",".join(request.headers.getall(hdrs.X_FORWARDED_FOR, ()))[-FORWARDED_CHARACTERS_MAX:]
        for hop in reversed(forwarded.split(",")):
            # Trusted proxies append only addresses, so nothing to the left of other text is trustworthy.
            if (before := parse_address(hop)) is None:
                break
            address = before
            if not is_within(address, proxies):
                break
    return _to_text(address)
