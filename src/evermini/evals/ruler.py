"""RULER's thirteen tasks (arXiv 2404.06654), from a generator and words of our own; its metrics.

    niah_single_1..3     one marked number or uuid in noise (1) or in essays (2, 3)
    niah_multikey_1..3   among four keys in essays; in a text of nothing but such sentences (2: numbers, 3: uuids)
    niah_multivalue      four values of one key
    niah_multiquery      the values of four keys
    vt                   all variables that a value was handed on to, over four hops, in noise
    cwe                  the ten words that are in a list 30 times, among words that are there three times
    fwe                  the three words that a made-up text uses most (Zipf, alpha 2)
    qa_1, qa_2           a question from SQuAD's and HotpotQA's development sets, its paragraphs among others

Unlike RULER's: essays do not repeat, and there are no examples in the prompt. ``cwe`` and ``fwe`` need the whole text,
so nothing can be "found" for them.
"""

from __future__ import annotations

import random
import string
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise

from evermini.errors import InvalidRequestError
from evermini.evals.cases import Case, CasePlan, Question, user_message
from evermini.evals.corpus import CountTokens, DataFolder, Haystacks, Hidden
from evermini.evals.needles import TEMPLATE_TOKENS, make_case

TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
WHOLE_TEXT = ("cwe", "fwe")
"""Tasks that need all of the text."""

_NOISE = "Rain falls on the hill. The kettle is warm. A cart goes by. The lamp is lit, and then it is dark again."
_MEMO = "Keep this in mind: the {kind} that belongs to {key} is {value}."
_NIAH = (
    "Some {kind}s that belong to keys are hidden in the following text. One or more are asked for."
)
_QA = "Here are a number of documents. A question about them follows at the end; answer it in a few words."


@dataclass(frozen=True)
class _Niah:
    hay: str
    key: str = "words"
    kind: str = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


_NIAHS = {
    "niah_single_1": _Niah("noise"),
    "niah_single_2": _Niah("essays"),
    "niah_single_3": _Niah("essays", kind="uuid"),
    "niah_multikey_1": _Niah("essays", num_keys=4),
    "niah_multikey_2": _Niah("memos"),
    "niah_multikey_3": _Niah("memos", key="uuid", kind="uuid"),
    "niah_multivalue": _Niah("essays", num_values=4),
    "niah_multiquery": _Niah("essays", num_keys=4, num_queries=4),
}


