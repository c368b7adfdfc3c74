"""Where PyPI, or the user's replacement for it, keeps a file: URL, hash and size, without downloading anything.

pip's own configuration decides: ``index-url``, ``extra-index-url``, ``no-index``, ``find-links`` folders, ``cert`` and
``proxy``, from pip's environment variables and files. Pages are read by the simple repository API (PEP 503 HTML,
PEP 691 JSON). pip itself is not asked to resolve: where the index serves no separate metadata it downloads every wheel
in full (measured: 1.1 GB for the 22 parts of one model), and it builds a source distribution to learn its name.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

from evermini.errors import SourceUnreachableError
from evermini.models.transfer import CONNECT_TIMEOUT, READ_TIMEOUT, explain, shown

_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"


@dataclass(frozen=True)
class IndexFile:
    """A distribution file that an index offers.

    Attributes:
        filename: Its name.
        url: ``https``, ``http`` or ``file``.
        sha256: Hash the index states, if any.
        size: Bytes the index states, if any.
    """

    filename: str
    url: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class PipSettings:
    """What pip is configured with, as far as finding a file goes."""

    indexes: tuple[str, ...]
    folders: tuple[Path, ...] = ()
    cert: str | None = None
    proxy: str | None = None

    def client(self) -> httpx.Client:
        """Return an HTTP client for these indexes and the files they name."""
        return httpx.Client(
            follow_redirects=True,
            timeout=httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
            verify=ssl.create_default_context(cafile=self.cert) if self.cert else True,
            proxy=self.proxy,
        )


def pip_settings() -> PipSettings:
    """Ask the pip of this environment how it is configured.

    Raises:
        SourceUnreachableError: pip is not installed here, or does not answer as expected.
    """
    found = _parse_config(_pip("config", "list"))

    def value(
        key: str,
    ) -> str:  # variables override a command's section, that the global one, as in pip
        sections = (":env:", "download", "install", "global")
        return next((found[f"{s}.{key}"] for s in sections if f"{s}.{key}" in found), "")

    indexes: list[str] = []
    if value("no-index").lower() not in ("1", "true", "yes", "on"):
        indexes = [value("index-url") or _default_index(), *value("extra-index-url").split()]
    folders = tuple(path for path in map(_as_folder, value("find-links").split()) if path)
    return PipSettings(tuple(indexes), folders, value("cert") or None, value("proxy") or None)


def find_file(
    client: httpx.Client,
    settings: PipSettings,
    package: str,
    version: str,
    kind: Literal["wheel", "sdist"] = "wheel",
) -> IndexFile:
    """Return the file of one release, from the first place that has it.

    Raises:
        SourceUnreachableError: No configured place has it; the message names each with its reason.
    """
    reasons = []
    for folder in settings.folders:
        for path in sorted(folder.glob("*")):
            if _is_release(path.name, package, version, kind):
                return IndexFile(path.name, path.resolve().as_uri(), size=path.stat().st_size)
    for index in settings.indexes:
        page = f"{index.rstrip('/')}/{canonicalize_name(package)}/"
        try:
            for file in _read_page(client, page):
                if _is_release(file.filename, package, version, kind):
                    return file
            reasons.append(f"{shown(page)}: no {kind} of version {version}")
        except httpx.HTTPError as error:
            reasons.append(f"{shown(page)}: {explain(error)}")
        except SourceUnreachableError as error:
            reasons.append(error.message)
    if not settings.indexes:
        reasons.append("pip is configured with no-index")
    raise SourceUnreachableError(f"{package} {version} not found ({'; '.join(reasons)})")


def _read_page(client: httpx.Client, page: str) -> Iterator[IndexFile]:
    if urlsplit(page).scheme == "file":
        file = Path(urllib.request.url2pathname(urlsplit(page).path)) / "index.html"
        if not file.is_file():
            raise SourceUnreachableError(f"{file}: no such file")
        yield from _parse_html(page, file.read_text(encoding="utf-8"))
        return
    response = client.get(page, headers={"Accept": _ACCEPT})
    if response.status_code != 200:
        raise SourceUnreachableError(
            f"{shown(page)}: HTTP {response.status_code} {response.reason_phrase}"
        )
    base = str(response.url)
    if "json" not in response.headers.get("content-type", ""):
        yield from _parse_html(base, response.text)
        return
    try:
        for item in response.json()["files"]:
            hashes = item.get("hashes", {})
            url = urljoin(base, item["url"])
            yield IndexFile(item["filename"], url, hashes.get("sha256"), item.get("size"))
    except (ValueError, KeyError, TypeError) as error:
        raise SourceUnreachableError(
            f"{shown(page)}: not a page of the simple repository API ({error!r})"
        ) from error


@dataclass
class _Links(HTMLParser):
    """Collects the links of a PEP 503 page."""

    base: str
    files: list[IndexFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if href is None:
            return
        if tag == "base":
            self.base = urljoin(self.base, href)
        elif tag == "a":
            url, fragment = urldefrag(urljoin(self.base, href))
            name = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
            sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
            self.files.append(IndexFile(name, url, sha256))


def _parse_html(base: str, text: str) -> list[IndexFile]:
    links = _Links(base)
    links.feed(text)
    return links.files


def _is_release(filename: str, package: str, version: str, kind: str) -> bool:
    if "/" in filename or "\\" in filename:  # an index must not choose the folder a file goes to
        return False
    try:
        if kind == "wheel":
            name, found = parse_wheel_filename(filename)[:2]
        else:
            name, found = parse_sdist_filename(filename)
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return False
    return name == canonicalize_name(package) and found == Version(version)


def _parse_config(text: str) -> Mapping[str, str]:
    """Parse ``pip config list``: one ``section.key='value'`` a line, the value as a Python literal."""
    found = {}
    for line in text.splitlines():
        key, _, literal = line.partition("=")
        try:
            found[key] = str(ast.literal_eval(literal))
        except (ValueError, SyntaxError):
            continue  # not a setting, e.g. a notice
    return found


@functools.cache
def _default_index() -> str:
    """Return the index that an unconfigured pip uses, as its help states it."""
    found = re.search(r"--index-url.*?\(default\s+(\S+?)\)", _pip("download", "--help"), re.DOTALL)
    if found is None:
        raise SourceUnreachableError(
            "pip does not say which package index it uses by default. Set PIP_INDEX_URL."
        )
    return found[1]


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceUnreachableError(
            f"pip, which knows where packages come from, does not run ({reason}). "
            f"Install it: {sys.executable} -m ensurepip"
        )
    return done.stdout


def _as_folder(link: str) -> Path | None:
    if urlsplit(link).scheme == "file":
        link = urllib.request.url2pathname(urlsplit(link).path)
    path = Path(link).expanduser()
    return path if path.is_dir() else None
