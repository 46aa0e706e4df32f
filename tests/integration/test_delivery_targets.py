"""Deliveries reach only allowed addresses: the URL is checked when declared, the address at each connect."""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from ipaddress import ip_address, ip_network
from typing import Any, Final
from uuid import uuid4

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from service.database.log_identity import LogIdentity
from service.features.subscriptions.message import encode_test
from service.features.subscriptions.sending import Attempt, Sender
from service.features.subscriptions.subscription import make_secret
from service.features.subscriptions.targets import (
    ForbiddenAddressError,
    UnusableUrlError,
    check_address,
    check_url,
    is_public,
)
from service.http.addresses import Network
from tests.support.receiver import Receiver, receiving

PUBLIC: Final = "93.184.215.14"
LOOPBACK: Final[tuple[Network, ...]] = (ip_network("127.0.0.0/8"),)


class FakeNames(AbstractResolver):
    """A resolver with given answers, one for each call; the last one repeats."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = [*answers]
        self.calls = 0

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002 - of the interface
    ) -> list[ResolveResult]:
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for address in answer
        ]

    async def close(self) -> None:
        pass


# What the name resolves to, or () if the host is an address itself.
HOSTILE: Final[dict[str, Sequence[str]]] = {
    # Loopback in its spellings.
    "https://127.0.0.1/": (),
    "https://127.8.9.10/": (),
    "https://localhost/": ("127.0.0.1",),
    "https://localhost./": ("127.0.0.1",),
    "https://LOCALHOST/": ("::1",),
    "https://[::1]/": (),
    "https://[0:0:0:0:0:0:0:1]/": (),
    "https://[::ffff:127.0.0.1]/": (),
    "https://[::ffff:7f00:1]/": (),
    "https://[::127.0.0.1]/": (),
    "https://2130706433/": ("127.0.0.1",),
    "https://0x7f000001/": ("127.0.0.1",),
    "https://0177.0.0.1/": ("127.0.0.1",),
    "https://127.1/": ("127.0.0.1",),
    "https://0/": ("0.0.0.0",),  # noqa: S104
    "https://0.0.0.0/": (),
    "https://[::]/": (),
    # Private networks, those of clouds, and tunnels to them.
    "https://10.0.0.1/": (),
    "https://172.16.0.1/": (),
    "https://192.168.1.1/": (),
    "https://100.64.0.1/": (),
    "https://169.254.169.254/latest/meta-data/": (),
    "https://[fe80::1]/": (),
    "https://[fc00::1]/": (),
    "https://[64:ff9b::7f00:1]/": (),
    "https://[2002:7f00:1::]/": (),
    "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/": (),
    "https://224.0.0.1/": (),
    "https://255.255.255.255/": (),
    # Names that lead there.
    "https://internal.example/": ("10.0.0.1",),
    "https://metadata.example/": ("169.254.169.254",),
    "https://mixed.example/": (PUBLIC, "127.0.0.1"),
    "https://six.example/": ("::ffff:10.0.0.1",),
}
MALFORMED: Final = (
    *("http://shop.example/", "ftp://shop.example/", "file:///etc/passwd", "//shop.example/", "shop.example"),
    *("https:///path", "https://", "https://user@shop.example/", "https://user:password@shop.example/"),
    *("https://shop.example/#part", "https://shop.example:99999/", "https://shop example/", ""),
    *("https://shop.example/\n", "https://[::1", f"https://shop.example/{'a' * 3_000}"),
)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """Return an endpoint on this machine, which no hostile URL may reach."""
    async with receiving() as receiver:
        yield receiver


async def send(url: str, networks: Sequence[Network], names: AbstractResolver | None) -> Attempt:
    """Send a message as a deliverer does, without the check of the declared URL."""
    log = LogIdentity()
    log.log_id = "log"
    sender = Sender(networks, log, names)
    try:
        return await sender.send(URL(url), [make_secret()], "msg_1", encode_test(uuid4()))
    finally:
        await sender.close()


@pytest.fixture
async def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the addresses to which this process connects from now on."""
    connected: list[Any] = []
    loop_type = type(asyncio.get_running_loop())
    connect = loop_type.sock_connect

    async def noted(loop: Any, sock: socket.socket, address: Any) -> None:
        connected.append(address)
        await connect(loop, sock, address)

    monkeypatch.setattr(loop_type, "sock_connect", noted)
    return connected


