"""`evermini keys`, `usage` and `cost`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from evermini.cli import app
from evermini.config import Settings
from evermini.storage.database import Database
from evermini.storage.usage import UsageStore, Used


def run(*args: str, home: Path | None = None) -> str:
    where = ["--home", str(home)] if home else []
    result = CliRunner().invoke(app, [*args, *where])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    secret = run("keys", "create", "laptop", "--days", "3", home=tmp_path).strip().splitlines()[-1]
    assert secret.startswith("sk-evermini-")
    listed = run("keys", "ls", home=tmp_path)
    assert secret not in listed
    assert secret[-4:] in listed
    key_id = listed.split()[0]
    assert "until" in listed
    run("keys", "revoke", key_id, home=tmp_path)
    assert "revoked" in run("keys", "ls", home=tmp_path)
    assert "key.revoked" in run("keys", "log", home=tmp_path)


def test_the_worked_example_of_the_guide() -> None:
    lines = run("cost", "--input", "1000M", "--output", "100M").split()
    assert lines == ["gpt-4.1-mini", "$560.00", "gpt-6-luna", "$150.00"]
    lines = run("cost", "--input", "1000M", "--output", "100M", "--batch").split()
    assert lines[1] == "$280.00"
    mine = run("cost", "--input", "1B", "--hours", "10", "--hour-price", "0.5")
    assert mine.split()[-1] == "$5.00"


def test_usage_compares_prices(tmp_path: Path) -> None:
    import time

    with Database.open(Settings(home=tmp_path)) as database:
        used = Used(
            int(time.time()), "r", "/v1/responses", "gpt-4.1-mini-2025-04-14", None, "default", False,
            1_000_000, 500_000, 1_000_000, 0, 0, 1.0,
        )  # fmt: skip
        UsageStore(database).add([used], int(time.time()), 1800)
    shown = run("usage", "--machine-price", "0.2", home=tmp_path)
    assert "$1.8500" in shown
    assert "$0.5550" in shown
    assert "0.500 hours; cost here: $0.1000" in shown
