"""Weights on disk, addressed by content.

    HOME/models/<sha256>/<filename>             the weights; only ever a verified file, moved here atomically
    HOME/models/<sha256>/<filename>.verified    stamp: size and mtime of the file when its sha256 was last checked
    HOME/models/<sha256>/partial/               an unfinished download, kept so that the next one resumes
    HOME/models/.locks/<sha256>.lock            held while one process downloads or deletes

Invariant: a file whose size and mtime equal its stamp has the hash it is filed under. Anything else is hashed again
before it is used, so a truncated, replaced or half-copied file is noticed; hashing happens once, not at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from evermini.models.catalogue import PinnedFile

logger = logging.getLogger(__name__)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Return when the file's content is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that ``path`` is, or will be, on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


PACKED = "packed"
"""Folder, under the home folder, of weights quantised once (`evermini.models.packed`)."""


class ModelStore:
    """The weights kept under one home folder.

    Args:
        home: The folder; created on first write.
    """

    def __init__(self, home: Path) -> None:
        self.root = home / "models"
        self.packed = home / PACKED

    def folder(self, pinned: PinnedFile) -> Path:
        """Return the folder that everything of this file lives in."""
        return self.root / pinned.sha256

    def path(self, pinned: PinnedFile) -> Path:
        """Return where the weights are, or would be."""
        return self.folder(pinned) / pinned.filename

    def partial(self, pinned: PinnedFile) -> Path:
        """Return the folder of unfinished downloads."""
        return self.folder(pinned) / "partial"

    def is_trusted(self, pinned: PinnedFile) -> bool:
        """Return whether the file is there and unchanged since its hash was checked. Reads no content."""
        try:
            return self._stamp(pinned).read_text() == _describe(self.path(pinned))
        except OSError:
            return False

    def is_verified(self, pinned: PinnedFile) -> bool:
        """Return whether the file is there and has the right hash, reading it where the stamp does not vouch for it."""
        if self.is_trusted(pinned):
            return True
        path = self.path(pinned)
        if not path.is_file() or path.stat().st_size != pinned.size:
            return False
        before = _describe(path)
        if sha256_file(path) != pinned.sha256:
            return False
        self._write_stamp(pinned, before)
        return True

    def adopt(self, pinned: PinnedFile, file: Path) -> Path:
        """Move a file whose hash was just checked into place, atomically, and drop what it was made from."""
        path = self.path(pinned)
        sync_file(file)
        file.replace(path)
        _sync_folder(path.parent)
        self._write_stamp(pinned, _describe(path))
        shutil.rmtree(self.partial(pinned), ignore_errors=True)
        return path

    def partial_bytes(self, pinned: PinnedFile) -> int:
        """Return the bytes of an unfinished download."""
        return sum(size for _, size in _files(self.partial(pinned)))

    def remove(self, pinned: PinnedFile) -> int:
        """Delete the weights, what was quantised from them and any unfinished download; return the bytes freed."""
        with self.lock(pinned):
            freed = sum(size for _, size in _files(self.folder(pinned)))
            if self.folder(pinned).exists():
                shutil.rmtree(self.folder(pinned))
            for path in self.packed.glob(f"{pinned.sha256}-*"):
                freed += path.stat().st_size
                path.unlink()
            return freed

    @contextlib.contextmanager
    def lock(self, pinned: PinnedFile, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold this file's lock across processes and threads; a process that dies releases it.

        Args:
            pinned: Whose lock.
            on_wait: Called once if somebody else holds it.
        """
        from filelock import FileLock, Timeout

        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{pinned.sha256}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _stamp(self, pinned: PinnedFile) -> Path:
        return self.folder(pinned) / f"{pinned.filename}.verified"

    def _write_stamp(self, pinned: PinnedFile, description: str) -> None:
        stamp = self._stamp(pinned)
        temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}")
        try:
            temporary.write_text(description)
            temporary.replace(stamp)
        except OSError as error:  # a read-only cache works; it is only hashed at every start
            logger.warning("Cannot write %s (%s): the file is hashed each time.", stamp, error)


def _describe(path: Path) -> str:
    status = path.stat()
    return json.dumps({"size": status.st_size, "mtime_ns": status.st_mtime_ns})


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.stat().st_size


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; Windows neither needs nor allows it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
