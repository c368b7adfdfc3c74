"""Bytes of files, outside the database: a local folder by default, object storage such as S3 by URL (fsspec).

A blob is written once, under a new name, and never changed. It counts from the moment that a row of the database names
it, so a blob that was cut short by a crash is no file's: it is an orphan, which `BlobStore.orphans` finds.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self

import fsspec
from fsspec.implementations.local import LocalFileSystem

from evermini.config import Settings
from evermini.errors import ConfigError, InsufficientStorageError, StorageError, is_disk_full

FOLDER = "blobs"
READ_BYTES = 1 << 20
"""Bytes per read."""


class BlobWriter:
    """One blob on its way to the store; used by one thread at a time.

    Attributes:
        name: What a row calls it.
        num_bytes: Written so far.
        is_settled: Somebody has begun to store the row that names it.
    """

    def __init__(self, store: BlobStore, name: str, file: IO[bytes]) -> None:
        self.name = name
        self.num_bytes = 0
        self.is_settled = False
        self._store = store
        self._file = file

    def write(self, data: bytes) -> None:
        """Append ``data``.

        Raises:
            StorageError: The store cannot take it.
        """
        with _translated():
            self._file.write(data)
        self.num_bytes += len(data)

    def close(self) -> None:
        """Make the blob complete: it survives a power cut when this returns.

        Raises:
            StorageError: The store cannot take it.
        """
        with _translated():
            self._file.flush()
            if self._store.is_local:
                os.fsync(self._file.fileno())
            self._file.close()

    def discard(self) -> None:
        """Drop what was written."""
        with suppress(Exception):  # what cannot be dropped now is an orphan, for later
            discard = getattr(self._file, "discard", None)
            if discard is not None and not self._store.is_local:
                discard()
                self._file.closed = True  # type: ignore[misc]  # else its end would upload it
            else:
                self._file.close()  # on a full disk it fails again
        with suppress(StorageError):
            self._store.delete([self.name])


class BlobStore:
    """A folder of blobs, somewhere. Safe to use from several threads and processes.

    Args:
        url: fsspec's URL, such as ``file:///var/lib/evermini/blobs`` or ``s3://bucket/prefix``.

    Raises:
        ConfigError: There is no such kind of storage, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"blob_url cannot be used: {error}. Give a folder, file:///PATH, or s3://BUCKET/PREFIX (which needs "
                "`pip install 'evermini[s3]'`).",
                param="blob_url",
            ) from error
        self.is_local = isinstance(self._files, LocalFileSystem)

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Return the store that the settings name.

        Raises:
            ConfigError: ``blob_url`` cannot be used.
        """
        return cls(settings.blob_url or (settings.home.absolute() / FOLDER).as_uri())

    def check(self) -> None:
        """Write, read and delete a blob.

        Raises:
            StorageError: That does not work.
        """
        writer = self.create()
        try:
            writer.write(b"evermini")
            writer.close()
            if b"".join(self.read(writer.name)) != b"evermini":
                raise StorageError(f"{self._root} does not return what was written to it.")
        finally:
            writer.discard()

    def create(self) -> BlobWriter:
        """Begin a new blob.

        Raises:
            StorageError: The store cannot be written.
        """
        name = uuid.uuid4().hex
        path = self._path(name)
        with _translated():
            if self.is_local:
                folder = Path(path).parent
                folder.mkdir(parents=True, exist_ok=True)
            return BlobWriter(self, name, self._files.open(path, "wb"))

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to before ``end``.

        Raises:
            StorageError: The blob cannot be read.
        """
        with _translated(), self._files.open(self._path(name), "rb") as file:
            file.seek(start)
            left = None if end is None else end - start
            while left is None or left > 0:
                data = file.read(READ_BYTES if left is None else min(READ_BYTES, left))
                if not data:
                    if left is not None:
                        raise StorageError(f"The stored bytes {name} are cut short.")
                    return
                left = None if left is None else left - len(data)
                yield data

    def delete(self, names: Collection[str]) -> None:
        """Delete blobs; those that do not exist are fine.

        Raises:
            StorageError: The store cannot be written.
        """
        with _translated():
            for name in names:
                with suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

    def orphans(self, is_used: Callable[[Collection[str]], set[str]], grace: float) -> list[str]:
        """Return the blobs that no row of the database names.

        Args:
            is_used: Returns which of some names are used.
            grace: Seconds that a blob may wait for its row.
        """
        before = time.time() - grace
        found: list[str] = []
        with _translated():
            if not self._files.exists(self._root):
                return found
            listed: dict[str, dict[str, Any]] = self._files.find(self._root, detail=True)
        old = {
            path.rpartition("/")[2]: path
            for path, info in listed.items()
            if _changed(info) <= before
        }
        names = list(old)
        for first in range(0, len(names), 500):
            some = names[first : first + 500]
            used = is_used(some)
            found += [name for name in some if name not in used]
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}"


def _changed(info: dict[str, Any]) -> float:
    if "mtime" in info:
        return float(info["mtime"])
    changed: datetime = info["LastModified"]
    return changed.timestamp()


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the storage's errors into ours."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise InsufficientStorageError(
                "The server's disk is full, so the file was not stored. Its operator has to make room; then send it "
                "again."
            ) from error
        raise StorageError(f"The storage of files cannot be used at the moment: {error}") from error
    except StorageError:
        raise
    except Exception as error:  # botocore has a tree of its own
        if type(error).__module__.startswith(("botocore", "aiobotocore", "s3fs", "aiohttp")):
            raise StorageError(
                f"The storage of files cannot be used at the moment: {error}"
            ) from error
        raise
