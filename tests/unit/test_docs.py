"""The documentation says what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from evermini.models.catalogue import CATALOGUE
from evermini.service import schemas, unsupported

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """Return field → verdict of the table below a heading."""
    section = API.split(f"## `{heading}`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (\w.*?) \|", section, flags=re.MULTILINE)
    return {name: verdict for names, verdict in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize(
    ("heading", "request_model", "refusable"),
    [
        ("POST /v1/chat/completions", schemas.ChatRequest, unsupported.CHAT_UNSUPPORTED),
        ("POST /v1/completions", schemas.CompletionRequest, unsupported.COMPLETION_UNSUPPORTED),
    ],
)
def test_every_field_has_its_verdict(heading, request_model, refusable):
    verdicts = table(heading)
    served = {name for name, verdict in verdicts.items() if verdict in ("acted on", "accepted")}
    refused = {name for name, verdict in verdicts.items() if verdict == "refused"}
    assert served == set(request_model.model_fields)
    assert refused == set(refusable)


def test_what_messages_may_not_hold_is_listed():
    for name in (
        *unsupported.MESSAGE_UNSUPPORTED,
        *unsupported.UNSUPPORTED_PARTS,
    ):
        assert f"`{name}`" in API


def test_generated_pages_are_up_to_date():
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_docs.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr


def test_every_flag_is_explained():
    flags = re.findall(r"^- `--.*", (ROOT / "docs" / "cli.md").read_text(), flags=re.MULTILINE)
    assert len(flags) > 100
    assert [flag for flag in flags if re.search(r": (None|Default)", flag)] == []


def test_the_readme_lists_the_catalogue():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for entry in CATALOGUE:
        aliases = ", ".join(f"`{alias}`" for alias in entry.aliases)
        row = f"| {entry.tier} | {aliases} | {entry.model}, {entry.quantisation} | {entry.native_window:,} |"
        assert row in readme


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=str
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
