"""The running server: uvicorn with a ready line, and with an end that no request meets in silence."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from evermini import __version__
from evermini.api.app import create_app, drain
from evermini.api.connections import server_config
from evermini.config import Settings
from evermini.service.runtime import Runtime
from evermini.service.upstream.model import UpstreamModel
from evermini.storage.database import Database

LAST_WORDS_SECONDS = 5
"""What connections get, once the engines have stopped, to send their clients the error and close."""


def run_server(
    runtime: Runtime, database: Database, settings: Settings, listener: socket.socket
) -> None:
    """Serve until SIGINT or SIGTERM, then let running requests finish."""
    app = create_app(runtime, database, settings)
    config = server_config(
        app,
        lifespan="on",  # a start that fails must not go on in silence
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.drain_timeout + LAST_WORDS_SECONDS,
    )
    with _signals_are_handled():
        _Server(config, partial(drain, app), runtime, settings.drain_timeout).run(
            sockets=[listener]
        )


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        drain: Callable[[], None],
        runtime: Runtime,
        drain_timeout: int,
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._runtime = runtime
        self._drain_timeout = drain_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            assert sockets
            # What was loaded stays. Else the collector walks over its half a million objects now and then, while
            # everyone waits: a quarter of a second.
            gc.collect()
            gc.freeze()
            print(_ready_lines(self._runtime, sockets[0]), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests; when their time is up, end them with an error that their clients get to read.

        Meanwhile the server still listens: who comes now is told to come again, instead of meeting a closed port.
        """
        self._drain()
        running = set(self.server_state.tasks)
        if running:
            seconds = f"{self._drain_timeout} s" if self._drain_timeout else "no time"
            print(f"Stopping: {len(running)} running requests get {seconds} to finish.", flush=True)
        loop = asyncio.get_running_loop()
        too_late = loop.call_later(
            self._drain_timeout, lambda: loop.run_in_executor(None, self._runtime.close, 0.0)
        )
        until = loop.time() + self._drain_timeout + LAST_WORDS_SECONDS
        # What ends the wait are flags that uvicorn sets, not events.
        while running & self.server_state.tasks and not self.force_exit and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        self.config.timeout_graceful_shutdown = LAST_WORDS_SECONDS
        await super().shutdown(sockets=sockets)
        too_late.cancel()


def _ready_lines(runtime: Runtime, listener: socket.socket) -> str:
    lines = [f"Evermini {__version__}"]
    for served in runtime.models:
        info = served.info
        also = f" (also {', '.join(info.aliases)})" if info.aliases else ""
        window = f"{info.context_window:,} tokens" if info.context_window else "not known"
        where = f", run by {served.spec.url}" if isinstance(served, UpstreamModel) else ""
        lines.append(f"  {info.id}{also}: window {window}{where}")
    lines.append(f"Ready: base_url = {base_url(listener)}")
    return "\n".join(lines)


def base_url(listener: socket.socket) -> str:
    """Return the URL that clients on this machine give as ``base_url``."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@contextlib.contextmanager
def _signals_are_handled() -> Iterator[None]:
    """Make the signal that uvicorn repeats after its shutdown harmless: the server has done as told; exit code 0."""
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
