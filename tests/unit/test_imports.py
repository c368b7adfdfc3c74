"""Imports point one way, strings stay at the edges, and the command line starts without heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "evermini"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "kernels": {"errors", "config"},
    "text": {"errors"},
    "documents": {"errors"},
    "models": {"errors", "config", "kernels"},
    "engine": {"errors", "config", "models"},
    "recall": {"errors", "config", "kernels", "models", "engine"},
    "vision": {"errors", "models"},
    "storage": {"errors", "config"},
    "backends": {"errors"},
    "service": {
        "errors",
        "config",
        "backends",
        "documents",
        "vision",
        "models",
        "engine",
        "recall",
        "text",
        "storage",
    },
    "tuning": {"errors", "models", "service", "text", "vision"},
    "api": {"errors", "config", "service", "storage"},
    "llm": {"errors", "config", "backends", "models", "recall", "service", "text"},
    "evals": {"errors", "models", "recall", "service", "llm"},
    "cli": {
        "errors",
        "config",
        "kernels",
        "backends",
        "documents",
        "models",
        "recall",
        "text",
        "storage",
        "service",
        "api",
        "llm",
        "evals",
        "tuning",
    },
    "__main__": {"cli"},
    "__init__": {"llm"},
}
"""Who may import whom, inside the package. A new part must be entered here."""

ONLY_IN: dict[str, set[str]] = {
    "fastapi": {"api"},
    "starlette": {"api"},
    "uvicorn": {"api", "cli"},
    "typer": {"cli"},
    "rich": {"cli"},
    "tokenizers": {"text", "tuning"},  # tuning: a stand-in that trl asks for
    "llguidance": {"text"},
    "jinja2": {"text"},
    "sqlalchemy": {"storage"},
    "alembic": {"storage"},
    "pathspec": {"documents"},
    "pypdfium2": {"documents"},
    "PIL": {"documents", "vision"},
    "rapidocr": {"vision"},
    "httpcore": {"service"},
    "transformers": {"tuning", "vision"},
    "openai": set(),
    "opentelemetry": {"service"},
    "matplotlib": {"evals", "tuning"},
    "bm25s": {"evals"},
    "Stemmer": {"evals"},
}
"""Third-party packages that only the named parts may import."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "evermini":
                yield from ((node.lineno, f"evermini.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    part = part_of(path)
    assert part in ALLOWED, f"enter {part} in ALLOWED"
    for line, name in imported(path):
        root, _, rest = name.partition(".")
        where = f"{path}:{line}: {part} imports {name}"
        if root == "evermini" and not rest.startswith("__version__"):
            target = rest.split(".")[0]
            assert target == part or target in ALLOWED[part], where
        elif root in ONLY_IN:
            assert part in ONLY_IN[root], where


HEAVY = {"torch", "numpy", "fastapi", "starlette", "uvicorn", "httpx", "gguf", "jinja2"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic"}),
        (["--version"], HEAVY | {"pydantic"}),
        (["serve", "--help"], HEAVY),  # typer itself may use pydantic for a command's options
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: set[str]):
    code = (
        "import sys\n"
        f"sys.argv = ['evermini', *{arguments!r}]\n"
        "from evermini.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as exit:\n    assert not exit.code, exit.code\n"
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.rpartition("LOADED")[2].split())
    assert "typer" in loaded
    assert loaded & heavy == set()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, evermini; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in run.stdout.split()} & (
        HEAVY | {"pydantic", "typer", "rich"}
    )
