"""What was read of images, on disk by their hash: the same image costs nothing the second time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class Cache:
    """Small JSON values by key; the least recently used go first. Several processes may share one.

    What cannot be written is not kept: a full disk costs time, never an answer.

    Args:
        folder: Where they are; made when something is kept.
        max_bytes: How much is kept, roughly.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._size: int | None = None
        self._counting = threading.Lock()

    def get(self, key: str) -> Any:
        """Return a value, or ``None``."""
        path = self._path(key)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            os.utime(path)
        except (OSError, ValueError):
            return None
        return value

    def put(self, key: str, value: Any) -> None:
        """Keep a value; readers see all of it or nothing."""
        path, data = self._path(key), json.dumps(value).encode()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except OSError:
                os.unlink(name)
                raise
            self._count(len(data))

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            if self._size is not None:
                self._size += num_bytes
            if self._size is not None and self._size <= self._max_bytes:
                return
            found = []
            for path in self._folder.glob("*/*.json"):
                with suppress(OSError):
                    stat = path.stat()
                    found.append((stat.st_mtime, stat.st_size, path))
            self._size = sum(size for _, size, _ in found)
            if self._size <= self._max_bytes:
                return
            for _, size, path in sorted(found):
                if self._size <= self._max_bytes * 3 // 4:
                    break
                with suppress(OSError):
                    path.unlink()
                    self._size -= size
