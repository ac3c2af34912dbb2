"""Fetch an image by its URL without becoming a way into the server's own network.

Images are fetched only from hosts on a list. The name of the host is resolved once, every address is checked, and the
connection is made to an address that was checked, so that a name server that answers differently the second time
changes nothing. Redirects are followed by hand, each checked like the first URL.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import anyio
import httpcore2
import httpx2

from blip2.errors import InputError

MAX_URL = 4096
"""Maximum number of characters of a URL, and of the target of a redirect."""
MAX_REDIRECTS = 3
"""Maximum number of redirects that are followed for an image."""
MAX_FETCHES = 16
"""Maximum number of images that are fetched at the same time."""

REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
"""The default port of each protocol that is spoken."""
GLOBAL_UNICAST = ip_network("2000::/3")
"""The IPv6 addresses of hosts on the Internet. Outside of it are the addresses of this machine and of local networks,
and those that contain an IPv4 address: mapped (``::ffff:0:0/96``) and translated (NAT64, ``64:ff9b::/96``)."""
NOT_PUBLIC = tuple(
    map(
        ip_network,
        ("2001::/23", "2002::/16", "3fff::/20", "192.88.99.0/24", "192.0.0.0/24", "168.63.129.16/32"),
    )
)
"""Addresses that Python may call global, but that lead to another address (Teredo, 6to4), are for protocols (such as
those of routers, 192.0.0.9) or documents, or are those of a cloud's own services (168.63.129.16 in Azure)."""

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class BadImageError(InputError):
    """An image of a request that is refused.

    The message is meant for the client. It contains nothing of the server: no path, and no address or reason of the
    network, from which a client could learn what else the server can reach.
    """


