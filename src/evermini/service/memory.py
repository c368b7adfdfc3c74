"""How much memory keys and values get."""

from __future__ import annotations

import logging

import torch

from evermini.config import Settings
from evermini.engine.kv import blocks_for
from evermini.errors import ConfigError
from evermini.models.batch import BLOCK_SIZE, KVCache, Model
from evermini.service.machine import memory

log = logging.getLogger(__name__)

AUTO_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""Share of the free memory that ``auto`` takes; a CPU's memory is shared with everything else on the machine."""

AUTO_LIMIT = 2 * 1024**3
"""Bytes beyond which ``auto`` does not go on a CPU, unless one native window needs more."""

MOST_SHARE = 0.8
"""Share of the free memory that is never exceeded, even for one whole window."""

MIN_TOKENS = 512


def kv_blocks(model: Model, settings: Settings) -> int:
    """Return the number of blocks that ``kv_memory`` buys.

    ``auto`` takes a share of the free memory, at least one native window where that fits, and never more than
    ``max_num_seqs`` whole windows could use.

    Raises:
        ConfigError: It is too little to be of use, or more than is free.
    """
    probe = model.new_kv_cache(1)
    device = probe.k[0].device
    block_bytes = KVCache.bytes_per_block(model.config, probe.dtype)
    free = _free_bytes(device)
    window = blocks_for(model.config.max_position)
    if settings.kv_memory == "auto":
        shared = free * AUTO_SHARE[device.type]
        if device.type == "cpu":
            shared = min(shared, AUTO_LIMIT)
        wanted = min(max(int(shared) // block_bytes, window), window * settings.max_num_seqs)
        num_blocks = min(wanted, int(free * MOST_SHARE) // block_bytes)
    else:
        if settings.kv_memory > free:
            raise ConfigError(
                f"kv_memory is {settings.kv_memory / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free. Lower it, or "
                'set "auto".',
                param="kv_memory",
            )
        num_blocks = settings.kv_memory // block_bytes
    least = min(MIN_TOKENS, model.config.max_position)
    if num_blocks < blocks_for(least):
        raise ConfigError(
            f"Memory for keys and values would be {num_blocks * block_bytes / 1e6:.1f} MB, room for fewer than {least} "
            f"tokens. Free some memory ({free / 1e9:.2f} GB are free), raise kv_memory, or choose a "
            "smaller model.",
            param="kv_memory",
        )
    if num_blocks < window:
        log.warning(
            "Keys and values get %.2f GB: prompts of up to %d tokens fit, less than the model's window of %d.",
            num_blocks * block_bytes / 1e9,
            num_blocks * BLOCK_SIZE,
            model.config.max_position,
        )
    return num_blocks


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return memory().available
