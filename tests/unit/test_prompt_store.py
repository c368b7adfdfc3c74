"""Records of computed prompts on the disk: whole or not there, under a cap, and nobody else's."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evermini.engine import prompt_store
from evermini.engine.prompt_store import FOLDER, PromptStore, list_records

SIZE = 1000
FILE_SIZE = SIZE + 40


def key_of(number: int) -> bytes:
    return number.to_bytes(32)


def body_of(number: int) -> memoryview:
    return memoryview(bytes([number % 251]) * SIZE)


def open_store(home: Path, identity: str = "model", max_bytes: int = 1 << 20) -> PromptStore:
    return PromptStore(home, identity, SIZE, max_bytes)


def read(store: PromptStore, number: int) -> bytes | None:
    room = bytearray(SIZE)
    return bytes(room) if store.read(key_of(number), memoryview(room)) else None


def files(home: Path) -> list[Path]:
    return sorted((home / FOLDER).glob("*/*/*.kv"))


def test_what_was_written_is_read_by_the_next_process(tmp_path):
    store = open_store(tmp_path)
    assert read(store, 1) is None
    assert store.write(key_of(1), body_of(1))
    again = open_store(tmp_path)
    assert again.has(key_of(1))
    assert read(again, 1) == body_of(1)
    assert not again.has(key_of(2))
    assert again.num_damaged == 0


def test_another_model_finds_nothing(tmp_path):
    open_store(tmp_path).write(key_of(1), body_of(1))
    assert not open_store(tmp_path, "other").has(key_of(1))


@pytest.mark.parametrize("harm", ["flipped", "cut", "longer", "empty", "moved", "of another home"])
def test_a_damaged_record_is_named_deleted_and_not_used(tmp_path, caplog, harm):
    store = open_store(tmp_path / "home")
    store.write(key_of(1), body_of(1))
    (path,) = files(tmp_path / "home")
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[-1] ^= 1
    elif harm == "cut":
        del data[-100:]
    elif harm == "longer":
        data += b"x"
    elif harm == "empty":
        data.clear()
    elif harm == "moved":  # a whole record, but another block's
        store.write(key_of(2), body_of(2))
        (other,) = set(files(tmp_path / "home")) - {path}
        data = bytearray(other.read_bytes())
    else:
        stranger = open_store(tmp_path / "stranger")
        stranger.write(key_of(1), body_of(3))
        data = bytearray(files(tmp_path / "stranger")[0].read_bytes())
    path.write_bytes(data)

    assert read(store, 1) is None
    assert path.name in caplog.text
    assert store.num_damaged == 1
    assert not path.exists()
    assert store.write(key_of(1), body_of(1))
    assert read(store, 1) == body_of(1)


def test_only_the_owner_can_read_them_and_names_tell_nothing(tmp_path):
    for home in (tmp_path / "a", tmp_path / "b"):
        open_store(home).write(key_of(1), body_of(1))
    (one,), (other,) = files(tmp_path / "a"), files(tmp_path / "b")
    assert (
        one.name != other.name
    )  # so a name cannot be computed from a prompt without the home's salt
    salt = tmp_path / "a" / FOLDER / "salt"
    assert stat.S_IMODE(one.stat().st_mode) == stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a" / FOLDER).stat().st_mode) == 0o700


def test_the_least_recently_used_go_first_and_of_a_prompt_its_end(tmp_path):
    store = open_store(tmp_path, max_bytes=16 * FILE_SIZE)
    for index in range(8):
        store.write(key_of(index), body_of(index))
    for index in range(8):
        store.write(key_of(100 + index), body_of(index))
    assert len(files(tmp_path)) == 16
    for prompt in (100, 0):  # both are used again, and this one last
        for index in reversed(range(8)):
            assert store.touch(key_of(prompt + index))
    for number in (200, 201, 202):
        assert store.write(key_of(number), body_of(number))
        assert store.num_bytes <= store.max_bytes
        assert len(files(tmp_path)) <= 16
    assert all(store.has(key_of(index)) for index in range(8))
    left = [index for index in range(8) if store.has(key_of(100 + index))]
    assert left == list(range(len(left)))
    assert 0 < len(left) < 8


def test_the_cap_counts_what_other_models_and_processes_wrote(tmp_path):
    cap = 16 * FILE_SIZE
    one, other = (open_store(tmp_path, name, cap) for name in ("one", "other"))
    for number in range(40):
        store = one if number % 2 else other
        assert store.write(key_of(number), body_of(number))
        # Each counts again after a 16th of the cap of its own: here after every record.
        assert sum(path.stat().st_size for path in files(tmp_path)) <= cap
    assert one.has(key_of(39))
    assert other.has(key_of(38))
    assert not one.has(key_of(1))


def test_a_cap_below_one_record_keeps_nothing_and_says_so(tmp_path, caplog):
    store = open_store(tmp_path, max_bytes=SIZE)
    assert not store.write(key_of(1), body_of(1))
    assert "prompt_disk" in caplog.text
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "has no room"),
        (errno.EROFS, "cannot be written"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_disk_that_cannot_be_written_is_told_once_and_tried_again(
    tmp_path, caplog, monkeypatch, number, said
):
    store = open_store(tmp_path)
    store.write(key_of(1), body_of(1))

    def fail(descriptor: int, data: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(prompt_store.os, "write", fail)
        for _ in range(3):
            assert not store.write(key_of(2), body_of(2))
            assert store.is_paused
            store._paused_until = 0.0
    assert [said in record.message for record in caplog.records] == [True]
    assert caplog.records[0].levelno == logging.WARNING
    assert read(store, 1) == body_of(1)
    assert store.write(key_of(2), body_of(2))
    assert list((tmp_path / FOLDER).glob("*/*/*.tmp")) == []


def test_the_last_of_the_disk_is_left_to_others(tmp_path, caplog, monkeypatch):
    store = open_store(tmp_path)
    for number in range(8):
        store.write(key_of(number), body_of(number))
    free = SimpleNamespace(free=prompt_store.RESERVE + SIZE // 2)
    monkeypatch.setattr(prompt_store.shutil, "disk_usage", lambda path: free)
    assert not store.write(key_of(100), body_of(100))
    assert "has no room" in caplog.text
    assert files(tmp_path) == []  # it gave way as far as it could


def test_what_a_killed_process_left_behind_goes(tmp_path):
    store = open_store(tmp_path)
    store.write(key_of(1), body_of(1))
    (path,) = files(tmp_path)
    young, old = path.with_suffix(".1-2.tmp"), path.with_suffix(".3-4.tmp")
    for leftover in (young, old):
        leftover.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert [record.path for record in list_records(store.root)] == [path]
    assert young.exists()
    assert not old.exists()


def test_the_folder_may_be_deleted_under_a_running_server(tmp_path):
    store = open_store(tmp_path)
    store.write(key_of(1), body_of(1))
    shutil.rmtree(tmp_path / FOLDER)
    assert read(store, 1) is None
    assert store.write(key_of(2), body_of(2))
    assert read(store, 2) == body_of(2)


def test_processes_that_share_a_home_never_see_half_a_record(tmp_path):
    """Threads with a store each: to the disk they are processes."""
    numbers, found, failures = range(20), [0], []

    def work(seed: int) -> None:
        store = open_store(tmp_path, max_bytes=12 * FILE_SIZE)
        try:
            for turn in range(10):
                for number in numbers:
                    store.write(key_of(number), body_of(number))
                    body = read(store, (number * seed + turn) % 20)
                    found[0] += body is not None
            failures.extend([store.num_damaged] * bool(store.num_damaged))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert found[0] > 0
