"""Where a model's computed prompts are kept on the disk, and what they depend on beside the prompts."""

from __future__ import annotations

import hashlib
import logging
from importlib import metadata
from pathlib import Path

from evermini.config import Settings
from evermini.engine.prompt_disk import PromptDisk
from evermini.engine.prompt_store import FOLDER, PromptStore, list_records
from evermini.models.batch import BLOCK_SIZE, KVCache, Model
from evermini.models.load import numerics

log = logging.getLogger(__name__)

_SOURCES = (
    "engine/kv.py",
    "engine/rows.py",
    "service/image_tokens.py",
    "service/sight.py",
    "vision/*.py",
)
"""What names blocks, and makes images into values. A change without effect costs one computation of each prompt; one
that went unnoticed would give wrong answers."""

_LIBRARIES = ("numpy", "pillow", "transformers")
"""What images pass through."""


def open_prompts(model: Model, settings: Settings, weights: str) -> PromptDisk | None:
    """Return a model's computed prompts on the disk; ``None``: none are kept.

    Only for models on a CPU: there reading is some hundred times as quick as computing, which a GPU does about as fast.

    Args:
        model: The model.
        settings: Home folder, cap, precision.
        weights: Hash of its checkpoint.
    """
    probe = model.new_kv_cache(1)
    if settings.prompt_disk == 0 or probe.k[0].device.type != "cpu":
        return None
    record_bytes = KVCache.bytes_per_block(model.config, probe.dtype)
    identity = _identity(model, probe, settings, weights)
    try:
        store = PromptStore(settings.home, identity, record_bytes, settings.prompt_disk)
    except OSError as error:
        log.warning(
            "Computed prompts are not kept on the disk: %s cannot be used (%s). The server goes on without it. Correct "
            "that, or set prompt_disk to 0.",
            settings.home / FOLDER,
            error,
        )
        return None
    return PromptDisk(store)


def prompts_on_disk(home: Path) -> tuple[int, int]:
    """Return how many blocks of computed prompts a home folder holds, and their bytes."""
    sizes = [record.num_bytes for record in list_records(home / FOLDER)]
    return len(sizes), sum(sizes)


def _identity(model: Model, kv: KVCache, settings: Settings, weights: str) -> str:
    """Return a name for all that decides a block's values, except what its key covers."""
    digest = hashlib.sha256()
    parts = (
        weights,
        type(model).__name__,
        settings.precision,
        *(kv.dtype, kv.k[0].shape, kv.v[0].shape, len(kv.k), BLOCK_SIZE),
        numerics(),
        *(_version(name) for name in _LIBRARIES),
    )
    digest.update("\n".join(map(str, parts)).encode())
    package = Path(__file__).parents[1]
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(f"\n{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # of an extra
        return ""
