"""How text is cut into pieces before BPE.

A GGUF file names its pre-tokenizer and does not carry it: the patterns below are those of the models' own
``tokenizer.json``. A name that is not listed is refused, because text cut wrongly gives valid-looking but wrong tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        patterns: Applied one after the other; what matches and what lies between become pieces.
        ignore_merges: A piece that is a vocabulary entry is that token, whatever the merges say.
        nfc: Text is brought to Unicode NFC first.
        add_bos: Prompts begin with the BOS token where the metadata does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return it as the `tokenizers` library's, with bytes written in GPT-2's alphabet."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )


_WORDS = PreTokenizer((_GPT2,))
_DIGITS_WORDS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "trillion", "mellum", "a.x-4.0"), _WORDS),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _DIGITS_WORDS,
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"), _LLAMA_BPE),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((_LLAMA3,))),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "stablelm2"), PreTokenizer((_QWEN2,))),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
    ),
}
"""Pre-tokenizers by the name in ``tokenizer.ggml.pre``."""

_PATTERNS = frozenset(pattern for pre in PRE_TOKENIZERS.values() for pattern in pre.patterns)
# Those that end a piece between a letter and a space; every pre-tokenizer above has one.
_WORD_PATTERNS = frozenset((_GPT2, _LLAMA3, _QWEN2, _SEED_CODER, _TEKKEN, r"\s?\p{L}+"))
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_PIECE_CHARS = 1 << 16


def cuts_words(serialised: dict[str, Any] | None) -> bool:
    """Tell whether a ``tokenizer.json``'s pre-tokenizer cuts with the patterns above: `cut_long_text` is exact then."""
    if serialised is None:
        return False
    steps = serialised["pretokenizers"] if serialised["type"] == "Sequence" else [serialised]
    cut = False
    for step in steps:
        pattern = step.get("pattern", {}).get("Regex")
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        if step["type"] == "Split" and pattern in _PATTERNS and isolated:
            cut |= pattern in _WORD_PATTERNS
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cut |= step["use_regex"]  # its own pattern is GPT-2's
        elif step["type"] != "Digits":
            return False
    return cut


def cut_long_text(text: str) -> Iterator[str]:
    """Cut text where every pattern above cuts too, so that the parts can be encoded apart, on all cores.

    The place is between an ASCII letter and a single space before another one: no pattern joins a letter to a space
    after it, and none looks back.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        match = _CUT.search(text, start + _PIECE_CHARS)
        if match is None:
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]
