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
    "fine-tuning": (
        "fine_tuning/test_jobs.py",
        "fine_tuning/jobs/test_checkpoints.py",
        "fine_tuning/checkpoints/test_permissions.py",
    ),
    "usage, costs": ("admin/organization/test_usage.py",),
}
"""The parts of the API that are here, and their tests below tests/api_resources."""
OURS = {"usage, costs": re.compile("completions|embeddings|costs")}
"""Of these parts, the tests that ask for what is here."""
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
  fills in `model`, `input` and a short `max_completion_tokens` where a test leaves them out, puts a byte and a checksum
  where it says `bytes: 0` and `md5: "md5"`, and reads `limit=0` and `page=page` as not given. What the server does not
  do is refused as ever.

What does not pass with fixtures is listed below, with the server's answer and the reason.
"""
REASONS = (
    (
        "chat",
        "create_with_all_params",
        "No server passes that keeps OpenAI's own rules: the test sets `max_tokens: 0`, `functions` beside "
        "`tools`, `logprobs` beside `prediction`, and `stream_options` without a stream. Of the rest, this server "
        "refuses `audio`, `moderation`, `prompt_cache_options` with a `ttl`, `verbosity` and "
        "`web_search_options`, which it has no means for.",
    ),
    (
        "completions",
        "create_with_all_params",
        "No server passes that keeps OpenAI's own rules: `best_of: 0`, `stream_options` without a stream, and "
        "`logit_bias` of the token `foo`. Besides, `suffix` asks for text in the middle, which this server "
        "refuses.",
    ),
    (
        "responses",
        "create_with_all_params",
        "No server passes that keeps OpenAI's own rules: the test gives `previous_response_id` beside "
        "`conversation`, and `stream_options` without a stream. Of the rest, this server refuses "
        "`context_management`, stored prompts, a `reasoning` other than none, `text.verbosity`, deferred tools, "
        "`moderation` and what comes after them in 3.x (`access_programs`, `background_options`, `image`, a "
        "`prompt_cache_options` that asks for something).",
    ),
    (
        "responses",
        "count_with_all_params",
        "No server passes that keeps OpenAI's own rules: the test gives `previous_response_id` beside "
        "`conversation`. Of the rest, this server refuses `personality`, a `reasoning` other than none, "
        "`text.verbosity` and deferred tools.",
    ),
    (
        "responses",
        "compact",
        "Not built: OpenAI's answer is an encrypted summary that only its models read. Contexts of up to "
        "1,047,576 tokens are read as they are.",
    ),
    (
        "embeddings",
        "_create",
        "The test's own. The client asks for base64 by itself where a test names no `encoding_format`, and its "
        "strict mode then refuses base64, from OpenAI's servers as from this one.",
    ),
)
"""Part, what is in the test's name, and why it does not pass. A wrong answer that is not here is a bug."""


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
        cases = [
            Case(_group(groups, case.get("classname", "")), case.get("name", ""), _problem(case))
            for case in ElementTree.parse(report.name).iter("testcase")
        ]
    return [case for case in cases if case.group not in OURS or OURS[case.group].search(case.name)]


def _group(groups: dict[str, str], class_name: str) -> str:
    for module, group in groups.items():
        if f"tests.{class_name}.".replace("tests.tests.", "tests.").startswith(f"{module}."):
            return group
    raise SystemExit(f"{class_name} belongs to no part")


def _reason(group: str, test: str) -> str:
    """Return why a test does not pass, ``""`` if that is not known."""
    return next((why for part, name, why in REASONS if part == group and name in test), "")


def _absent(version: str) -> list[str]:
    """Return the tests that no part of the surface has."""
    folder = source(version) / "tests" / "api_resources"
    known = {name for names in SURFACE.values() for name in names}
    files = (path.relative_to(folder) for path in sorted(folder.rglob("test_*.py")))
    left = [path for path in files if str(path) not in known]
    return sorted({f"`{_part(path)}`" for path in left})


def _part(path: Path) -> str:
    """Return what a file of tests is about, without the folders of those that are alike."""
    parts = [part.removeprefix("test_") for part in path.with_suffix("").parts]
    return "/".join(parts[:2]) if parts[0] in ("admin", "chat", "fine_tuning") else parts[0]


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
    return "**not what the client takes**: " + (failed.get("message") or "")[:200].replace(
        "\n", " "
    )


def report(results: dict[tuple[str, str], list[Case]]) -> str:
    """Return the page: a table, then what fails and why."""
    lines = [HEAD, "| | " + " | ".join(f"{v}, {mode}" for v, mode in results) + " |"]
    lines.append("|---|" + "---|" * len(results))
    for group in [*SURFACE, "all"]:
        cells = []
        for cases in results.values():
            mine = [case for case in cases if group in (case.group, "all")]
            passed = sum(not case.problem for case in mine)
            cells.append(f"{passed} of {len(mine)}" if mine else "none")
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
            why = _reason(group, next(iter(tests)))
            lines.append(f"- {group}: {named}: {problem}{f' *{why}*' if why else ''}")
    for version in dict.fromkeys(version for version, _ in results):
        lines.append(f"\n## What was not run: openai {version}\n")
        lines.append(f"Tests of what this server does not have: {', '.join(_absent(version))}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything; 1 if the server gave a wrong answer that no reason is known for, rather than refused."""
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
    return int(
        any(
            "**not" in case.problem and not _reason(case.group, re.sub(r"\[.*", "", case.name))
            for cases in results.values()
            for case in cases
        )
    )


if __name__ == "__main__":
    sys.exit(main())
