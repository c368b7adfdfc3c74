"""A checkpoint's tokenizer data as a `tokenizers` backend and the ids that matter.

GGUF metadata holds one of two kinds for the supported families: ``gpt2`` (byte-level BPE with a named pre-tokenizer)
or ``llama`` (SentencePiece BPE with byte fallback). Hugging Face folders hold a ready ``tokenizer.json`` of one of
the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokenizers import AddedToken, Tokenizer, models, normalizers

from evermini.errors import DamagedCheckpointError, UnsupportedTokenizerError
from evermini.text.pretokenize import PRE_TOKENIZERS, PreTokenizer, cuts_words

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
METASPACE = "\u2581"  # SentencePiece writes a space so

# Tokens that end a turn or a document by their text, where metadata names only one of them (as llama.cpp has it).
_END_TEXTS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<end_of_utterance>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<reponame>", "<|file_sep|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
}


class TokenizerSource(Protocol):
    """What a checkpoint says about its tokenizer (see `evermini.models.checkpoint.TokenizerSource`)."""

    @property
    def format(self) -> Literal["gguf", "huggingface"]:
        """Where the data comes from."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF: the ``tokenizer.*`` keys. Hugging Face: ``tokenizer_config.json``."""

    @property
    def tokenizer_json(self) -> str | None:
        """Text of ``tokenizer.json`` (Hugging Face only)."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-generation ids named outside the tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def takes_parts(self) -> bool:
        """The chat template takes a message's content as parts."""


@dataclass
class Vocabulary:
    """Tokens, ready to use.

    Attributes:
        backend: Encodes text; special tokens written in it are plain text to it.
        continuing: Encodes text that follows a special token (other than `backend` where only the very first text
            gets SentencePiece's space).
        can_cut: `cut_long_text` is exact for this tokenizer.
        byte_level: Token texts are in GPT-2's byte alphabet (else SentencePiece's).
        special: Text of each special token → its id.
        unused_ids: Entries that stand for nothing (padding of the vocabulary).
        bos_id: Begin-of-text token, if there is one.
        eos_ids: Tokens that end a generation.
        add_bos: Raw prompts begin with the BOS token.
        named: What chat templates see: ``bos_token``, ``eos_token`` and so on.
    """

    backend: Tokenizer
    continuing: Tokenizer
    can_cut: bool
    byte_level: bool
    special: dict[str, int]
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    named: dict[str, str]
    unused_ids: frozenset[int] = field(default_factory=frozenset)


def load_vocabulary(source: TokenizerSource) -> Vocabulary:
    """Build the vocabulary a checkpoint describes.

    Raises:
        UnsupportedTokenizerError: Another kind of tokenizer, or an unknown pre-tokenizer.
        DamagedCheckpointError: Data is missing or does not fit together.
    """
    build = _from_gguf if source.format == "gguf" else _from_huggingface
    vocabulary = build(source)
    size = vocabulary.backend.get_vocab_size(with_added_tokens=True)
    if size > source.vocab_size:
        raise _damaged(f"it has {size} tokens, but the model has {source.vocab_size}")
    # Ids come from the text of added tokens or from metadata; one outside the model would never be drawn.
    ids = {*vocabulary.eos_ids, *vocabulary.special.values()}
    if any(not 0 <= token_id < source.vocab_size for token_id in ids):
        raise _damaged(f"it names special tokens outside the model's {source.vocab_size}")
    return vocabulary


def _from_gguf(source: TokenizerSource) -> Vocabulary:
    metadata = source.metadata
    tokens: Sequence[str] = metadata.get("tokenizer.ggml.tokens") or ()
    if not tokens:
        raise _damaged("tokenizer.ggml.tokens is missing")
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise _damaged(f"{len(tokens)} tokens, but {len(types)} token types")
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        pre = _pre_tokenizer(metadata)
        backend, add_bos = _byte_level_backend(tokens, metadata, pre), pre.add_bos
    elif model == "llama":
        backend, add_bos = _sentencepiece_backend(tokens, types, metadata), True
    else:
        raise UnsupportedTokenizerError(
            f"Tokenizer model {model!r} is not supported. Supported in GGUF files: gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE). Use another conversion of this model."
        )
    ids = {
        kind: metadata[f"tokenizer.ggml.{key}_token_id"]
        for kind, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("eot_token", "eot"),
            ("eom_token", "eom"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if 0 <= metadata.get(f"tokenizer.ggml.{key}_token_id", -1) < len(tokens)
    }
    special = {text: i for i, text in enumerate(tokens) if text and types[i] in (CONTROL, UNKNOWN)}
    defined = {text: i for i, text in enumerate(tokens) if text and types[i] == USER_DEFINED}
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in defined])
    backend.encode_special_tokens = True
    ends = [i for text, i in (special | defined).items() if text in _END_TEXTS]
    named_ends = [ids[key] for key in ("eos_token", "eot_token", "eom_token") if key in ids]
    return Vocabulary(
        backend=backend,
        continuing=backend,
        can_cut=model == "gpt2" and not _spans_words(backend),
        byte_level=model == "gpt2",
        special=special,
        bos_id=ids.get("bos_token"),
        eos_ids=frozenset([*source.eos_ids, *named_ends, *ends]),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in ids,
        named={kind: tokens[i] for kind, i in ids.items() if kind[:3] not in ("eot", "eom")},
        unused_ids=frozenset(i for i, kind in enumerate(types) if kind == UNUSED),
    )


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        found = f"Pre-tokenizer {name!r} is not supported" if name else "No pre-tokenizer is named"
        raise UnsupportedTokenizerError(
            f"{found} (tokenizer.ggml.pre). Supported: {', '.join(PRE_TOKENIZERS)}. "
            "Use a recent conversion of this model, or its safetensors folder."
        )
    return PRE_TOKENIZERS[name]