class Fetcher:
    """Fetches images from the hosts on a list.

    Args:
        hosts: the allowed hosts, each as ``host`` (at the ports 80 and 443) or ``host:port``. Names below a
            host are not included.
        networks: networks such as ``10.0.0.0/8`` in which these hosts may be, besides the public Internet: for images
            in a store of your own.
        max_bytes: maximum size of a file in bytes.
        seconds: maximum duration of a fetch in seconds, from the resolution of the name to the last byte, redirects
            included.

    Raises:
        InputError: a host or a network is invalid.
    """

    def __init__(self, hosts: Iterable[str], networks: Iterable[str], max_bytes: int, seconds: float) -> None:
        self._hosts = frozenset(each for host in hosts for each in _parse_host(host))
        self._max_bytes, self._seconds = max_bytes, seconds
        self._limiter = anyio.CapacityLimiter(MAX_FETCHES)
        # Connections are not kept, and httpcore neither reads proxies from the environment, nor follows redirects, nor
        # decompresses.
        backend = CheckedNetwork([_parse_network(network) for network in networks])
        self._pool = httpcore2.AsyncConnectionPool(
            network_backend=backend, max_connections=MAX_FETCHES, max_keepalive_connections=0
        )

    async def fetch(self, url: str) -> bytes:
        """Return the content of a URL.

        Raises:
            BadImageError: the URL is not allowed or cannot be fetched.
        """
        try:
            with anyio.fail_after(self._seconds):
                async with self._limiter:
                    target = self._check(url)
                    for _ in range(MAX_REDIRECTS + 1):
                        content = await self._request(target)
                        if isinstance(content, bytes):
                            return content
                        target = self._check(content, target)
        except TimeoutError as error:
            raise BadImageError(
                f"the image URL was not fetched within {self._seconds:g} seconds: send the image as a data URL"
            ) from error
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
            OSError,
            UnicodeError,
        ) as error:
            raise BadImageError("the image URL cannot be fetched: check it, or send the image as a data URL") from error
        raise BadImageError(
            f"the image URL leads to more than {MAX_REDIRECTS} redirects: give the URL of the image itself"
        )

    def _check(self, url: str, base: httpx2.URL | None = None) -> httpx2.URL:
        """Return a URL, resolved against `base` if it is the target of a redirect; check that its host is allowed."""
        subject = "the image URL" if base is None else "a redirect of the image URL"
        if not self._hosts:
            raise BadImageError(
                "this server does not fetch images by URL: send the image as a data URL (data:image/png;base64,...)"
            )
        if len(url) > MAX_URL:
            raise BadImageError(f"{subject} has {len(url)} characters, expected at most {MAX_URL}: give a shorter one")
        try:
            parsed = httpx2.URL(url) if base is None else base.join(url)
        except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
            raise BadImageError(f"{subject} is not a URL: give one such as https://example.com/image.png") from error
        if parsed.scheme not in PORTS:
            raise BadImageError(
                f"{subject} begins with {parsed.scheme[:20]!r}, expected https or http: give such a URL"
            )
        if parsed.userinfo:
            raise BadImageError(f"{subject} contains a user name or a password, expected none: leave them out")
        port = PORTS[parsed.scheme] if parsed.port is None else parsed.port
        if (_host_name(parsed.raw_host.decode("ascii")), port) not in self._hosts:
            raise BadImageError(
                f"{subject} names a host that is not allowed: send the image as a data URL, or have the"
                " server's operator allow the host"
            )
        return parsed

    async def _request(self, url: httpx2.URL) -> bytes | str:
        """Return the body of the response; for a redirect, the target."""
        target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers: dict[bytes | str, bytes | str] = {
            "Host": url.netloc,
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        timeout = dict.fromkeys(("pool", "connect", "read", "write"), self._seconds)
        async with self._pool.stream("GET", target, headers=headers, extensions={"timeout": timeout}) as response:
            fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in fields:
                return fields[b"location"]
            if response.status != 200:
                raise BadImageError(
                    f"the host of the image URL answered {response.status}, expected 200: check the URL"
                )
            if fields.get(b"content-encoding", "identity").strip().lower() != "identity":
                raise BadImageError(
                    "the host of the image URL sent a compressed body, expected a plain one: send a data URL"
                )
            declared = fields.get(b"content-length", "0")
            body = bytearray()
            if declared.isdecimal() and len(declared) < 20 and int(declared) <= self._max_bytes:
                async for part in response.aiter_stream():
                    body += part
                    if len(body) > self._max_bytes:
                        break
                else:
                    return bytes(body)
            raise BadImageError(
                f"the file of the image URL has more than the {self._max_bytes:,} bytes allowed: make the image smaller"
            )


class CheckedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to a host only if all its addresses are on the public Internet or in one of the networks given."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self._backend: Any = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(is_allowed(address, self._networks) for address in addresses):
            raise httpcore2.ConnectError("the address is not allowed")
        failure: Exception = httpcore2.ConnectError("no address")
        for address in addresses:
            try:  # the addresses are numbers, so nothing is resolved again
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("Unix sockets are not allowed")

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def is_allowed(address: str, networks: Iterable[Network] = ()) -> bool:
    """Return whether an address is that of a host on the public Internet, or is in one of the networks given."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.scope_id is not None:  # fe80::1%eth0 is of a local network
        return False
    if any(parsed in network for network in networks):
        return True
    if isinstance(parsed, IPv6Address) and parsed not in GLOBAL_UNICAST:
        return False
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in NOT_PUBLIC)


def _host_name(host: str) -> str:
    return host.lower().removesuffix(".")


def _parse_host(host: str) -> list[tuple[str, int]]:
    """Return the name in an entry of the list of hosts with each port that the entry allows."""
    try:
        url = httpx2.URL(f"image://{host}/")  # a protocol whose default port is not left out
    except (httpx2.InvalidURL, UnicodeError, ValueError):
        url = httpx2.URL("")
    ports = PORTS.values() if url.port is None else [url.port]
    is_host = re.fullmatch(rb"[a-z0-9_.:-]+", url.raw_host) and all(0 < port < 1 << 16 for port in ports)
    if not is_host or url.raw_path != b"/" or url.userinfo or url.fragment:
        raise InputError(
            f"the image host {host[:80]!r} is invalid, expected one like example.com or example.com:8443: fix it"
        )
    return [(_host_name(url.raw_host.decode("ascii")), port) for port in ports]


def _parse_network(network: str) -> Network:
    try:
        return ip_network(network)
    except ValueError as error:
        raise InputError(
            f"the image network {network[:80]!r} is not a network ({error}), expected one such as 10.0.0.0/8: fix it"
        ) from error
