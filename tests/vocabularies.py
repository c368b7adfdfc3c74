"""Small vocabularies for tests: every byte, a few merges, a few special tokens."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from evermini.models.checkpoint import TokenizerSource

CORPUS = [
    "The quick brown fox jumps over the lazy dog, isn't it? It's 2024-11-22 and 3.14159.",
    "def f(x):\n    return x ** 2  # square\n\nclass A:\n\tpass\n",
    "naïve café, 日本語のテキスト, Привет мир, 🦙🚀 and more text about the quick fox.",
] * 3

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

# As published in the tokenizer.json of gpt2, SmolLM2, Llama 3 and Qwen2.5.
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
    return pre_tokenizers.Sequence(steps)


def smollm() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def trained(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Tokenizer:
    """Train byte-level BPE in the library itself: the oracle for what is rebuilt from metadata."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def gguf_source(
    tokenizer: Tokenizer, pre: str, template: str | None = None, **changes: Any
) -> TokenizerSource:
    """Write a tokenizer down as GGUF metadata does."""
    import json

    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda text: vocab[text])
    types = [3 if text in SPECIAL else 4 if text == "<tool_call>" else 1 for text in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": vocab["<s>"],
        "eos_token_id": vocab["<|im_end|>"],
        **changes,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return TokenizerSource("gguf", metadata, None, template, (), len(tokens))


def huggingface_source(
    tokenizer: Tokenizer, template: str | None = None, **config: Any
) -> TokenizerSource:
    size = tokenizer.get_vocab_size()
    settings = {"eos_token": "<|im_end|>", "bos_token": "<s>"} | config
    return TokenizerSource("huggingface", settings, tokenizer.to_str(), template, (), size)


@functools.cache
def smollm_tokenizer() -> Tokenizer:
    return trained(smollm())
