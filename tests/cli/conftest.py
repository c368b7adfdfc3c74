"""The command line run for real: in this process with one loaded nano model, and as a subprocess where that matters."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from evermini import LLM
from evermini.config import default_home


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the person who runs the tests: only where the weights and compiled kernels are."""
    for name in list(os.environ):
        if name.startswith("EVERMINI_") and name not in ("EVERMINI_HOME", "EVERMINI_WEIGHTS_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM("nano", kv_memory="256MiB", prompt_disk=0) as llm:
        reader = llm._served.reader
        assert reader is not None
        reader.home = tmp_path_factory.mktemp("home")  # not the index of who runs the tests
        yield llm


@pytest.fixture
def loaded_nano(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Commands run in this process get the model that is loaded already; and it survives them."""

    class Lent:
        info = llm.info

        def chat(self, *args, **params):
            return llm.chat(*args, **params)

        def close(self) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc: object) -> None:
            pass

    monkeypatch.setattr("evermini.cli.talk.open_llm", lambda settings: Lent())
    return llm


@pytest.fixture
def evermini(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run a command in this process, as the console script does."""

    def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
        from evermini.cli import main

        content = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        monkeypatch.setattr("sys.argv", ["evermini", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return run


def subprocess_environment() -> dict[str, str]:
    return {**os.environ, "EVERMINI_HOME": str(default_home()), "OMP_NUM_THREADS": "1"}


class Server:
    """``evermini serve`` as a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "evermini", "serve", "-m", "nano", "--port", "0"),
                *("--database-url", "sqlite:///evermini.db"),  # in the test's own folder
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=subprocess_environment(),
        )
        self.base_url = ""
        assert self.process.stdout
        for line in self.process.stdout:  # ends, too, when the process does
            if "base_url = " in line:
                self.base_url = line.split("base_url = ")[1].strip()
                return
        raise AssertionError(f"no ready line: {self.process.communicate()[1]}")

    def stop(self, timeout: float = 60) -> Result:
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=timeout)
        return Result(self.process.returncode, out, err)


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="session")
def base_url(llm: LLM) -> Iterator[str]:
    """A server in this process, with the model that is loaded already."""
    from evermini.service.runtime import Runtime
    from tests.serving import serving

    with serving(Runtime([llm._served])) as url:
        yield f"{url}/v1"
