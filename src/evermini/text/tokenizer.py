"""Text to token ids and back.

    tokenizer = Tokenizer(checkpoint.tokenizer)
    tokenizer.encode("Hello")                       # special tokens written in the text stay plain text
    tokenizer.encode("<|im_end|>", allow_special=True)
    tokenizer.decode(ids)

Text from outside is never turned into special tokens unless the caller asks for it: a user who writes ``<|im_end|>``
has written ten characters, not ended a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from evermini.errors import InvalidRequestError
from evermini.text.pretokenize import cut_long_text
from evermini.text.vocabulary import METASPACE, TokenizerSource, load_vocabulary


class Tokenizer:
    """A model's tokenizer. Immutable; safe to use from several threads.

    Args:
        source: What the checkpoint says about it.

    Attributes:
        vocab_size: Rows of the embedding: every id is below it.
        bos_id: Begin-of-text token, if there is one.
        eos_ids: All tokens that end a generation: end of turn, of message, of text.
        special_ids: Control tokens; they carry no text.
        add_bos: Raw prompts begin with the BOS token (chat templates write it themselves).
        chat_template: The model's Jinja template, if it has one.
        takes_parts: The template takes a message's content as parts, as those of vision-language models do.
        special_texts: Texts of the control tokens, as `split_special` finds them.
        named_tokens: Texts of ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``, as templates see them.

    Raises:
        UnsupportedTokenizerError: Another kind of tokenizer than byte-level or SentencePiece BPE.
        DamagedCheckpointError: Its data is missing or does not fit together.
    """

    def __init__(self, source: TokenizerSource) -> None:
        vocabulary = load_vocabulary(source)
        self.vocab_size = source.vocab_size
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.special_ids = frozenset(vocabulary.special.values())
        self.add_bos = vocabulary.add_bos
        self.chat_template = source.chat_template
        self.takes_parts = source.takes_parts
        self.named_tokens = vocabulary.named
        # One character alone cannot be told from text.
        self._special = {text: i for text, i in vocabulary.special.items() if len(text) > 1}
        self.special_texts = frozenset(self._special)
        self._unused_ids = vocabulary.unused_ids
        self._byte_level = vocabulary.byte_level
        self._backend = vocabulary.backend
        self._continuing = vocabulary.continuing
        self._can_cut = vocabulary.can_cut
        self._added = vocabulary.backend.get_added_tokens_decoder()
        self._split_pattern = self._special_pattern()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text.
            allow_special: Special tokens written in the text become those tokens. For trusted text only.
            add_bos: Put the BOS token first where the model's tokenizer does so (raw prompts).

        Raises:
            InvalidRequestError: The text has a lone surrogate, which is no character.
        """
        segments: Iterable[str | int] = self.split_special(text) if allow_special else [text]
        prefix = [self.bos_id] if add_bos and self.add_bos and self.bos_id is not None else []
        return prefix + self.encode_segments(segments)

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Return the token ids of plain texts with ready token ids between them."""
        ids: list[int] = []
        backend = self._backend
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif segment:
                ids += self._encode_plain(segment, backend)
            backend = self._continuing
        return ids

    def split_special(self, text: str) -> Iterator[str | int]:
        """Split a text at the special tokens written in it, which are given as their ids."""
        start = 0
        for match in self._split_pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield self._special[match[0] if match[0] in self._special else match[0].strip()]
            start = match.end()
        if start < len(text) or not text:
            yield text[start:]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Nothing is trimmed or cleaned up: it is the concatenation of `token_bytes`.
        """
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(i) for i in ids if i not in skipped)
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for (for a special token its name); ``b""`` for an unused id."""
        cached = self._bytes.get(token_id)
        if cached is None:
            cached = self._bytes[token_id] = self._find_bytes(token_id)
        return cached

    def to_json(self) -> str:
        """Return it as a ``tokenizer.json``, which the `tokenizers` library and `transformers` read."""
        backend = Backend.from_str(self._backend.to_str())
        if backend.decoder is None:  # none is needed here: see `token_bytes`
            spaces = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = (
                decoders.ByteLevel() if self._byte_level else decoders.Sequence(spaces)
            )
        return backend.to_str()

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its text as stored in the vocabulary, such as ``<|im_end|>``."""
        return self._backend.token_to_id(token)

    def _special_pattern(self) -> re.Pattern[str]:
        def pattern(text: str) -> str:
            token = self._added[self._special[text]]
            left, right = r"\s*" * token.lstrip, r"\s*" * token.rstrip
            return f"{left}{re.escape(text)}{right}"

        # Longest first: a special token may begin with another one.
        ordered = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join(map(pattern, ordered)) or r"(?!)")

    def _encode_plain(self, text: str, backend: Backend) -> list[int]:
        parts = list(cut_long_text(text)) if self._can_cut else [text]
        try:
            encodings = backend.encode_batch_fast(parts, add_special_tokens=False)
        except TypeError as error:  # how the library refuses a str that has no UTF-8 form
            raise InvalidRequestError(
                "The text holds a lone surrogate (half of a character, such as \\ud83d alone). Send valid Unicode."
            ) from error
        if len(encodings) == 1:
            return encodings[0].ids
        return [token_id for encoding in encodings for token_id in encoding.ids]

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._unused_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id].content.encode()
        text = self._backend.id_to_token(token_id)
        if text is None:
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in text)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes.fromhex(match[1])
        return text.replace(METASPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(0x100) if byte not in set(printable))
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


_BYTE_OF = {char: bytes([byte]) for char, byte in _byte_alphabet().items()}
