"""The process that checks or trains, seen from the server: started, listened to, told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

LOG = "process.log"
"""In the job's folder: what the process and its libraries had to say."""
STOP_SECONDS = 30.0
"""How long it may take to save when it is told to stop."""
_MAX_REPORT = 16 * 1024**2
_TAIL = 2000


def command(what: Literal["check", "train"], folder: Path, num_processes: int) -> Sequence[str]:
    """Return the command line; several processes, one for each GPU, are accelerate's to start."""
    module = ["-m", "evermini.tuning", what, str(folder)]
    if num_processes < 2:
        return [sys.executable, *module]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    return [sys.executable, *launch, "--num_processes", str(num_processes), *module]


class TuningProcess:
    """A running process. Whoever starts one must `kill` it in the end, which does nothing if it has ended.

    It lives in a session of its own, so Ctrl-C in a terminal does not reach it before it is told to save. It ends with
    its starter: when that is gone, its standard input ends.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self.is_stopping = False

    @classmethod
    async def start(
        cls, what: Literal["check", "train"], folder: Path, *, num_processes: int = 1
    ) -> TuningProcess:
        """Start one on a job's folder."""
        log = folder / LOG
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Each length of a row has kernels of its own, which oneDNN would keep, 1,024 of them.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
            "PYTHONHASHSEED": "0",  # peft writes sets as they come: the same adapter, the same file
        }
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *command(what, folder, num_processes),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,
                limit=_MAX_REPORT,
            )
        return cls(process, log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def reports(self) -> AsyncIterator[dict[str, Any]]:
        """Yield its reports until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield json.loads(line)

    def stop(self) -> None:
        """Tell it to save and end."""
        if not self.is_stopping:
            self.is_stopping = True
            assert self._process.stdin is not None
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(b"stop\n")

    async def wait(self) -> int:
        """Wait for its end; return its exit code, negative: the signal that ended it."""
        return await self._process.wait()

    async def save_and_end(self) -> None:
        """Tell it to save, and give it `STOP_SECONDS`; whoever is impatient and cancels this again has to wait, too."""
        self.stop()
        end = asyncio.ensure_future(asyncio.wait_for(self._process.wait(), STOP_SECONDS))
        while not end.done():
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                await asyncio.shield(end)

    async def kill(self) -> None:
        """End it now."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def last_words(self) -> str:
        """Return the end of its log."""
        try:
            return self._log.read_bytes()[-_TAIL:].decode("utf-8", "replace").strip()
        except OSError:
            return ""