class Ruler:
    """Makes the cases.

    Args:
        data: Where essays, words and questions come from.
        essays: The texts of ``essays`` tasks.
        count: Tokens of a text.
    """

    def __init__(self, data: DataFolder, essays: Haystacks, count: CountTokens) -> None:
        self._data, self._essays, self._count = data, essays, count

    def plans(
        self, *, lengths: Sequence[int], tasks: Sequence[str] = TASKS, samples: int, seed: int
    ) -> Iterator[CasePlan]:
        """Yield ``samples`` cases of every task at every length, one question each.

        Args:
            lengths: Tokens of a prompt with its answer.
            tasks: Which of `TASKS`.
            samples: Cases of each.
            seed: Equal seeds give equal cases.
        """
        for length in lengths:
            for task in tasks:
                for sample in range(samples):
                    yield CasePlan(
                        id=f"{task}-{length}-{sample}",
                        labels={"length": length, "kind": task, "sample": sample},
                        build=partial(
                            self._case, task, length, f"ruler {seed} {task} {length} {sample}"
                        ),
                    )

    def _case(self, task: str, length: int, seed: str) -> Case:
        rng = random.Random(seed)
        if task in _NIAHS:
            return self._niah(_NIAHS[task], length, rng)
        if task == "vt":
            return self._variables(length, rng)
        if task == "cwe":
            return self._common_words(length, rng)
        if task == "fwe":
            return self._frequent_words(length, rng)
        return self._documents(task, length, rng)

    # Needles

    def _niah(self, task: _Niah, length: int, rng: random.Random) -> Case:
        keys = self._keys(task.key, task.num_keys, rng)
        values = [[_value(task.kind, rng) for _ in range(task.num_values)] for _ in keys]
        memos = [
            [_MEMO.format(kind=task.kind, key=key, value=value) for value in own]
            for key, own in zip(keys, values, strict=True)
        ]
        asked = rng.sample(range(len(keys)), task.num_queries)
        names = [keys[i] for i in asked]
        wanted = [value for i in asked for value in values[i]]
        if len(wanted) == 1:
            text = f"Which {task.kind} belongs to {names[0]}?"
        elif len(names) == 1:
            text = f"Which {len(wanted)} {task.kind}s belong to {names[0]}? List all of them."
        else:
            listed = ", ".join(names[:-1]) + " and " + names[-1]
            text = f"Which {task.kind}s belong to {listed}? List all of them."
        question = Question(
            id="0",
            text=text,
            answers=tuple((value,) for value in wanted),
            gold=tuple(memo for i in asked for memo in memos[i]),
            max_tokens=128,
        )
        hidden = [Hidden(memo, rng.random()) for own in memos for memo in own]
        instruction = _NIAH.format(kind=task.kind)
        if task.hay == "essays":
            return make_case(
                self._essays,
                self._count,
                length,
                hidden,
                [question],
                rng.randrange(1 << 32),
                instruction,
            )
        if task.hay == "noise":
            return self._fit(length, question, instruction, lambda n: _strew(hidden, n))

        @_in_order
        def memo(number: int) -> str:
            key = self._keys(task.key, 1, rng)[0]
            return _MEMO.format(kind=task.kind, key=key, value=_value(task.kind, rng))

        place = hidden[0].depth
        return self._fit(
            length,
            question,
            instruction,
            lambda n: "\n".join(_with([memo(i) for i in range(n)], hidden[0].text, place)),
        )

    def _keys(self, kind: str, number: int, rng: random.Random) -> list[str]:
        if kind == "uuid":
            return [_uuid(rng) for _ in range(number)]
        pairs = zip(rng.sample(self._words, number), rng.sample(self._words, number), strict=True)
        return [f"{a}-{b}" for a, b in pairs]

    @cached_property
    def _words(self) -> list[str]:
        return self._data.words()

    # Tracing and counting

    def _variables(self, length: int, rng: random.Random) -> Case:
        names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(5)]
        value = str(rng.randrange(10_000, 100_000))
        lines = [f"VAR {names[0]} = {value}"]
        lines += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
        depths = sorted(rng.random() for _ in lines)
        hidden = [Hidden(line, depth) for line, depth in zip(lines, depths, strict=True)]
        question = Question(
            id="0",
            text=f"Which variables have the value {value}, at first or second hand? List all five.",
            answers=tuple((name,) for name in names),
            gold=tuple(lines),
            max_tokens=64,
        )
        instruction = (
            "Variables are assigned in the following text, with noise between. Follow how a value is handed on from "
            "one variable to the next."
        )
        return self._fit(length, question, instruction, lambda n: _strew(hidden, n))

    def _common_words(self, length: int, rng: random.Random) -> Case:
        words = rng.sample(self._words, len(self._words))
        common, rest = words[:10], words[10:]
        rest += [a + b for a, b in pairwise(rest)]  # long lists need more words than there are
        question = Question(
            id="0",
            text="Which ten words are the most common ones in this list? Write those ten words only.",
            answers=tuple((word,) for word in common),
            gold=(),
            max_tokens=120,
        )

        def listed(number: int) -> str:
            whole = 30 * common + 3 * rest[:number]
            random.Random(number).shuffle(whole)
            return " ".join(f"{i}. {word}" for i, word in enumerate(whole, start=1))

        instruction = (
            "Here is a numbered list of words. Some are in it many times, others a few times."
        )
        return self._fit(length, question, instruction, listed, most=len(rest))

    def _frequent_words(self, length: int, rng: random.Random) -> Case:
        coded = list(
            dict.fromkeys("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(2000))
        )
        order = random.Random(rng.random())
        question = Question(
            id="0",
            text="Which three made-up words, dots aside, does this text use most? Write those three words only.",
            answers=tuple((word,) for word in coded[:3]),
            gold=(),
            max_tokens=50,
        )
        state = order.getstate()

        def text(number: int) -> str:
            weights = [rank**-2.0 for rank in range(1, len(coded) + 2)]
            total = sum(weights)
            whole = [
                word
                for word, weight in zip(["...", *coded], weights, strict=True)
                for _ in range(round(number * weight / total))
            ]
            order.setstate(state)
            order.shuffle(whole)
            return " ".join(whole)

        instruction = (
            "The following text is written in a code of made-up words. Count how often each is used; dots (...) "
            "do not count."
        )
        case = self._fit(length, question, instruction, text, least=40)
        top = [word for word, _ in Counter(case.text.split()).most_common(4)]
        assert top == ["...", *coded[:3]], top
        return case

    # Questions

    def _documents(self, task: str, length: int, rng: random.Random) -> Case:
        squad = [item["context"] for item in self._data.squad()]
        hotpot = self._data.hotpot()
        paragraphs = [text for item in hotpot for text in _paragraphs(item).values()]
        if task == "qa_1":
            paragraph = rng.choice(self._data.squad())
            found = rng.choice(paragraph["qas"])
            gold, asked = [paragraph["context"]], found["question"]
            ways = tuple(dict.fromkeys(answer["text"] for answer in found["answers"]))
            others = [squad, paragraphs]
        else:
            item = rng.choice(hotpot)
            own = _paragraphs(item)
            gold = [own[title] for title in dict.fromkeys(item["supporting_facts"]["title"])]
            asked, ways, others = item["question"], (item["answer"],), [paragraphs, squad]
        question = Question(
            id="0",
            text=asked,
            answers=(ways,),
            gold=tuple(gold),
            scorer="any",
            max_tokens=48,
        )
        others.append(
            self._essays.paragraphs(200, 1500)
        )  # the questions' own run out at 80,000 tokens
        pool = list(
            dict.fromkeys(
                text
                for texts in others
                for text in rng.sample(texts, len(texts))
                if text not in gold
            )
        )
        seed = rng.random()

        def text(number: int) -> str:
            documents = gold + pool[:number]
            random.Random(seed).shuffle(documents)
            return "\n\n".join(
                f"Document {i}:\n{text}" for i, text in enumerate(documents, start=1)
            )

        return self._fit(length, question, _QA, text, least=0, most=len(pool))

    def _fit(
        self,
        length: int,
        question: Question,
        instruction: str,
        make: Callable[[int], str],
        least: int = 1,
        most: int = 1 << 30,
    ) -> Case:
        """Return a case with the longest text of ``make`` that fits the length.

        ``make`` is called with ``least`` to ``most``, and its texts grow with that.
        """
        around = self._count(user_message(instruction, "", question.text)) + question.max_tokens
        room = length - around - TEMPLATE_TOKENS
        low, high = least, least + 1
        while self._count(make(high)) <= room:
            if high == most:
                raise InvalidRequestError(
                    f"There is too little data for {length:,} tokens of this task. Take shorter texts, or leave it out."
                )
            low, high = high, min(2 * high, most)
        while high - low > max(1, low // 500):
            middle = (low + high) // 2
            fits = self._count(make(middle)) <= room
            low, high = (middle, high) if fits else (low, middle)
        text = make(low)
        size = self._count(text)
        if size > room:
            raise InvalidRequestError(
                f"The least that this task needs is {size:,} tokens; {room:,} are there. Ask for longer texts."
            )
        return Case(instruction, text, (question,), size, length)


def _paragraphs(item: dict[str, dict[str, list[list[str]]]]) -> dict[str, str]:
    context = item["context"]
    return {
        str(title): f"{title}\n{''.join(sentences)}"
        for title, sentences in zip(context["title"], context["sentences"], strict=True)
    }


def _value(kind: str, rng: random.Random) -> str:
    return _uuid(rng) if kind == "uuid" else str(rng.randrange(1_000_000, 10_000_000))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _strew(hidden: Sequence[Hidden], number: int) -> str:
    """Return ``number`` lines of noise with the passages on lines of their own at their depths."""
    lines: list[tuple[float, str]] = [(i / max(1, number), _NOISE) for i in range(number)]
    lines += [(item.depth, item.text) for item in hidden]
    return "\n".join(text for _, text in sorted(lines, key=lambda line: line[0]))


def _with(lines: list[str], line: str, depth: float) -> list[str]:
    at = round(depth * len(lines))
    return [*lines[:at], line, *lines[at:]]


def _in_order(make: Callable[[int], str]) -> Callable[[int], str]:
    """Return a function that makes item 0, 1, 2 ... in this order, once each, whatever order they are asked for in."""
    made: list[str] = []

    def get(number: int) -> str:
        while len(made) <= number:
            made.append(make(len(made)))
        return made[number]

    return get
