"""Files to documents: formats, ignore files (against git itself), folders, globs, and what is said of the rest."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import time
import zipfile
import zlib
from pathlib import Path

import pytest

from evermini.documents import Limits, Skipped, collect, pdf, read_document
from evermini.documents.sizes import largest_folders
from evermini.documents.walk import walk
from evermini.errors import DocumentError, InvalidRequestError
from tests.pdf_files import make_pdf


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*names: str, text: str = "text") -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} of {name}\n")


def names(*arguments: str, **options) -> list[str]:
    return [document.name for document in collect(arguments, **options).documents]


# Formats


@pytest.mark.parametrize(
    "data",
    [b"Gr\xc3\xbc\xc3\x9fe\n\n", b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe", "Grüße \n".encode("utf-16")],
)
def test_text_in_utf8_and_utf16(data):
    assert read_document(data, "a.txt").text == "Grüße"


def test_leading_space_stays_so_that_line_numbers_hold():
    assert read_document(b"\n\n  x\r\ny\n\n", "a").text == "\n\n  x\r\ny"


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "image", "x is an image"),
        (b"\x7fELF\0\0", "binary", "x is a binary file"),
        (b"caf\xe9", "not UTF-8 text", "x is not UTF-8 text (byte 3)"),
        (b"%PDF-1.7\ngarbage", "damaged PDF", "x is a damaged PDF"),
        (make_pdf(["", ""]), "PDF without text", "x has no text on any of its 2 pages"),
    ],
)
def test_what_is_no_text_says_what_it_is(data, reason, message):
    with pytest.raises(DocumentError) as caught:
        read_document(data, "x")
    assert caught.value.reason == reason
    assert message in str(caught.value)


def test_a_text_about_pdfs_is_a_text():
    assert read_document(b'HEADER = "%PDF-"\n', "a.py").text == 'HEADER = "%PDF-"'


def test_pdf_pages_are_marked_and_scans_named():
    document = read_document(make_pdf(["First page here.", "", "The third."]), "report.pdf")
    assert document.text == (
        "[page 1]\nFirst page here.\n\n[page 2]\n(This page has no text. It may be a scan.)\n\n"
        "[page 3]\nThe third."
    )
    assert (document.num_pages, document.blank_pages) == (3, (2,))


# Folders


def test_a_folder_in_the_order_of_its_names_and_as_it_was_named(tmp_path):
    write("src/b.py", "src/a/z.py", "src/a.py", "src/c/d/e.txt", "other/x.txt")
    expected = ["src/a/z.py", "src/a.py", "src/b.py", "src/c/d/e.txt"]
    assert names("src") == names("./src/") == expected
    assert names(str(tmp_path / "src")) == [str(tmp_path / name) for name in expected]
    assert names(".") == ["other/x.txt", *expected]
    os.chdir("other")
    assert names("../src") == [f"../{name}" for name in expected]


def test_each_file_once_in_the_order_named():
    write("a.py", "b.py", "c.py")
    assert names("b.py", ".", "a.py", "./b.py") == ["b.py", "a.py", "c.py"]
    assert names("b.py", "b*.py") == ["b.py"]


def test_symbolic_links_are_not_followed_in_folders_but_when_named():
    write("real/a.py")
    os.symlink("..", "real/loop")
    os.symlink("a.py", "real/b.py")
    os.symlink("real", "link")
    found = collect(["real"])
    assert [document.name for document in found.documents] == ["real/a.py"]
    assert set(found.skipped) == {
        Skipped("real/loop", "symbolic link"),
        Skipped("real/b.py", "symbolic link"),
    }
    assert names("link") == ["link/a.py"]


def test_what_cannot_be_read_in_a_folder_is_skipped_with_its_reason():
    write("ok.txt")
    Path("empty.py").write_text(" \n")
    Path("logo.png").write_bytes(b"\x89PNG\0")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("huge.txt").write_text("x" * 3001)
    Path("huge.bin").write_bytes(b"\0" * 3001)
    Path("scan.pdf").write_bytes(make_pdf([""]))
    found = collect(["."], limits=Limits(max_file_bytes=3000))
    assert [document.name for document in found.documents] == ["ok.txt"]
    assert {item.name: item.reason for item in found.skipped} == {
        "empty.py": "empty",
        "logo.png": "binary",
        "latin.txt": "not UTF-8 text",
        "huge.txt": "over 0.0 MB",
        "huge.bin": "binary",
        "scan.pdf": "PDF without text",
    }
    assert names("huge.txt", limits=Limits(max_file_bytes=3000)) == ["huge.txt"]


def test_a_named_file_that_is_empty_is_skipped_and_an_error_alone():
    write("ok.txt")
    Path("empty.py").write_text(" \n")
    assert collect(["ok.txt", "empty.py"]).skipped == (Skipped("empty.py", "empty"),)
    with pytest.raises(InvalidRequestError, match=r"No file to read in empty\.py: 1 empty"):
        collect(["empty.py"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("absent.txt", "absent.txt cannot be read: No such file"),
        ("absent/*.py", "absent cannot be listed: No such file"),
        ("*.rs", r"No file to read in \*.rs: nothing is there"),
        ("bin", "No file to read in bin: 1 binary"),
        ("-", "Nothing is piped in"),
    ],
)
def test_naming_nothing_readable_is_an_error(argument, message):
    Path("bin").mkdir()
    Path("bin/a").write_bytes(b"\0")
    with pytest.raises(InvalidRequestError, match=message):
        collect([argument])


def test_too_much_names_the_largest_folders():
    write("code/vendor/big/one.js", "code/vendor/big/two.js", text="x" * 4000)
    write("code/src/a.py", "code/b.py", text="x" * 500)
    with pytest.raises(InvalidRequestError) as caught:
        collect(["code"], limits=Limits(max_total_bytes=5000))
    message = str(caught.value)
    assert "4 files" in message
    assert "Largest: code/vendor/big/two.js (" in message
    assert "--exclude" in message


def test_largest_folders_are_apart_and_opened_while_they_hold_most():
    sizes = {"r/a/x/1": 50, "r/a/x/2": 1, "r/a/y/1": 20, "r/b/1": 20, "r/b/2": 9}
    assert largest_folders(sizes, 3) == [("r/a/x/1", 50), ("r/b/", 29), ("r/a/y/", 20)]


# Globs


def test_globs():
    write("src/a.py", "src/b.txt", "src/deep/er/c.py", "d.py", "src/.hidden.py", "[x].py")
    assert names("src/*.py") == ["src/a.py"]
    assert names("**/*.py") == ["[x].py", "d.py", "src/a.py", "src/deep/er/c.py"]
    assert names("src/**/*.py") == ["src/a.py", "src/deep/er/c.py"]
    assert names("src/d*") == ["src/deep/er/c.py"]
    assert names("s?c/[ab].*") == ["src/a.py", "src/b.txt"]
    assert names("[x].py") == ["[x].py"]
    assert names(str(Path.cwd() / "*.py"))[-1] == str(Path.cwd() / "d.py")
    Path(".gitignore").write_text("deep/\n")
    assert names("src/**/*.py") == names("src/**/*.py", exclude=["b"])
    Path(".git").mkdir()
    assert names("src/**/*.py") == ["src/a.py"]


# What is ignored


def test_ignore_files_of_every_level_and_of_the_repository_above():
    Path("repo/.git/info").mkdir(parents=True)
    write(
        *(
            f"repo/{name}"
            for name in ("a.log", "a.py", "keep.log", "sub/b.log", "sub/c.tmp", "sub/d.py")
        )
    )
    write("repo/sub/out/x.py", "repo/sub/local.txt", "repo/.hidden/x.py", "repo/build/x.py")
    Path("repo/.gitignore").write_text("*.log\n!/keep.log\nbuild/\n")
    Path("repo/sub/.gitignore").write_text("!b.log\nout\n")
    Path("repo/sub/.ignore").write_text("*.tmp\n!local.txt\n")
    Path("repo/.git/info/exclude").write_text("local.txt\n")
    below = ["sub/b.log", "sub/d.py", "sub/local.txt"]
    assert names("repo") == [f"repo/{name}" for name in ["a.py", "keep.log", *below]]
    os.chdir("repo/sub")
    assert names(".") == ["b.log", "d.py", "local.txt"], "the patterns above hold below, too"
    assert names("../build") == ["../build/x.py"], "what is named itself is taken"
    assert names("../a.log", "../.hidden") == ["../a.log", "../.hidden/x.py"]
    assert names(".", exclude=["*.log", "/local.txt"]) == ["d.py"]


PATTERNS = [
    "*.log", "!a.log", "/a", "a/", "b", "!b", "a/b", "**/c", "c/**", "/*/b", "!c/", "a/*", "!a/b", "*", "!*/",
    "!*.txt", "a.*", "[ab].txt", "?", "\\!x", "# comment", "", " b ", "a/**/c", "!/b/a.log", "b/*.txt",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_ignore_files_mean_what_git_says(seed, tmp_path):
    """Random trees and patterns, against ``git ls-files``."""
    choose = random.Random(seed)
    repo = tmp_path / "repo"
    repo.mkdir()
    git = ["git", "-C", str(repo), "-c", "core.excludesFile="]
    if subprocess.run([*git, "init", "-q"], check=False).returncode:
        pytest.skip("git does not work here")
    folders = ["", "a/", "b/", "c/", "a/b/", "a/c/", "b/c/", "c/a/b/"]
    for folder in folders:
        for name in ("a.log", "b.txt", "x", "c.py"):
            write(f"repo/{folder}{name}")
        if choose.random() < 0.6:
            lines = choose.choices(PATTERNS, k=choose.randint(1, 5))
            (repo / folder / ".gitignore").write_text("\n".join(lines) + "\n")
    told = subprocess.run(
        [*git, "ls-files", "-z", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    )
    expected = {
        name for name in told.stdout.split("\0") if name and not name.endswith(".gitignore")
    }
    assert {found.path.relative_to(repo).as_posix() for found in walk(repo)} == expected


class TestBombs:
    def test_archives_are_not_opened(self):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.txt", b"a" * 10_000_000)
        for data in (packed.getvalue(), gzip.compress(b"a" * 10_000_000)):
            with pytest.raises(DocumentError, match=r"binary file|not UTF-8|archive"):
                read_document(data, "bomb")

    @pytest.mark.parametrize("limit", ["MAX_SECONDS", "MAX_MEMORY", "MAX_CHARACTERS"])
    def test_a_pdf_that_grows_without_end(self, monkeypatch, limit):
        value = {"MAX_SECONDS": 1, "MAX_MEMORY": 250_000_000, "MAX_CHARACTERS": 10_000}[limit]
        monkeypatch.setattr(pdf, limit, value)
        raw = b"BT /F1 8 Tf " + b"(aaaaaaaaaaaaaaaaaaaaaaaa) Tj 0 0 Td " * 3_000_000 + b"ET"
        packed = zlib.compress(zlib.compress(raw, 9), 9)
        if limit == "MAX_CHARACTERS":
            bomb = make_pdf(["a" * 60] * 300)
        else:
            bomb = make_pdf(["MARK"])
            start, end = bomb.index(b"<< /Length 4"), bomb.index(b"endstream")
            head = b"<< /Filter [/FlateDecode /FlateDecode] /Length %d >>\nstream\n" % len(packed)
            bomb = bomb[:start] + head + packed + b"\n" + bomb[end:]
        assert len(bomb) < 100_000
        began = time.monotonic()
        with pytest.raises(DocumentError) as refused:
            read_document(bomb, "bomb.pdf")
        assert refused.value.reason in (
            "PDF too costly to read",
            "PDF with too much text",
            "damaged PDF",
        )
        assert time.monotonic() - began < 60
