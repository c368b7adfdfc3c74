"""Evaluations: what is generated is what is claimed, and judged as claimed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermini.errors import InvalidRequestError
from evermini.evals.cases import Case, CasePlan, Question, user_message
from evermini.evals.corpus import DataFolder, Haystacks, Hidden
from evermini.evals.needles import CITIES, DEPTHS, KINDS, make_needles, multikey_plans, needle_plans
from evermini.evals.report import write_report
from evermini.evals.run import Results, judge, run_cases
from evermini.evals.score import exact_match, f1, has, score
from evermini.evals.systems import BM25, Reply, _tail


def words(text: str) -> int:
    return len(text.split())


def documents(seed: int = 0, paragraphs: int = 3000) -> list[str]:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def sentence() -> str:
        found = [
            "".join(rng.choices(letters, k=rng.randrange(2, 9)))
            for _ in range(rng.randrange(4, 14))
        ]
        return " ".join(found).capitalize() + "."

    texts = [" ".join(sentence() for _ in range(rng.randrange(2, 9))) for _ in range(paragraphs)]
    return ["\n\n".join(texts[: paragraphs // 2]), "\n\n".join(texts[paragraphs // 2 :])]


@pytest.fixture(scope="module")
def hay() -> Haystacks:
    return Haystacks(documents(), words)


# Haystacks


@pytest.mark.parametrize("length", [600, 2_000, 30_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_text_has_its_length_and_its_passages_at_their_depths(
    hay: Haystacks, length: int, seed: int
):
    hidden = [Hidden(f"The passage number {i} stands here.", i / 10) for i in range(11)]
    filled = hay.fill(seed, length, hidden)
    assert filled.num_tokens == words(filled.text)
    assert length - max(8, length / 250) <= filled.num_tokens <= length
    for item, place in zip(hidden, filled.places, strict=True):
        assert filled.text[place : place + len(item.text)] == item.text
        assert filled.text.count(item.text) == 1
        depth = words(filled.text[:place]) / filled.num_tokens
        # A passage is only put between sentences, of 13 words at most here.
        assert depth == pytest.approx(item.depth, abs=(13 + 7 * 11) / length)


def test_a_passage_of_several_lines_stands_between_paragraphs(hay: Haystacks):
    code = "def f():\n    return 1"
    filled = hay.fill(3, 2_000, [Hidden(code, 0.5)])
    assert f"\n\n{code}\n\n" in filled.text


def test_nothing_is_repeated_and_a_seed_decides(hay: Haystacks):
    text = hay.fill(5, 20_000).text
    paragraphs = [p for p in text.split("\n\n") if len(p) > 40]
    assert len(paragraphs) == len(set(paragraphs)) > 100
    assert hay.fill(5, 20_000).text == text != hay.fill(6, 20_000).text


def test_too_short_documents_are_an_error(hay: Haystacks):
    with pytest.raises(InvalidRequestError, match="do not repeat"):
        hay.fill(0, 10_000_000)
    with pytest.raises(InvalidRequestError, match="passages alone"):
        hay.fill(0, 10, [Hidden("word " * 20, 0.5)])


def test_a_missing_data_set_says_what_to_do(tmp_path: Path):
    with pytest.raises(InvalidRequestError, match="EVERMINI_EVAL_DATA"):
        DataFolder(tmp_path).documents("prose")


# Needles


@pytest.mark.parametrize("seed", range(20))
def test_needles_hold_their_answers_and_differ(seed: int):
    needles = make_needles(KINDS * 8, random.Random(seed))
    assert len({needle.question for needle in needles}) == len(needles)
    for needle in needles:
        assert any(has(needle.passages[-1], answer) for answer in needle.answers)
        assert not any(has(needle.question, answer) for answer in needle.answers)
        if needle.kind == "two_hop":
            assert not any(has(needle.passages[0], answer) for answer in needle.answers)


def test_a_grid_has_every_depth_and_kind_in_prompts_of_the_length(hay: Haystacks):
    plans = list(needle_plans(hay, words, lengths=[1_500, 4_000], repeats=2, seed=7))
    assert [plan.labels["length"] for plan in plans] == [1_500, 1_500, 4_000, 4_000]
    kinds_at_0 = set()
    for plan in plans:
        case = plan.build()
        assert case == plan.build()
        assert [q.labels["depth"] for q in case.questions] == [round(100 * d) for d in DEPTHS]
        assert {q.labels["kind"] for q in case.questions} == set(KINDS)
        kinds_at_0.add(case.questions[0].labels["kind"])
        for question in case.questions:
            assert all(case.text.count(passage) == 1 for passage in question.gold)
            prompt = words(user_message(case.instruction, case.text, question.text))
            assert prompt + question.max_tokens <= case.room
            assert prompt + question.max_tokens > 0.9 * case.room
    assert len(kinds_at_0) == 2


def test_look_alikes_differ_in_city_and_code_only(hay: Haystacks):
    case = next(iter(multikey_plans(hay, words, lengths=[3_000], num_keys=20, seed=1))).build()
    codes = [q.answers[0][0] for q in case.questions]
    assert len(set(codes)) == 20
    assert {q.id for q in case.questions} <= set(CITIES)
    for question, code in zip(case.questions, codes, strict=True):
        assert question.gold == (f"The secret code for {question.id} is {code}.",)
        assert set(question.wrong) == set(codes) - {code}


# Scores


@pytest.mark.parametrize(
    ("answer", "wanted", "is_there"),
    [
        ("It is PEWTER-HERON-52.", "pewter-heron-52", True),
        ("PEWTER-HERON-521", "PEWTER-HERON-52", False),
        ("They took in 48,213 sacks", "48213", True),
        ("148213", "48213", False),
        ("In LISBON, I think", "Lisbon", True),
        ("Lisbonne", "Lisbon", False),
    ],
)
def test_an_answer_has_a_text_as_a_whole(answer: str, wanted: str, is_there: bool):
    assert has(answer, wanted) is is_there


def test_scores():
    assert score("a b", [["a"], ["c"]]) == 0.5
    assert score("a b", [["c", "b"]]) == 1
    assert score("a b", [["a"], ["c"]], "any") == 1
    assert score("a b", [["a"]], wrong=["b"]) == 0
    assert score("In the Beatles' song", [["Beatles"]], "qa") == 1
    assert score("Beatlesque", [["Beatles"]], "qa") == 0
    assert exact_match("The Beatles!", "beatles") == 1
    assert f1("the red house", "a red car") == pytest.approx(0.5)
    assert f1("yes", "yes it is") == 0
    assert f1("nothing", "else") == 0


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_and_bounded(a: str, b: str):
    assert 0 <= f1(a, b) <= 1
    assert f1(a, b) == pytest.approx(f1(b, a))


def test_found_is_judged_apart_from_the_answer():
    question = Question("q", "Who?", (("Ann",),), ("Ann did it.", "Bob saw it."))
    row = judge(question, Reply("Ann", "... Ann did\nit. ...", 9, 0.1, "stop"))
    assert (row["found"], row["score"]) == (0.5, 1.0)
    row = judge(question, Reply("Cy", "Ann did it. Bob saw it.", 9, 0.1, "stop"))
    assert (row["found"], row["score"]) == (1.0, 0.0)
    assert row["read"] == "Ann did it. Bob saw it."


# Systems


def test_bm25_finds_a_passage_and_marks_what_is_left_out(hay: Haystacks):
    passage = "The locker combination of the Bergen depot is ZINC-HERON-52."
    text = hay.fill(1, 20_000, [Hidden(passage, 0.4)]).text
    bm25 = BM25(text, words)
    assert "".join(text[a:b] for a, b in bm25.bounds) == text
    excerpt = bm25.excerpts("What is the locker combination of the Bergen depot?")
    assert passage in excerpt
    assert "characters are left out" in excerpt
    assert words(excerpt) < 3_072


def test_the_window_is_the_end_of_the_text(hay: Haystacks):
    filled = hay.fill(1, 5_000)
    case = Case("Read.", filled.text, (), filled.num_tokens, 5_100)
    tail = _tail(words, case, 1_000)("any")
    assert filled.text.endswith(tail)
    assert 700 < words(tail) <= 900


# Runs


class ScriptedLLM:
    """Answers with what stands after "is" in the sentence about the asked thing, if it was sent."""

    native_window = 100_000

    def __init__(self) -> None:
        self.calls = 0
        self.fail_at: int | None = None

    def count_tokens(self, text: str) -> int:
        return words(text)

    def chat(self, messages, **params):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        text = messages[0]["content"]
        city = text.rpartition(" for ")[2].rstrip("?")
        found = text.partition(f"The secret code for {city} is ")[2].partition(".\n")[0].split()
        return _Answer(found[0].rstrip(".") if found else "unknown", words(text))


class _Answer:
    recalled = swept = None
    finish_reason = "stop"
    seconds = 0.01

    def __init__(self, text: str, tokens: int) -> None:
        self.text = text
        self.usage = type("Usage", (), {"prompt_tokens": tokens})


def plans(hay: Haystacks, built: list[str]) -> list[CasePlan]:
    made = list(multikey_plans(hay, words, lengths=[2_000, 4_000], num_keys=5, seed=3))

    def counted(plan: CasePlan) -> Case:
        built.append(plan.id)
        return plan.build()

    return [CasePlan(p.id, p.labels, lambda p=p: counted(p)) for p in made]


def test_an_interrupted_run_goes_on_where_it_stopped(hay: Haystacks, tmp_path: Path):
    llm, built = ScriptedLLM(), []
    llm.fail_at = 14  # in the second case, after its first system

    def go() -> Results:
        results = Results(tmp_path, {"seed": 3})
        run_cases(
            llm, plans(hay, built), results, systems=["bm25", "window"], tail_tokens=500, workers=1
        )  # fmt: skip
        return results

    with pytest.raises(KeyboardInterrupt):
        go()
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"torn')
    results = go()
    assert built == ["multikey-2000-0", "multikey-4000-0", "multikey-4000-0"]
    assert llm.calls <= 20 + 2  # one failed, one was begun beside it
    keys = [(row["case"], row["system"], row["question"]) for row in results.rows]
    assert len(keys) == len(set(keys)) == 20
    for row in results.rows:
        assert (row["score"] == 1) == (row["found"] == 1)
    assert all(row["found"] == 1 for row in results.rows if row["system"] == "bm25")
    assert {row["found"] for row in results.rows if row["system"] == "window"} == {0, 1}
    calls = llm.calls
    go()
    assert llm.calls == calls


def test_a_folder_belongs_to_one_configuration(tmp_path: Path):
    Results(tmp_path, {"seed": 1, "lengths": (1, 2)})
    Results(tmp_path, {"seed": 1, "lengths": (1, 2)})
    with pytest.raises(InvalidRequestError, match="differs in seed"):
        Results(tmp_path, {"seed": 2, "lengths": (1, 2)})


def test_a_report_has_tables_maps_and_everything_in_json(tmp_path: Path):
    results = Results(tmp_path, {"seed": 1})
    for system, found in (("recall", 1.0), ("window", 0.0)):
        for depth in (0, 50, 100):
            results.add(
                {
                    "case": "c", "system": system, "question": f"{depth}", "length": 8192, "depth": depth,
                    "kind": "value", "asked": "What | where?", "wanted": [["x"]], "answer": "y", "read_tokens": 300,
                    "score": found * (depth > 0), "found": found, "seconds": 1.0, "is_first": depth == 0,
                }
            )  # fmt: skip
    path = write_report(results, "Title", "Intro.")
    text = path.read_text()
    assert "| 8,192 | recall | 3 | 100 % | 66.7 % | 1 | 300 | 1.0 |" in text
    assert "| 8,192 | window | 3 | 0 % | 0 % | 0 | 300 | 1.0 |" in text
    assert "What \\| where?" in text
    for name in ("recall.png", "window.png"):
        assert f"![{name}]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == results.rows
    assert report["config"] == {"seed": 1}
    assert report["machine"]["cores"] >= 1
