"""Grammars over a model's tokens: JSON schemas, Lark grammars and regular expressions, as masks of allowed tokens.

    compiler = GrammarCompiler(tokenizer)
    grammar = compiler.json_schema({"type": "object", ...})
    state = grammar.start()
    state.fill_mask(row); state.advance(token_id); state.is_done

A grammar is one of bytes; llguidance walks it over the vocabulary's trie, so a token may span any of the grammar's
parts, and half of a character is a fine token where the grammar allows the character.

JSON is written on one line with one space after each comma and colon. Free whitespace would let a model that has lost
its thread write blanks for ever.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from evermini.errors import EngineError, GrammarLimitError, InvalidRequestError
from evermini.text.schema import Schema, SchemaError, enforceable
from evermini.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions
    from torch import Tensor

CACHED_GRAMMARS = 256
"""Compiled grammars that are kept; the least recently used goes first."""

_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # No \u escapes: half of a surrogate pair is no character, and the rest can be written as itself.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How `json.dumps` writes, which is what models have seen most of."""

_COMPLEMENT_OPTIONS = (64, 8, 1)
"""How many alternatives a complement may have, tried in turn."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=5_000_000,
    step_lexer_fuel=2_000_000,
    step_max_items=250_000,
    verbose_errors=False,
)
"""Some 100 ms to compile a grammar's patterns, and 150 ms for a mask, at most; nearly all take less than one."""


class GrammarState:
    """Where one text stands in its grammar (see `evermini.engine.constraint.ConstraintState`)."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, row: Tensor) -> None:
        """Write the allowed tokens' bits into ``row`` (ceil(vocab_size / 32),), int32 on the CPU.

        Raises:
            GrammarLimitError: The next tokens cannot be worked out within the limits on time and memory.
        """
        self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
        self._check()

    def advance(self, token_id: int) -> None:
        """Take an allowed token.

        Raises:
            GrammarLimitError: What follows is beyond the limits.
            EngineError: It is not allowed.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """Return how many of ``token_ids`` could come next, from the first on."""
        return self._matcher.validate_tokens(list(token_ids))

    def forced(self) -> Sequence[int]:
        """Return the tokens that must come next, one after the other; may be empty though there are some."""
        return self._matcher.compute_ff_tokens()

    @property
    def is_done(self) -> bool:
        """Nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        problem = _first_line(self._matcher.get_error())
        # "too many expressions", "Too many items", "too complex": the reason to stop says InternalError for all.
        if "too " in problem.lower():
            raise GrammarLimitError(
                f"The requested grammar cannot be followed any further ({problem}). Simplify the schema or grammar: "
                "shorter patterns, fewer alternatives that begin alike."
            )
        raise EngineError(f"The grammar cannot be followed ({problem}).")


class Grammar:
    """A compiled grammar; `start` as many texts as you like, from any thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        """Return a state at the beginning."""
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles grammars for one model's tokens; safe to use from several threads.

    Compiling releases the GIL. What was compiled before comes from a cache.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None

    def json_schema(self, schema: Schema) -> Grammar:
        """Return the grammar of the JSON values that ``schema`` accepts.

        Raises:
            SchemaError: It is wrong, too complex, or cannot be enforced in full.
        """
        key = json.dumps(schema)
        return self._cached(key, lambda: self._compile_schema(schema))

    def is_special(self, token: str) -> bool:
        """Return whether Lark grammars may name ``token`` (``<|python_tag|>``): it is one of the control tokens."""
        return token in self._tokenizer.special_texts

    def json_object(self) -> Grammar:
        """Return the grammar of all JSON objects."""
        return self.json_schema({"type": "object"})

    def lark(self, text: str) -> Grammar:
        """Return the grammar that ``text`` defines in llguidance's dialect of Lark.

        Raises:
            InvalidRequestError: The grammar is wrong or too complex.
        """
        compile_it = partial(self._compile, LLMatcher.grammar_from_lark(text))
        return self._cached(f"lark {text}", compile_it)

    def regex(self, pattern: str) -> Grammar:
        """Return the grammar of all texts that match ``pattern`` from end to end.

        Raises:
            InvalidRequestError: The pattern is wrong or too complex.
        """
        compile_it = partial(self._compile, LLMatcher.grammar_from_regex(pattern))
        return self._cached(f"regex {pattern}", compile_it)

    def _cached(self, key: str, compile_it: Callable[[], Grammar]) -> Grammar:
        with self._lock:
            if grammar := self._cache.get(key):
                self._cache.move_to_end(key)
                return grammar
        grammar = compile_it()
        with self._lock:
            self._cache[key] = grammar
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return grammar

    def _compile_schema(self, schema: Schema) -> Grammar:
        """Compile a schema, with fewer alternatives for what its parts refuse if it grows too large."""
        for max_options in _COMPLEMENT_OPTIONS:
            plain = enforceable(schema, max_options)
            if isinstance(plain, bool):  # llguidance takes objects only
                plain = {} if plain else {"anyOf": []}
            source = LLMatcher.grammar_from_json_schema(json.dumps(plain), overrides=_STYLE)
            try:
                return self._compile(source)
            except InvalidRequestError as error:
                problem = error.message
                if "too large" not in problem:
                    break
        raise SchemaError((), f"the schema cannot be enforced: {problem}.")

    def _compile(self, source: str) -> Grammar:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary_of(self._tokenizer)
        matcher = LLMatcher(self._vocabulary, source, log_level=0, limits=_LIMITS)
        grammar = Grammar(matcher)
        if not matcher.is_error():
            # Some grammars break the limits at their very first step: better now than in the answer.
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            matcher = probe if probe.is_error() else matcher
        if matcher.is_error():
            raise InvalidRequestError(_first_line(matcher.get_error()))
        return grammar


class _Tokens:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("takes text")  # how the wrapper finds out
        return self._tokenizer.encode(text)


def _vocabulary_of(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(
        TokenizerWrapper(_Tokens(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=sorted(tokenizer.eos_ids),
        slices=LLTokenizer.json_slices(),
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
