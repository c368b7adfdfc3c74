"""What is fetched from other servers, and that nothing of this machine's network is."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evermini.errors import InvalidRequestError
from evermini.service.fetch import Address, Fetcher, is_public

DATA = b"\x89PNG and more" * 100


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/slow":
            time.sleep(2)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path == "/none":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/image":
            self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Names:
    """A resolver whose names mean what a test says, one answer after the other."""

    def __init__(self, **names: list[str]) -> None:
        self.names, self.asked = names, []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        found = self.names[host.removesuffix(".test")]
        return [found.pop(0)] if len(found) > 1 else list(found)


def only(*allowed: str):
    """Loopback stands for the public internet in these tests, all but what is not in ``allowed``."""

    def is_allowed(address: Address) -> bool:
        return str(address) in allowed or is_public(address)

    return is_allowed


async def test_a_name_is_resolved_once_and_that_address_is_asked():
    names = Names(images=["127.0.0.1", "10.0.0.1"])  # the second answer would be private
    with server() as web:
        url = f"http://images.test:{web.server_port}/image?a=b c"
        fetch = Fetcher(resolve=names, is_allowed=only("127.0.0.1"))
        assert await fetch(url, 10_000) == DATA
        assert names.asked == ["images.test"]
        assert web.asked == [("/image?a=b%20c", f"images.test:{web.server_port}")]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/image",
        "http://localhost:{port}/image",
        "http://0x7f000001:{port}/image",
        "http://2130706433:{port}/image",
        "http://127.1:{port}/image",
        "http://0.0.0.0:{port}/image",
        "http://[::1]:{port}/image",
        "http://[::ffff:127.0.0.1]:{port}/image",
    ],
)
async def test_loopback_is_never_asked_however_it_is_written(url: str):
    with server() as web:
        with pytest.raises(InvalidRequestError) as caught:
            await Fetcher()(url.format(port=web.server_port), 10_000)
        assert web.asked == []
    assert caught.value.code == "invalid_image_url"


@pytest.mark.parametrize(
    "target", ["http://inner.test:{port}/image", "http://127.0.0.2:{port}/image"]
)
async def test_a_redirect_is_checked_like_the_first_address(target: str):
    names = Names(images=["127.0.0.1"], inner=["192.168.1.1"])
    names.names["127.0.0.2"] = ["127.0.0.2"]
    with server() as web:
        there = target.format(port=web.server_port)
        url = f"http://images.test:{web.server_port}/to/{there}"
        with pytest.raises(InvalidRequestError, match="no public address"):
            await Fetcher(resolve=names, is_allowed=only("127.0.0.1"))(url, 10_000)
        assert len(web.asked) == 1


async def test_a_second_look_at_the_name_is_checked_again():
    """The first connection's answer was public; the redirect back to the same name gets a private one."""
    names = Names(images=["127.0.0.1", "169.254.169.254", "x"])
    with server() as web:
        url = f"http://images.test:{web.server_port}/to//none"
        fetch = Fetcher(resolve=names, is_allowed=only("127.0.0.1"))
        with pytest.raises(InvalidRequestError):
            await fetch(url, 10_000)


async def test_one_private_address_among_public_ones_is_enough_to_refuse():
    async def both(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.7"]

    with pytest.raises(InvalidRequestError, match="no public address"):
        await Fetcher(resolve=both)("http://images.test/a.png", 10_000)


@pytest.mark.parametrize(
    ("path", "limit", "says"),
    [
        ("/image", 100, "more than 100 bytes"),
        ("/unannounced", 100, "more than 100 bytes"),
        ("/none", 10_000, "answered 404"),
        ("/slow", 10_000, "took more than 0.5 seconds"),
        ("/to//to//to//to//image", 10_000, "more than 3 redirects"),
        ("/to/file:///etc/passwd", 10_000, "expected https://"),
    ],
)
async def test_time_bytes_and_redirects_are_bounded(path: str, limit: int, says: str):
    with server() as web:
        fetch = Fetcher(
            resolve=Names(images=["127.0.0.1"]),
            is_allowed=only("127.0.0.1"),
            seconds=0.5 if path == "/slow" else 30,
        )
        with pytest.raises(InvalidRequestError, match=says):
            await fetch(f"http://images.test:{web.server_port}{path}", limit)


async def test_what_is_no_address_is_refused():
    for url in ("http://", "http://a:b@images.test/", "http://[::1/", "https://nowhere.invalid/x"):
        with pytest.raises(InvalidRequestError):
            await Fetcher()(url, 100)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        *((private, False) for private in ("10.1.2.3", "172.16.0.1", "192.168.0.1", "127.0.0.1")),
        *((special, False) for special in ("169.254.169.254", "0.0.0.0", "100.64.0.1")),
        *((special, False) for special in ("224.0.0.1", "240.0.0.1", "255.255.255.255")),
        *((inner, False) for inner in ("::1", "::", "fe80::1", "fc00::1", "ff02::1")),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool):
    assert is_public(ipaddress.ip_address(address)) is public
