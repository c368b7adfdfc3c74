"""A PostgreSQL server of the tests' own, from the distribution's package; skipped where there is none."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url, text


def _program(name: str) -> str:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"no {name}: PostgreSQL is not installed (Debian: apt install postgresql)")
    return found


class Postgres:
    """A server that listens on a socket in a folder of its own; it may be stopped and started again."""

    def __init__(self, folder: Path, as_user: dict[str, str]) -> None:
        self.url = f"postgresql://evermini@/postgres?host={folder}"
        self._folder, self._as_user = folder, as_user
        self._control = _program("pg_ctl")
        data = str(folder / "data")
        self._run(
            _program("initdb"),
            "-D",
            data,
            "-U",
            "evermini",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        )

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off"
        log = str(self._folder / "log")
        self._run(self._control, "-D", "data", "-o", options, "-l", log, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        self._run(self._control, "-D", "data", "-m", mode, "stop")

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            cwd=self._folder,
            capture_output=True,
            text=True,
            check=False,
            **self._as_user,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start a server."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    _program("initdb")
    as_user: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="evermini-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            try:
                owner = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("no user postgres to run PostgreSQL as, and this is root")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            as_user = {"user": "postgres", "group": "postgres"}
        server = Postgres(folder, as_user)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server and yield its URL."""
    with postgres() as server:
        yield server.url


@contextmanager
def empty_database(server: str) -> Iterator[URL]:
    """Create a database on a server that runs, and drop it in the end."""
    url = make_url(server).set(drivername="postgresql+psycopg")
    name = f"test_{time.time_ns()}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield url.set(database=name)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()
