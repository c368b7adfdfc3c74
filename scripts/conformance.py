"""Runs OpenAI's own client tests against this server; see scripts/conformance."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VERSIONS = ("2.30.0", "3.54.0")
CACHE = Path.home() / ".cache" / "evermini" / "conformance"
SURFACE = {
    "chat": ("chat/test_completions.py", "chat/completions/test_messages.py"),
    "completions": ("test_completions.py",),
    "responses": (
        "test_responses.py",
        "responses/test_input_items.py",
        "responses/test_input_tokens.py",
    ),
    "conversations": ("test_conversations.py", "conversations/test_items.py"),
    "models": ("test_models.py",),
    "embeddings": ("test_embeddings.py",),
    "files, uploads": ("test_files.py", "test_uploads.py", "uploads/test_parts.py"),
    "batches": ("test_batches.py",),
    "fine-tuning": ("fine_tuning/test_jobs.py", "fine_tuning/jobs/test_checkpoints.py"),
}
"""The parts of the API that are here, and their tests below tests/api_resources."""
MODES = ("strict", "fixtures")
HEAD = """\
# Conformance

<!-- Written by scripts/conformance --write docs/conformance.md; edit scripts/conformance.py. -->

OpenAI's Python client has tests for every endpoint, `tests/api_resources` in its source distribution. They run here
against a server with the nano model, over HTTP, on every part of the API that this server has. Each case sends a
request and checks the answer against the client's own types, once as they come and once strictly.

The tests were written for a mock server that answers anything: they name models that are not here, ids that nobody
has created, and values that the real API refuses (`limit=0`, `max_tokens=0`). So there are two results:

- **strict**: the server as it is;
- **fixtures**: with `--conformance-fixtures`, which answers to any model name, creates the ids that the tests use, and
  fills in `model`, `input` and a short `max_completion_tokens` where a test leaves them out. Nothing that the server
  refuses is let through.

Two failures with fixtures are the tests' own. The strict client refuses the base64 that it asks for by itself when a
test names no `encoding_format` (embeddings). An upload is completed with the checksum "md5", which its bytes do not
have.
"""


@dataclass(frozen=True)
class Case:
    """One test's outcome; ``problem`` is empty if it passed."""

    group: str
    name: str
    problem: str


def source(version: str) -> Path:
    """Return the folder of a version's source distribution, fetched if need be."""
    folder = CACHE / f"openai-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"Fetching openai {version} ...", flush=True)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        fetch += ["--no-binary", "openai", "-d", str(CACHE), f"openai=={version}"]
        subprocess.run(fetch, check=True)
        with tarfile.open(CACHE / f"openai-{version}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """Run a server on an empty database and yield its base URL."""
    with tempfile.TemporaryDirectory(prefix="evermini-conformance-") as folder:
        command = [sys.executable, "-m", "evermini", "serve", "--model", "nano", "--port", "0"]
        command += ["--database-url", f"sqlite:///{folder}/evermini.db", "--log-level", "error"]
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith("Ready: base_url = "):
                    yield line.removeprefix("Ready: base_url = ").strip()
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()
            process.wait()


def run(version: str, base_url: str) -> list[Case]:
    """Run a version's tests of our surface."""
    folder = source(version)
    files = {
        folder / "tests" / "api_resources" / name: group
        for group, names in SURFACE.items()
        for name in names
    }
    files = {path: group for path, group in files.items() if path.exists()}
    environment = {
        **os.environ,
        "TEST_API_BASE_URL": base_url,
        "PYTHONPATH": os.pathsep.join([str(folder / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-o", "addopts=", f"--junitxml={report.name}", *map(str, files)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
        groups = {
            str(path.relative_to(folder).with_suffix("")).replace(os.sep, "."): group
            for path, group in files.items()
        }
        return [
            Case(_group(groups, case.get("classname", "")), case.get("name", ""), _problem(case))
            for case in ElementTree.parse(report.name).iter("testcase")
        ]


def _group(groups: dict[str, str], class_name: str) -> str:
    for module, group in groups.items():
        if f"tests.{class_name}".replace("tests.tests.", "tests.").startswith(f"{module}."):
            return group
    return "other"


def _problem(case: ElementTree.Element) -> str:
    """Return why a case failed: what the server answered, else what was wrong with the answer."""
    failed = case.find("failure")
    failed = case.find("error") if failed is None else failed
    if failed is None:
        return ""
    text = failed.text or ""
    refused = re.search(r"Error code: (\d+) - (.*)", text)
    if refused:
        # Clients before 3.0 show the whole body.
        message = re.match(r"\{'error': \{'message': (['\"])(.*?)\1, 'type'", refused[2])
        return f"{refused[1]}: {message[2] if message else refused[2]}"
    return "**wrong answer**: " + (failed.get("message") or "")[:200].replace("\n", " ")


def report(results: dict[tuple[str, str], list[Case]]) -> str:
    """Return the page: a table, then what fails and why."""
    lines = [HEAD, "| | " + " | ".join(f"{v}, {mode}" for v, mode in results) + " |"]
    lines.append("|---|" + "---|" * len(results))
    for group in [*SURFACE, "other", "all"]:
        cells = []
        for cases in results.values():
            mine = [case for case in cases if group in (case.group, "all")]
            passed = sum(not case.problem for case in mine)
            cells.append(f"{passed} of {len(mine)}")
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    for (version, mode), cases in results.items():
        if mode != "fixtures":
            continue
        lines.append(f"\n## What does not pass with fixtures: openai {version}\n")
        lines.append("Cases are counted over clients (sync, async, aiohttp; loose and strict).\n")
        reasons: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for case in cases:
            if case.problem:
                test = re.sub(r"\[.*", "", case.name)
                reasons[case.group, case.problem][test] += 1
        for (group, problem), tests in sorted(reasons.items()):
            named = ", ".join(f"`{test}` ({count})" for test, count in sorted(tests.items()))
            lines.append(f"- {group}: {named}: {problem}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything; 1 if the server gave a wrong answer, rather than refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", action="append", help="of openai; may be given several times")
    parser.add_argument("--write", type=Path, help="write the report into this file")
    options = parser.parse_args()
    results: dict[tuple[str, str], list[Case]] = {}
    for version in options.version or VERSIONS:
        for mode in MODES:
            with server(*(["--conformance-fixtures"] if mode == "fixtures" else [])) as url:
                results[version, mode] = run(version, url)
    page = report(results)
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    return int(any("**wrong" in case.problem for cases in results.values() for case in cases))


if __name__ == "__main__":
    sys.exit(main())