def _byte_level_backend(
    tokens: Sequence[str], metadata: Mapping[str, Any], pre: PreTokenizer
) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        raise _damaged("tokenizer.ggml.merges is missing")
    # Neither side contains a space: the byte alphabet writes it as U+0120.
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab=_first_ids(tokens), merges=pairs, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise _damaged(f"its merges do not fit its tokens ({error})") from error
    backend = Tokenizer(model)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.build()
    return backend


def _sentencepiece_backend(
    tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]
) -> Tokenizer:
    """Return BPE with merges derived from the scores: SentencePiece joins the best-scored pair first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise _damaged("tokenizer.ggml.scores is missing or of another length than the tokens")
    vocab = _first_ids(tokens)
    normal = {text: i for text, i in vocab.items() if types[i] == NORMAL}
    ranked: list[tuple[float, tuple[str, str]]] = []
    for text, i in normal.items():
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(-scores[i], pair) for pair in pairs]
    ranked.sort(key=lambda item: item[0])  # stable: equal scores keep the vocabulary's order
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair for _, pair in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", METASPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(METASPACE))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _first_ids(tokens: Sequence[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, text in enumerate(tokens):
        vocab.setdefault(text, i)
    return vocab


def _from_huggingface(source: TokenizerSource) -> Vocabulary:
    config = source.metadata
    backend, data = _read_backend(source.tokenizer_json or "")
    decoder = json.dumps(data.get("decoder"))
    byte_level = '"ByteLevel"' in decoder
    if not byte_level and '"ByteFallback"' not in decoder:
        raise UnsupportedTokenizerError(
            "tokenizer.json decodes neither from bytes (ByteLevel) nor with byte fallback (ByteFallback); only these "
            "two kinds are supported. Use a checkpoint of the Llama, Qwen2 or Qwen3 family."
        )
    named = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[key] = text
    known = {text for text in named.values() if backend.token_to_id(text) is not None}
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in sorted(known)])
    continuing = backend
    if '"prepend_scheme": "first"' in json.dumps(data.get("pre_tokenizer")):
        never = json.dumps(data).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        continuing, _ = _read_backend(never)
        continuing.encode_special_tokens = True
    backend.encode_special_tokens = True
    added = backend.get_added_tokens_decoder()
    bos_id = backend.token_to_id(named.get("bos_token", ""))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    eos_id = backend.token_to_id(named.get("eos_token", ""))
    ends = [i for i, token in added.items() if token.content in _END_TEXTS]
    return Vocabulary(
        backend=backend,
        continuing=continuing,
        can_cut=byte_level and cuts_words(data.get("pre_tokenizer")) and not _spans_words(backend),
        byte_level=byte_level,
        special={token.content: i for i, token in added.items() if token.special},
        bos_id=bos_id,
        eos_ids=frozenset([*source.eos_ids, *ends, *([] if eos_id is None else [eos_id])]),
        add_bos=bool(add_bos) and bos_id is not None,
        named=named,
    )


def _read_backend(text: str) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        data = json.loads(text)
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise _damaged(f"tokenizer.json cannot be read ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    return backend, data


def _spans_words(backend: Tokenizer) -> bool:
    """Tell whether an ordinary added token holds spaces or swallows those around it: it could lie across a cut."""
    return any(
        not token.special and (token.lstrip or token.rstrip or " " in token.content)
        for token in backend.get_added_tokens_decoder().values()
    )


def _damaged(cause: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"The checkpoint's tokenizer cannot be used: {cause}. Fetch or convert it again."
    )
