"""How a long text is cut into independent forward passes.

    tokens of a segment   |0 .......... sinks|      ...      |  window  |   chunk   |  ...
    one pass              [prefix | sinks ---------------------- window -- chunk]     positions 0, 1, 2, ...

Only the chunk's rows are kept. So each chunk depends on the text alone: passes can be repeated, resumed and done in
any order with the same result, cost is linear in the text, and no position reaches the model's native window.
The constant prefix takes the attention that models put on their first token, which else would make the first token of
every segment look important.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evermini.errors import ModelError


@dataclass(frozen=True)
class Windows:
    """Sizes in tokens.

    Attributes:
        prefix: Token ids before everything.
        sinks: First tokens of the segment that every chunk sees.
        window: Tokens before the chunk that it sees.
        chunk: Tokens whose keys one pass yields.
    """

    prefix: tuple[int, ...]
    sinks: int = 64
    window: int = 512
    chunk: int = 2048

    def fitted(self, max_position: int) -> Windows:
        """Return sizes at most as large that fit a native window.

        Raises:
            ModelError: Not even the smallest do.
        """
        sizes = self
        while sizes.longest > max_position:
            if sizes.chunk <= 32:
                raise ModelError(
                    f"A native window of {max_position} tokens is too small for recall. Use another index model."
                )
            sizes = Windows(sizes.prefix, sizes.sinks // 2, sizes.window // 2, sizes.chunk // 2)
        return sizes

    @property
    def longest(self) -> int:
        """Tokens of the longest pass."""
        return len(self.prefix) + self.sinks + self.window + self.chunk

    def num_chunks(self, num_tokens: int) -> int:
        """Return the passes a text of so many tokens takes."""
        return -(-num_tokens // self.chunk)

    def chunk_range(self, index: int, num_tokens: int) -> tuple[int, int]:
        """Return the tokens of chunk ``index``."""
        return index * self.chunk, min((index + 1) * self.chunk, num_tokens)

    def chunk_pass(self, token_ids: npt.NDArray[np.uint32], index: int) -> npt.NDArray[np.int64]:
        """Return the ids of one pass; its last rows are the chunk's."""
        start, end = self.chunk_range(index, len(token_ids))
        first = max(0, start - self.window)
        parts = (
            np.array(self.prefix, np.int64),
            token_ids[: min(self.sinks, first)],
            token_ids[first:end],
        )
        return np.concatenate(parts).astype(np.int64)
