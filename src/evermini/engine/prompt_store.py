"""Computed prompts on the disk: the keys and values of one KV block per file, named by the block's key.

    HOME/prompts/salt                             32 random bytes, this home's alone
    HOME/prompts/<identity>/<2 hex>/<38 hex>.kv   one block; written at once, atomically; mode 0600

    .kv   | magic (8 bytes) | blake2b of name and body, keyed with the salt (32) | body, of `KVCache.copy_out` |

A block's key (`evermini.engine.kv`) covers its tokens, all before them, the adapter and the images; the identity covers
whatever else the values depend on. So a file is right for ever or never found again, and nothing has to be revoked:
what nobody asks for any more is the least recently used (by the time of modification), and goes first when the cap is
reached.

The name is the key's hash with the salt: who reads file names cannot test which prompts were sent here. The
checksum is keyed with it, too: a file that this home did not write is as good as a damaged one, and is dropped.

Nothing is flushed to the disk: after a power cut, a file that did not get there in full fails its checksum and is
computed again. Several processes may share a home: files are replaced whole, and a missing one is merely not found.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from pathlib import Path

from filelock import FileLock

from evermini.engine.kv import BlockKey
from evermini.errors import is_disk_full

log = logging.getLogger(__name__)

FOLDER = "prompts"
"""Under the home folder."""

RESERVE = 1024**3
"""Bytes of the disk that stay free: a cache must not take the room that the database needs."""

_MAGIC = b"EVRKVB1\0"
_DIGEST_BYTES = 32
_HEADER_BYTES = len(_MAGIC) + _DIGEST_BYTES
_SALT_BYTES = 32
_SUFFIX = ".kv"
_PAUSE_SECONDS = 60.0
_COUNT_AGAIN = 16
"""What other processes write is counted again whenever this one has written this part of the cap."""
_FORGOTTEN_SECONDS = 3600.0
"""Age at which a file that was never renamed is one that a killed process left behind."""


class PromptStore:
    """The records of one model, and the cap on what all models' take together. One thread may write at a time.

    Args:
        home: Evermini's home folder.
        identity: Whatever the values depend on beside the blocks' keys, as a name for a folder.
        record_bytes: Bytes of one block's keys and values.
        max_bytes: Cap on the files of all identities together.

    Raises:
        OSError: The folder cannot be made or read.
    """

    def __init__(self, home: Path, identity: str, record_bytes: int, max_bytes: int) -> None:
        self.root = home / FOLDER
        self.folder = self.root / identity
        self.record_bytes = record_bytes
        self.max_bytes = max_bytes
        self.num_damaged = 0
        self._salt = _salt_of(self.root)
        self._file_bytes = _HEADER_BYTES + record_bytes
        self._num_bytes = 0
        self._num_uncounted = max_bytes  # written since `count`; so the first write counts
        self._paused_until = 0.0
        self._warned: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """What all records take, as last counted and with what was written since."""
        return self._num_bytes

    @property
    def is_paused(self) -> bool:
        """Nothing is written for now, because it did not work."""
        return time.monotonic() < self._paused_until

    def count(self) -> list[Record]:
        """Look at all records, of all models, and keep in mind what they take."""
        records = list(list_records(self.root))
        self._num_bytes = sum(record.num_bytes for record in records)
        self._num_uncounted = 0
        return records

    def has(self, key: BlockKey) -> bool:
        """Return whether there is a record, damaged or not."""
        return os.path.exists(self._path(key))

    def read(self, key: BlockKey, into: memoryview) -> bool:
        """Read a block's keys and values; what is damaged is named in the log and deleted.

        Args:
            key: The block's.
            into: ``record_bytes`` of room.

        Returns:
            Whether it was there and is what was written.
        """
        path = self._path(key)
        header = bytearray(_HEADER_BYTES)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                is_whole = (
                    size == self._file_bytes
                    and file.readinto(header) == len(header)
                    and file.readinto(into) == len(into)
                )
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn(
                "read",
                "Computed prompts cannot be read from %s (%s); they are computed again.",
                path,
                error,
            )
            return False
        if is_whole and compare_digest(bytes(header), self._header(path, into)):
            return True
        self.num_damaged += 1
        log.warning(
            "%s is damaged, or was not written here: it is deleted, and its tokens are computed again.",
            path,
        )
        with suppress(OSError):
            path.unlink()
        return False

    def write(self, key: BlockKey, body: memoryview) -> bool:
        """Keep a block's keys and values, unless they are there; others are deleted to make room.

        Where that does not work (the disk is full or read-only), the log says so once and nothing is written for a
        while.

        Args:
            key: The block's.
            body: ``record_bytes`` of keys and values.

        Returns:
            Whether it is there now.
        """
        if self.is_paused:
            return False
        path = self._path(key)
        try:
            if self.touch(key):
                return True
            if not self._make_room():
                return False
            self._replace(path, self._header(path, body), body)
        except OSError as error:
            self._pause(error)
            return False
        self._num_bytes += self._file_bytes
        self._num_uncounted += self._file_bytes
        return True

    def touch(self, key: BlockKey) -> bool:
        """Mark a record as used now; false if it is not there (any more)."""
        now = (
            time.time_ns()
        )  # finer than the system's own clock for files, so that the order of calls shows
        try:
            os.utime(self._path(key), ns=(now, now))
        except FileNotFoundError:
            return False
        except OSError as error:  # it is there, and stays as it is
            self._pause(error)
        return True

    def _name(self, key: BlockKey) -> str:
        return blake2b(key, key=self._salt, digest_size=20, person=b"evermini-name").hexdigest()

    def _path(self, key: BlockKey) -> Path:
        name = self._name(key)
        return self.folder / name[:2] / (name[2:] + _SUFFIX)

    def _header(self, path: Path, body: memoryview) -> bytes:
        digest = blake2b(key=self._salt, digest_size=_DIGEST_BYTES, person=b"evermini-body")
        digest.update(f"{path.parent.parent.name}/{path.parent.name}/{path.name}\0".encode())
        digest.update(body)
        return _MAGIC + digest.digest()

    def _replace(self, path: Path, header: bytes, body: memoryview) -> None:
        """Write a file that appears under its name at once and in full."""
        temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _write_all(descriptor, memoryview(header))
                _write_all(descriptor, body)
            finally:
                os.close(descriptor)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _make_room(self) -> bool:
        """Delete the least recently used records until one more fits under the cap and on the disk."""
        if self._num_uncounted >= self.max_bytes // _COUNT_AGAIN:
            self.count()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (excess := self._excess()) > 0:
            # Some more than needed: looking at all files for each block would be slow.
            self._evict(excess + self.max_bytes // _COUNT_AGAIN)
            if self._excess() > 0:
                self._pause(None)
                return False
        return True

    def _excess(self) -> int:
        """Return by how much one more record would be too much."""
        over_cap = self._num_bytes + self._file_bytes - self.max_bytes
        over_disk = RESERVE + self._file_bytes - shutil.disk_usage(self.root).free
        return max(over_cap, over_disk)

    def _evict(self, num_bytes: int) -> None:
        for record in sorted(self.count(), key=lambda record: record.last_used):
            if num_bytes <= 0:
                break
            record.path.unlink(missing_ok=True)
            num_bytes -= record.num_bytes
            self._num_bytes -= record.num_bytes

    def _pause(self, error: OSError | None) -> None:
        """Stop writing for a while, and say why, once."""
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if error is None or is_disk_full(error):
            self._warn(
                "full",
                "Computed prompts are not kept on the disk: %s has no room for them (they may take %.1f GB, and leave "
                "%.1f GB of the disk free). The server goes on without it. Make room, or set prompt_disk to 0.",
                self.root,
                self.max_bytes / 1e9,
                RESERVE / 1e9,
            )
        else:
            self._warn(
                "write",
                "Computed prompts are not kept on the disk: %s cannot be written (%s). The server goes on without "
                "it. Correct that, or set prompt_disk to 0.",
                self.root,
                error,
            )

    def _warn(self, what: str, message: str, *values: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(message, *values)


@dataclass(frozen=True)
class Record:
    """One file: where it is, its size, and when it was last used (nanoseconds since 1970)."""

    path: Path
    num_bytes: int
    last_used: int


def list_records(root: Path) -> Iterator[Record]:
    """Yield the records of all models in ``HOME/prompts``; what killed processes left behind is deleted."""
    forgotten = time.time_ns() - int(_FORGOTTEN_SECONDS * 1e9)
    for identity in _entries(root):
        for group in _entries(identity):
            for path in _entries(group):
                with suppress(OSError):  # another process has deleted it
                    stat = os.stat(path)
                    if path.endswith(_SUFFIX):
                        yield Record(Path(path), stat.st_size, stat.st_mtime_ns)
                    elif stat.st_mtime_ns < forgotten:
                        os.unlink(path)


def _entries(folder: str | Path) -> list[str]:
    """Return the paths in a folder; none, if it is no folder (any more)."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [entry.path for entry in entries]
    return []


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _salt_of(root: Path) -> bytes:
    """Return the home's salt, made when it is first asked for; with another one nothing is found any more."""
    path = root / "salt"
    if (salt := _read_salt(path)) is not None:
        return salt
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(root / "salt.lock"):
        if (salt := _read_salt(path)) is None:
            salt = secrets.token_bytes(_SALT_BYTES)
            temporary = path.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(salt)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    return salt


def _read_salt(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        salt = path.read_bytes()
        if len(salt) == _SALT_BYTES:
            return salt
    return None
