"""A PostgreSQL server of the tests' own, from the distribution's package; skipped where there is none."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _program(name: str) -> str:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"no {name}: PostgreSQL is not installed (Debian: apt install postgresql)")
    return found


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server that listens on a socket in a folder of its own, and yield its URL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra `postgres`)")
    initdb, control = _program("initdb"), _program("pg_ctl")
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

        def run(*command: str) -> None:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, **as_user
            )
            assert done.returncode == 0, done.stdout + done.stderr

        data = str(folder / "data")
        run(initdb, "-D", data, "-U", "evermini", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(control, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://evermini@/postgres?host={folder}"
        finally:
            run(control, "-D", data, "-m", "immediate", "stop")
