"""Tokenizers: ids equal those of the library that defines them, and text stays text."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from evermini.errors import (
    DamagedCheckpointError,
    InvalidRequestError,
    UnsupportedTokenizerError,
)
from evermini.models.checkpoint import TokenizerSource
from evermini.text.pretokenize import PRE_TOKENIZERS, cut_long_text, cuts_words
from evermini.text.tokenizer import Tokenizer
from tests.vocabularies import (
    CORPUS,
    GPT2,
    LLAMA3,
    QWEN2,
    SPECIAL,
    gguf_source,
    huggingface_source,
    smollm,
    smollm_tokenizer,
    split,
    trained,
)

TEXTS = [
    *CORPUS[:3],
    *("", " ", "\n\n", "a  b", "  lead", "trail  ", "x\r\n\r\ny", "1234567", "½²٣", "can't CAN'T"),
    *("\u00a0\u3000\u200b", "e\u0301", "!?!?", "<div>&amp;</div>", "<|im_end", "[INST]", "🏳️‍🌈"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))


class TestByteLevel:
    @pytest.mark.parametrize(
        ("pre", "steps", "ignore_merges"),
        [
            ("gpt-2", split(GPT2), False),
            ("smollm", smollm(), False),
            ("llama-bpe", split(LLAMA3), True),
            ("deepseek-r1-qwen", split(QWEN2), False),
        ],
    )
    def test_gguf_equals_the_tokenizer_it_was_made_from(
        self, pre: str, steps: pre_tokenizers.PreTokenizer, ignore_merges: bool
    ) -> None:
        original = trained(steps, ignore_merges)
        ours = Tokenizer(gguf_source(original, pre))
        for text in TEXTS:
            ids = original.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == ids
            assert ours.decode(ids) == original.decode(ids, skip_special_tokens=True) == text

    def test_huggingface_equals_its_library(self) -> None:
        original = smollm_tokenizer()
        ours = Tokenizer(huggingface_source(original))
        for text in TEXTS:
            assert ours.encode(text) == original.encode(text, add_special_tokens=False).ids

    def test_qwen2_composes_characters(self) -> None:
        ours = Tokenizer(gguf_source(trained(split(QWEN2)), "qwen2"))
        assert ours.encode("e\u0301") == ours.encode("\u00e9")

    def test_digits_stand_alone(self, tokenizer: Tokenizer) -> None:
        assert [tokenizer.token_bytes(i) for i in tokenizer.encode("2024")] == [
            *(b"2", b"0", b"2", b"4")
        ]

    @given(st.text())
    @settings(deadline=None)
    def test_round_trip(self, text: str) -> None:
        ours = Tokenizer(gguf_source(smollm_tokenizer(), "smollm"))
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not ours.special_ids.intersection(ids)
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()

    def test_bytes_of_every_token(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_bytes(tokenizer.id_of("<|im_end|>") or -1) == b"<|im_end|>"
        single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        assert {bytes([byte]) for byte in range(256)} <= single
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""

    def test_padding_entries_are_no_text(self) -> None:
        source = gguf_source(smollm_tokenizer(), "smollm")
        tokens = [*source.metadata["tokenizer.ggml.tokens"], "[PAD500]"]
        types = [*source.metadata["tokenizer.ggml.token_type"], 5]
        changes = {"tokens": tokens, "token_type": types}
        padded = gguf_source(smollm_tokenizer(), "smollm", **changes)
        padded = TokenizerSource("gguf", padded.metadata, None, None, (), len(tokens))
        ours = Tokenizer(padded)
        assert ours.decode([len(tokens) - 1]) == ""
        assert len(tokens) - 1 not in ours.encode("[PAD500]")

    def test_lone_surrogates_are_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match="lone surrogate"):
            tokenizer.encode("a\ud83d")


class TestSpecialTokens:
    @pytest.mark.parametrize("kind", ["gguf", "huggingface"])
    def test_text_never_becomes_one_unless_allowed(self, kind: str) -> None:
        backend = smollm_tokenizer()
        make = gguf_source(backend, "smollm") if kind == "gguf" else huggingface_source(backend)
        ours = Tokenizer(make)
        assert ours.special_ids == {backend.token_to_id(text) for text in SPECIAL}
        for text in SPECIAL:
            ids = ours.encode(f"a {text} b{text}")
            assert not ours.special_ids.intersection(ids)
            assert ours.decode(ids) == f"a {text} b{text}"
            special = backend.token_to_id(text)
            allowed = ours.encode(f"a {text} b{text}", allow_special=True)
            assert allowed == [*ours.encode("a "), special, *ours.encode(" b"), special]
            # The library's own reading of special tokens is the same.
            backend.encode_special_tokens = False
            expected = backend.encode(f"a {text} b{text}", add_special_tokens=False).ids
            assert allowed == expected

    def test_decoding_leaves_them_out_or_shows_them(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a<|im_end|>b", allow_special=True)
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, skip_special=False) == "a<|im_end|>b"

    def test_ordinary_added_tokens_are_text(self, tokenizer: Tokenizer) -> None:
        token = tokenizer.id_of("<tool_call>")
        assert tokenizer.encode("x<tool_call>") == [*tokenizer.encode("x"), token]
        assert tokenizer.decode([token or -1]) == "<tool_call>"
        assert token not in tokenizer.special_ids

    def test_longer_ones_go_first(self) -> None:
        source = gguf_source(smollm_tokenizer(), "smollm")
        tokens = [*source.metadata["tokenizer.ggml.tokens"], "<s><s>"]
        types = [*source.metadata["tokenizer.ggml.token_type"], 3]
        metadata = source.metadata | {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
        }
        ours = Tokenizer(TokenizerSource("gguf", metadata, None, None, (), len(tokens)))
        ids = ours.encode("<s><s><s>", allow_special=True)
        assert ids == [len(tokens) - 1, ours.id_of("<s>")]


class TestEndTokens:
    def test_named_and_known_ones(self, tokenizer: Tokenizer) -> None:
        expected = {tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")}
        assert tokenizer.eos_ids == expected

    def test_end_of_turn_key(self) -> None:
        backend = smollm_tokenizer()
        ours = Tokenizer(gguf_source(backend, "smollm", eot_token_id=backend.token_to_id("<s>")))
        assert backend.token_to_id("<s>") in ours.eos_ids

    def test_generation_config(self) -> None:
        source = huggingface_source(smollm_tokenizer())
        listed = TokenizerSource(
            "huggingface", source.metadata, source.tokenizer_json, None, (7, 9), source.vocab_size
        )
        assert {7, 9} < Tokenizer(listed).eos_ids

    def test_ordinary_tokens_that_look_like_one_are_not(self) -> None:
        tokens = ["<|im_end|>", "</s>", "a"]
        changes = {"tokens": tokens, "token_type": [3, 1, 1], "merges": [], "eos_token_id": 0}
        source = gguf_source(smollm_tokenizer(), "smollm", bos_token_id=None, **changes)
        assert Tokenizer(source).eos_ids == {0}


class TestBos:
    @pytest.mark.parametrize(
        ("pre", "key", "expected"),
        [
            ("llama-bpe", None, True),
            ("llama-bpe", False, False),
            ("smollm", None, False),
            ("smollm", True, True),
        ],
    )
    def test_gguf(self, pre: str, key: bool | None, expected: bool) -> None:
        ours = Tokenizer(gguf_source(smollm_tokenizer(), pre, add_bos_token=key))
        assert ours.add_bos is expected
        prefix = [ours.bos_id] if expected else []
        assert ours.encode("ab", add_bos=True) == prefix + ours.encode("ab")

    def test_huggingface_post_processor(self) -> None:
        backend = Backend.from_str(smollm_tokenizer().to_str())
        assert not Tokenizer(huggingface_source(backend)).add_bos
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        assert Tokenizer(huggingface_source(backend)).add_bos
        assert not Tokenizer(huggingface_source(backend, add_bos_token=False)).add_bos

    def test_no_bos_token(self) -> None:
        ours = Tokenizer(gguf_source(smollm_tokenizer(), "llama-bpe", bos_token_id=None))
        assert ours.bos_id is None
        assert ours.encode("a", add_bos=True) == ours.encode("a")


class TestLongText:
    """Long texts are cut and encoded in parallel; nobody can tell."""

    @pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
    def test_cutting_changes_nothing(self, pre: str, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = Tokenizer(gguf_source(smollm_tokenizer(), pre))
        text = "\n".join(TEXTS) + " and then it's  two  or don't a b c d 12 3a 4b. " * 20
        whole = ours.encode(text)
        monkeypatch.setattr("evermini.text.pretokenize._PIECE_CHARS", 5)
        assert len(list(cut_long_text(text))) > 100
        assert "".join(cut_long_text(text)) == text
        assert ours.encode(text) == whole

    @given(st.text(alphabet="ab AB'\n\ts1.<é\u0301", max_size=80), st.integers(1, 8))
    @settings(deadline=None, max_examples=300)
    def test_anywhere(self, text: str, size: int) -> None:
        for pre in ("smollm", "llama-bpe", "qwen2", "deepseek-coder", "tekken", "default"):
            ours = Tokenizer(gguf_source(smollm_tokenizer(), pre))
            whole = ours.encode(text)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("evermini.text.pretokenize._PIECE_CHARS", size)
                assert ours.encode(text) == whole

    def test_only_known_pre_tokenizers_are_cut(self) -> None:
        def described(step: pre_tokenizers.PreTokenizer) -> Any:
            backend = Backend(models.BPE())
            backend.pre_tokenizer = step
            return json.loads(backend.to_str())["pre_tokenizer"]

        assert cuts_words(described(smollm()))
        assert cuts_words(described(split(QWEN2)))
        assert not cuts_words(None)
        assert not cuts_words(described(split(r"\p{N}")))  # leaves words and spaces together
        assert not cuts_words(described(split(".{5}")))
        assert not cuts_words(described(pre_tokenizers.Metaspace()))

    def test_a_token_with_a_space_is_not_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = Backend.from_str(smollm_tokenizer().to_str())
        backend.add_tokens(["x y"])
        monkeypatch.setattr("evermini.text.pretokenize._PIECE_CHARS", 1)
        ours = Tokenizer(huggingface_source(backend))
        assert ours.encode("x y") == [backend.token_to_id("x y")]

    def test_nothing_is_truncated_or_padded(self) -> None:
        backend = Backend.from_str(smollm_tokenizer().to_str())
        backend.enable_truncation(4)
        backend.enable_padding(length=64)
        assert (
            Tokenizer(huggingface_source(backend)).decode(
                Tokenizer(huggingface_source(backend)).encode("quick " * 10)
            )
            == "quick " * 10
        )


@pytest.fixture(scope="module")
def sentencepiece_model() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    trained_model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=trained_model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained_model.getvalue())


class TestSentencePiece:
    @staticmethod
    def source(model: Any, **changes: Any) -> TokenizerSource:
        ids = range(model.vocab_size())
        kinds = [
            2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
            for i in ids
        ]
        keys: dict[str, Any] = {
            "model": "llama",
            "tokens": [model.id_to_piece(i) for i in ids],
            "scores": [model.get_score(i) for i in ids],
            "token_type": kinds,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
        metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        return TokenizerSource("gguf", metadata, None, None, (), len(ids))

    def test_ids_are_sentencepieces(self, sentencepiece_model: Any) -> None:
        ours = Tokenizer(self.source(sentencepiece_model))
        for text in TEXTS:
            assert ours.encode(text) == sentencepiece_model.encode(text)
            # The space put before the text is kept.
            assert ours.decode(ours.encode(text)) == (" " + text if text else "")

    def test_bos_and_special_tokens(self, sentencepiece_model: Any) -> None:
        ours = Tokenizer(self.source(sentencepiece_model))
        assert ours.add_bos
        assert ours.eos_ids == {2}
        assert ours.encode("fox", add_bos=True) == [1, *sentencepiece_model.encode("fox")]
        assert ours.encode("fox</s>", allow_special=True) == [*sentencepiece_model.encode("fox"), 2]
        assert 2 not in ours.encode("fox</s><s><unk>")
        assert ours.decode(ours.encode("<0x0A>")) == " <0x0A>"

    def test_without_space_prefix(self, sentencepiece_model: Any) -> None:
        ours = Tokenizer(self.source(sentencepiece_model, add_space_prefix=False))
        for text in TEXTS:
            assert ours.decode(ours.encode(text)) == text

    def test_huggingface_prefix_for_the_first_text_only(self, sentencepiece_model: Any) -> None:
        backend = Tokenizer(self.source(sentencepiece_model, add_space_prefix=False))._backend
        backend.encode_special_tokens = False
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        config = {"eos_token": "</s>", "bos_token": "<s>"}
        size = backend.get_vocab_size()
        ours = Tokenizer(TokenizerSource("huggingface", config, backend.to_str(), None, (), size))
        for text in ("fox", "fox</s>dog", "</s>fox", "<s>a fox</s> dog"):
            assert ours.encode(text, allow_special=True) == backend.encode(text).ids


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "t5"}, "'t5' is not supported"),
            ({"pre": "kimi-k2"}, "'kimi-k2' is not supported.*smollm"),
            ({"pre": None}, "No pre-tokenizer is named"),
        ],
    )
    def test_unsupported(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(UnsupportedTokenizerError, match=message):
            Tokenizer(gguf_source(smollm_tokenizer(), changes.pop("pre", "smollm"), **changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": None}, "tokens is missing"),
            ({"merges": None}, "merges is missing"),
            ({"merges": ["qq zz"]}, "merges do not fit"),
            ({"token_type": [1, 1]}, "but 2 token types"),
            ({"model": "llama"}, "scores is missing"),
        ],
    )
    def test_damaged(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(DamagedCheckpointError, match=message):
            Tokenizer(gguf_source(smollm_tokenizer(), "smollm", **changes))

    def test_more_tokens_than_the_model_has(self) -> None:
        source = gguf_source(smollm_tokenizer(), "smollm")
        small = TokenizerSource("gguf", source.metadata, None, None, (), 100)
        with pytest.raises(DamagedCheckpointError, match="but the model has 100"):
            Tokenizer(small)

    def test_broken_tokenizer_json(self) -> None:
        source = TokenizerSource("huggingface", {}, "{}", None, (), 100)
        with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.json cannot be read"):
            Tokenizer(source)

    def test_word_piece(self) -> None:
        backend = Backend(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
        source = TokenizerSource("huggingface", {}, backend.to_str(), None, (), 2)
        with pytest.raises(UnsupportedTokenizerError, match="ByteLevel"):
            Tokenizer(source)