@pytest.mark.parametrize("url", HOSTILE)
async def test_a_hostile_url(url: str, connections: list[Any]) -> None:
    """It is refused when it is declared, and by the connector, which sends no packet."""
    with pytest.raises(UnusableUrlError):
        await check_url(url, (), FakeNames(HOSTILE[url]))
    attempt = await send(url, (), FakeNames(HOSTILE[url]))
    assert (attempt.outcome, attempt.status) == ("failed", None)
    assert connections == []


@pytest.mark.parametrize("url", MALFORMED)
async def test_a_malformed_url(url: str) -> None:
    """It is refused before any name is resolved."""
    names = FakeNames([PUBLIC])
    with pytest.raises(UnusableUrlError):
        await check_url(url, (), names)
    assert names.calls == 0


async def test_a_name_that_does_not_resolve() -> None:
    """It is refused with its name."""
    with pytest.raises(UnusableUrlError, match=r"nowhere\.invalid does not resolve"):
        await check_url("https://nowhere.invalid/", ())
    with pytest.raises(UnusableUrlError, match="has no address"):
        await check_url("https://empty.example/", (), FakeNames([]))


async def test_a_name_that_is_rebound(connections: list[Any]) -> None:
    """A name that was public when it was declared, and leads to this machine later, is not connected to."""
    names = FakeNames([PUBLIC], ["127.0.0.1"])
    url = await check_url("https://shop.example/hooks", (), names)
    attempt = await send(str(url), (), names)
    assert attempt.outcome == "failed"
    assert "127.0.0.1 is not a public address" in (attempt.error or "")
    assert connections == []


async def test_an_allowed_network(receiver: Receiver, connections: list[Any]) -> None:
    """The networks of the setting may be reached, also by http; http reaches nothing else."""
    assert str(await check_url(receiver.url, LOOPBACK)) == receiver.url
    assert (await send(receiver.url, LOOPBACK, None)).outcome == "delivered"
    assert len(connections) == 1
    with pytest.raises(UnusableUrlError, match="use https"):
        await check_url("http://shop.example/", LOOPBACK, FakeNames([PUBLIC]))
    attempt = await send("http://shop.example/", LOOPBACK, FakeNames([PUBLIC]))
    assert "use https" in (attempt.error or "")
    assert len(connections) == 1


async def test_a_redirect_to_this_machine(receiver: Receiver) -> None:
    """A redirect is not followed: not even within the allowed networks."""

    async def respond(_received: Any) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "https://127.0.0.1/"})

    receiver.respond = respond
    attempt = await send(receiver.url, LOOPBACK, None)
    assert (attempt.outcome, attempt.status) == ("failed", 302)
    assert len(receiver.requests) == 1


@pytest.mark.attacks("response body", "bytes")
async def test_a_long_response(receiver: Receiver) -> None:
    """Of a response, 64 KiB are read, and the first 1,000 characters of an error are kept."""

    async def respond(received: Any) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(received.request)
        try:
            while True:
                await response.write(b"x" * 65_536)
        except ConnectionError:
            return response

    receiver.respond = respond
    attempt = await send(receiver.url, LOOPBACK, None)
    assert attempt.error == "500: " + "x" * 1_000


# The blocks of IANA's registries of special-purpose addresses, and one that only Azure knows.
REGISTERED: Final = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4"),
    *("::1/128", "::/128", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20", "5f00::/16"),
    *("fc00::/7", "fe80::/10", "168.63.129.16/32"),
)


@pytest.mark.parametrize("block", REGISTERED)
def test_no_special_purpose_block_is_public(block: str) -> None:
    """No address of a registered block is public, whatever Python's version says of it."""
    network = ip_network(block)
    size = network.num_addresses
    for offset in {0, 1, 9, 10, 170, size // 3, size // 2, size - 1}:
        if offset < size:
            assert not is_public(network[offset]), network[offset]


@given(st.ip_addresses())
def test_no_forbidden_address_is_public(address: Any) -> None:
    """What Python calls private, local, reserved or multicast is refused, also inside of IPv6."""
    is_special = (
        not address.is_global
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )
    if address.version == 6 and address.ipv4_mapped is not None:
        # Its IPv4 address decides.
        return
    if is_special:
        assert not is_public(address)
        with pytest.raises(ForbiddenAddressError):
            check_address(str(address), (), allows_public=True)
    if address.version == 4:
        for embedded in (f"::ffff:{address}", f"64:ff9b::{address}", f"::{address}"):
            if is_special or not embedded.startswith("::ffff"):
                with pytest.raises(ForbiddenAddressError):
                    check_address(embedded, (), allows_public=True)
    assert is_public(ip_address(PUBLIC))
