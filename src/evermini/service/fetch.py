"""Images and files from other servers' addresses, without letting a request reach into this machine's network.

Names are resolved once, every address found must be public, and the connection goes to the address that was checked,
not to the name again: a name that changes its mind between the two (DNS rebinding) gains nothing. Redirects are new
addresses and checked like the first. Proxies of the environment are not used: they would resolve names themselves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urljoin

import httpcore
import httpx

from evermini import __version__
from evermini.errors import InvalidRequestError

SECONDS = 20.0
"""For everything, redirects included."""
MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CODE = "invalid_image_url"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: Address) -> bool:
    """Tell whether an address is one that anybody may reach: not private, loopback, link-local or otherwise special.

    An IPv6 address that stands for one of IPv4 is as public as that.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None:
            return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name; blocks no event loop."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class _Refused(Exception):
    """A name means an address that is not public."""


class _PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the address that was checked."""

    def __init__(self, resolve: Resolve, is_allowed: Callable[[Address], bool]) -> None:
        self._resolve, self._is_allowed = resolve, is_allowed
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the base class has it
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await self._resolve(host, port)
        addresses = [ipaddress.ip_address(name.partition("%")[0]) for name in found]
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise _Refused
        return await self._backend.connect_tcp(
            str(addresses[0]), port, timeout, local_address, socket_options
        )

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the base class has it
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise _Refused

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class Fetcher:
    """Gets bytes from public addresses.

    Args:
        resolve: Returns the addresses of a name.
        is_allowed: Tells which of them may be asked.
        seconds: For one fetch.
    """

    def __init__(
        self,
        *,
        resolve: Resolve = resolve,
        is_allowed: Callable[[Address], bool] = is_public,
        seconds: float = SECONDS,
    ) -> None:
        self._resolve, self._is_allowed, self._seconds = resolve, is_allowed, seconds

    async def __call__(self, url: str, limit: int) -> bytes:
        """Return what is at an address.

        Args:
            url: ``https://...`` or ``http://...``.
            limit: More bytes than this are refused.

        Raises:
            InvalidRequestError: It cannot be had, or is not to be asked for.
        """
        backend = _PinnedBackend(self._resolve, self._is_allowed)
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(network_backend=backend) as pool,
            ):
                return await self._follow(pool, url, limit)
        except _Refused:
            raise _failed(
                "its server has no public address; this server asks no machine of its own network"
            ) from None
        except TimeoutError:
            raise _failed(f"it took more than {self._seconds:g} seconds") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise _failed(str(error)[:200] or type(error).__name__) from error
        except OSError as error:  # names that mean nothing
            raise _failed(error.strerror or str(error)[:200]) from error

    async def _follow(self, pool: httpcore.AsyncConnectionPool, url: str, limit: int) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = _parsed(url)
            headers: dict[bytes | str, bytes | str] = {
                "Host": target.netloc.decode("ascii"),
                "User-Agent": f"evermini/{__version__}",
                "Accept-Encoding": "identity",
            }
            address = httpcore.URL(
                scheme=target.raw_scheme,
                host=target.raw_host,
                port=target.port,
                target=target.raw_path,
            )
            async with pool.stream("GET", address, headers=headers) as response:
                if response.status in _REDIRECTS:
                    url = urljoin(url, _header(response, b"location"))
                    continue
                if response.status != 200:
                    raise _failed(f"its server answered {response.status}")
                announced = _header(response, b"content-length")
                if announced.isdecimal() and int(announced) > limit:
                    raise _failed(f"it has more than {limit:,} bytes")
                data = bytearray()
                async for chunk in response.aiter_stream():
                    data += chunk
                    if len(data) > limit:
                        raise _failed(f"it has more than {limit:,} bytes")
                return bytes(data)
        raise _failed(f"there are more than {MAX_REDIRECTS} redirects")


def _parsed(url: str) -> httpx.URL:
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _failed(f"it is no address ({error})") from error
    if target.scheme not in ("http", "https") or not target.host or target.userinfo:
        raise _failed("expected https://HOST/PATH, without a name and password")
    return target


def _header(response: httpcore.Response, name: bytes) -> str:
    return next((v.decode("latin-1") for key, v in response.headers if key.lower() == name), "")


def _failed(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Error while downloading it: {why}. Send the bytes themselves as a data URL.", code=_CODE
    )
