"""Log lines: their formats, and what never stands in them."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator

import pytest
import structlog

from evermini.cli.logs import REDACTED, configure_logging, redact


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers, root.level
    yield
    root.handlers, root.level = before[0], before[1]
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_json_lines_carry_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    logging.captureWarnings(False)  # of servers that other tests started in this process
    configure_logging("info", "json")
    structlog.contextvars.bind_contextvars(request_id="req_1")
    structlog.get_logger("evermini.api").info("request", status=200)
    logging.getLogger("other.library").warning("two\nlines %s", "é")
    logging.getLogger("other.library").debug("not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"].splitlines()[0] for line in lines[:2]] == ["request", "two"]
    assert "old" in lines[2]["event"]
    for line in lines:
        assert line["request_id"] == "req_1"
        assert line.keys() >= {"event", "level", "logger", "timestamp"}
    assert (lines[0]["status"], lines[1]["level"]) == (200, "warning")


def test_errors_have_their_traceback_and_no_local_variables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for form in ("json", "text"):
        configure_logging("info", form)  # type: ignore[arg-type]
        try:
            prompt = "the user's words"
            raise ValueError(len(prompt))
        except ValueError:
            logging.getLogger("x").exception("failed")
        written = capsys.readouterr().err
        assert "ValueError: 16" in written
        assert "the user's words" not in written.replace('prompt = "the user\'s words"', "")
        assert (form == "json") == written.startswith("{")


def test_auto_is_text_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging("info")
    logging.getLogger("x").info("hello")
    assert json.loads(capsys.readouterr().err)["event"] == "hello"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    configure_logging("info")
    logging.getLogger("x").info("hello")
    assert not capsys.readouterr().err.startswith("{")


SECRETS = [
    "Incorrect key sk-evermini-Abc_def-0123456789xyz.",
    "headers: {'authorization': 'Bearer abc.def-ghi_jkl=='}",
    "headers: {'authorization': 'bearer sesame-street'}",
    "cannot connect to postgresql+psycopg://evermini:hunter2@db:5432/evermini",
    "the key of the settings is open-sesame here",
]


@pytest.mark.parametrize("form", ["json", "text"])
def test_keys_and_passwords_are_not_written(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", form, keys=["open-sesame", "k"])  # type: ignore[arg-type]
    for secret in SECRETS:
        logging.getLogger("x").error("%s", secret)
        structlog.get_logger("x").error("event", detail={"nested": [secret]})
    written = capsys.readouterr().err
    for word in ("0123456789", "abc.def", "sesame", "hunter2"):
        assert word not in written
    assert written.count(REDACTED) == 2 * len(SECRETS)
    assert "db:5432/evermini" in written


def test_what_is_no_secret_stays() -> None:
    for line in (
        "ask-me-anything about disk-usage",
        "request req_0123 took 5 ms at http://127.0.0.1:8000/v1",
        "Bearer of bad news",
        "see https://example.com/a:b@c",
    ):
        assert redact(line) == line
