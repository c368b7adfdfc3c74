"""Real ``evermini serve`` processes with the nano model, for tests that kill them or take their disk away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from evermini.config import default_home
from tests.ports import free_port

READY_SECONDS = 180
_CODE = """
from evermini.service import jobs
jobs.LEASE_SECONDS, jobs.RENEW_SECONDS, jobs.POLL_SECONDS = {lease}, {lease} / 5, 0.2
from evermini.cli import main
main()
"""


def new_home(folder: Path) -> Path:
    """A home folder with the weights and kernels of the real one, and a database and blobs of its own."""
    folder.mkdir(exist_ok=True)
    for name in ("models", "packed", "kernels"):
        (default_home() / name).mkdir(exist_ok=True)
        (folder / name).symlink_to(default_home() / name)
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVERMINI_")}
    return {**kept, "EVERMINI_HOME": str(home), **more}


class Server:
    """A server on a port of its own, which may be killed and started again as often as wanted.

    Args:
        home: Its home folder.
        flags: What else the command line says.
        env: Settings by environment variable.
        lease: Seconds after which the jobs of a killed process are free; the real 30 make tests long.
    """

    def __init__(
        self,
        home: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        lease: float = 2.0,
    ) -> None:
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.log = home / f"log-{self.port}"
        self._command = [
            *(sys.executable, "-c", _CODE.format(lease=lease), "serve", "-m", "nano"),
            *("--port", str(self.port), "--kv-memory", "128MiB", "--threads", "1", *flags),
        ]
        self._env = environment(home, **(env or {}))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may not answer yet."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it takes connections."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert self._process is not None
            assert self._process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it in the orderly way and return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(60)
        self._process = None
        return code

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:]

    def client(self, **options: object) -> openai.OpenAI:
        defaults = {"api_key": "unused", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=f"{self.root}/v1", **{**defaults, **options})  # type: ignore[arg-type]

    def __enter__(self) -> Server:
        self.start()
        self.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def evermini(home: Path, *arguments: str, **env: str) -> str:
    """Run a command and return what it prints."""
    command: Sequence[str] = (sys.executable, "-m", "evermini", *arguments)
    done = subprocess.run(
        command, env=environment(home, **env), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
