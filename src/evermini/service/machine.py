"""How much memory this machine, or the container it runs in, has. Free of torch: `evermini doctor` asks, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes; a container's limit counts as the total where it is lower than the machine's."""

    total: int
    available: int


def memory(cgroup: Path = CGROUP) -> Memory:
    """Return total and available memory, a container's limit included (cgroup v2).

    Args:
        cgroup: Where the container's limit stands.
    """
    machine = psutil.virtual_memory()
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text()) - _file_cache(cgroup)
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return Memory(machine.total, machine.available)
    return Memory(min(machine.total, limit), min(machine.available, max(limit - used, 0)))


def _file_cache(cgroup: Path) -> int:
    """Return the bytes of cached files, which count as used and are given back when memory is asked for."""
    counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
