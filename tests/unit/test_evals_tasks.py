"""RULER's tasks and HotpotQA, as they are generated here."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evermini.errors import InvalidRequestError
from evermini.evals.cases import user_message
from evermini.evals.corpus import DataFolder, Haystacks
from evermini.evals.hotpot import answer_table, hotpot_plans, make_pool, rank_bm25, ranking_table
from evermini.evals.report import score_table
from evermini.evals.ruler import TASKS, WHOLE_TEXT, Ruler
from evermini.evals.score import has, score
from tests.unit.test_evals import documents, words


def article(number: int) -> dict[str, Any]:
    names = [f"Person{number}x{i}" for i in range(10)]
    sentences = [
        [f"{name} was born in Town{name}.", f" {name} likes tea number {i}."]
        for i, name in enumerate(names)
    ]
    return {
        "id": f"id{number}",
        "question": f"Where was {names[3]} born, and what does {names[7]} like?",
        "answer": f"Town{names[3]}",
        "type": "bridge",
        "supporting_facts": {"title": [names[3], names[7]], "sent_id": [0, 1]},
        "context": {"title": names, "sentences": sentences},
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    root = tmp_path_factory.mktemp("data")
    for folder in ("ruler_words", "hotpotqa", "xquad"):
        (root / folder).mkdir()
    found = sorted(set(re.findall("[a-z]{3,9}", " ".join(documents(9, 800)))))
    (root / "ruler_words" / "nounlist.txt").write_text("\n".join(found[:4000]))
    lines = [json.dumps(article(number)) for number in range(40)]
    (root / "hotpotqa" / "a.jsonl").write_text("\n".join(lines))
    paragraphs = [
        {
            "context": f"The tower of city {i} has {100 + i} steps. " + "It is old. " * 20,
            "qas": [
                {"question": f"How many steps has the tower of city {i}?", "answers": [{"text": str(100 + i)}]}
            ],
        }
        for i in range(60)
    ]  # fmt: skip
    (root / "xquad" / "xquad.en.json").write_text(
        json.dumps({"data": [{"paragraphs": paragraphs}]})
    )
    return DataFolder(root)


@pytest.fixture(scope="module")
def ruler(data: DataFolder) -> Ruler:
    return Ruler(data, Haystacks(documents(), words), words)


@pytest.mark.parametrize("length", [2_000, 5_000])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_its_length_and_holds_its_answers(ruler: Ruler, task: str, length: int):
    one, other = ruler.plans(lengths=[length], tasks=[task], samples=2, seed=4)
    case = one.build()
    assert case == one.build() != other.build()
    (question,) = case.questions
    prompt = words(user_message(case.instruction, case.text, question.text)) + question.max_tokens
    room = length - 40
    coarse = {"cwe": 6, "qa_1": 80, "qa_2": 80, "vt": 30, "niah_single_1": 30}.get(task, 0)
    assert room - max(coarse, length // 100) - 8 <= prompt <= room
    for passage in question.gold:
        assert case.text.count(passage) == 1
    assert bool(question.gold) is (task not in WHOLE_TEXT)
    assert all(any(has(case.text, way) for way in ways) for ways in question.answers)
    assert score(" ".join(ways[0] for ways in question.answers), question.answers) == 1
    if not task.startswith("qa"):
        assert not any(has(question.text, ways[0]) for ways in question.answers)


def cases(ruler: Ruler, task: str) -> Any:
    return next(iter(ruler.plans(lengths=[3_000], tasks=[task], samples=1, seed=1))).build()


def test_needles_are_as_many_as_the_task_says(ruler: Ruler):
    def memos(task: str) -> int:
        return cases(ruler, task).text.count("Keep this in mind:")

    assert [memos(f"niah_single_{i}") for i in (1, 2, 3)] == [1, 1, 1]
    assert [memos(f"niah_{name}") for name in ("multikey_1", "multivalue", "multiquery")] == [
        4,
        4,
        4,
    ]
    assert memos("niah_multikey_2") == len(cases(ruler, "niah_multikey_2").text.splitlines()) > 100
    assert len(cases(ruler, "niah_multivalue").questions[0].answers) == 4
    assert len(cases(ruler, "niah_multiquery").questions[0].gold) == 4


def test_variables_follow_from_each_other(ruler: Ruler):
    case = cases(ruler, "vt")
    (question,) = case.questions
    held: set[str] = set()
    value = re.search(r"\d{5}", question.text)
    assert value
    for line in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", case.text, re.MULTILINE):
        assert line[1] == value[0] or line[1] in held
        held.add(line[0])
    assert held == {ways[0] for ways in question.answers}
    assert len(held) == 5


def test_words_are_as_common_as_the_answer_says(ruler: Ruler):
    case = cases(ruler, "cwe")
    counts = Counter(re.findall(r"[a-z]+", case.text))
    wanted = {ways[0] for ways in case.questions[0].answers}
    assert {word for word, count in counts.items() if count == 30} == wanted
    assert set(counts.values()) == {3, 30}

    case = cases(ruler, "fwe")
    counts = Counter(case.text.split())
    del counts["..."]
    ranked = counts.most_common(4)
    assert [word for word, _ in ranked[:3]] == [ways[0] for ways in case.questions[0].answers]
    assert ranked[2][1] > ranked[3][1]


def test_too_little_data_is_an_error(ruler: Ruler):
    plan = next(iter(ruler.plans(lengths=[500_000], tasks=["qa_1"], samples=1, seed=1)))
    with pytest.raises(InvalidRequestError, match="too little data"):
        plan.build()
    plan = next(iter(ruler.plans(lengths=[300], tasks=["cwe"], samples=1, seed=1)))
    with pytest.raises(InvalidRequestError, match="longer texts"):
        plan.build()


def test_scores_are_averaged_over_tasks():
    rows = [
        {"length": 4096, "system": "recall", "kind": kind, "score": value}
        for kind, value in (("a", 1), ("a", 0), ("b", 1))
    ]
    text = score_table(rows, "kind", {"mean": ["a", "b"], "part": ["a", "c"]})
    assert "| kind | 4k recall |" in text
    assert "| a | 50 % |" in text
    assert "| mean | 75 % |" in text
    assert "| part |  |" in text  # nothing is known of c


# HotpotQA


def test_the_pool_holds_every_article_once(data: DataFolder):
    pool = make_pool(data.hotpot(), 20, seed=2)
    assert len(pool.bounds) == 200
    texts = [pool.text[a:b] for a, b in pool.bounds]
    assert len(set(texts)) == 200
    assert "\n\n".join(texts) == pool.text
    for item, gold in zip(pool.items, pool.gold, strict=True):
        titles = {texts[number].partition("\n")[0] for number in gold}
        assert titles == set(item["supporting_facts"]["title"])
    (plan,) = hotpot_plans(pool, words)
    case = plan.build()
    for question in case.questions:
        assert len(question.gold) == 2
        assert all(passage in case.text for passage in question.gold)
    with pytest.raises(InvalidRequestError, match="40 questions only"):
        make_pool(data.hotpot(), 41, seed=2)


def test_articles_are_ranked_and_counted(data: DataFolder):
    pool = make_pool(data.hotpot(), 5, seed=2)

    class Counting:
        count_tokens = staticmethod(words)

    def perfect(question: str) -> list[int]:
        (number,) = (i for i, item in enumerate(pool.items) if item["question"] == question)
        return sorted(pool.gold[number])

    def half(question: str) -> list[int]:
        return perfect(question)[:1]

    rankers = {"perfect": perfect, "half": half, "bm25": rank_bm25(Counting(), pool)}  # type: ignore[arg-type]
    text, figures = ranking_table(pool, rankers)
    assert figures["perfect@2"] == {"both": 1.0, "recall": 1.0}
    assert figures["half@20"] == {"both": 0.0, "recall": 0.5}
    assert figures["bm25@20"]["recall"] > 0.9
    assert "| perfect | 100 % (1.00) |" in text


def test_answers_are_scored_as_hotpot_does():
    rows = [
        {"system": "recall", "answer": "In the Red House", "wanted": [["red house"]], "found": 1.0, "score": 1.0},
        {"system": "recall", "answer": "red house", "wanted": [["red house"]], "found": 0.5, "score": 1.0},
    ]  # fmt: skip
    assert "| recall | 2 | 50 % | 50 % | 90 % | 100 % |" in answer_table(rows)


def test_the_real_data_sets_can_be_read():
    from tests.conftest import data_file

    folder = DataFolder(data_file("hotpotqa").parent)
    for needed in ("xquad", "ruler_words", "pg_essays", "prose", "code_haystack"):
        data_file(needed)
    assert len(folder.hotpot()) == 30
    assert len(folder.squad()) == 240
    assert len(folder.words()) > 5_000
    code = folder.documents("code")
    assert any(text.startswith("# Lib/") for text in code)
    assert sum(map(len, folder.documents("essays"))) > 600_000
    assert sum(map(len, folder.documents("prose"))) > 10_000_000


def test_a_run_of_hotpot_through_the_report(data: DataFolder, tmp_path: Path):
    from evermini.evals.report import write_report
    from evermini.evals.run import Results, run_cases

    class Knows:
        native_window = 100_000
        count_tokens = staticmethod(words)

        def chat(self, messages, **params):
            content = messages[0]["content"]
            name = re.search(r"Where was (\w+) born", content)
            assert name
            usage = type("Usage", (), {"prompt_tokens": words(content)})
            text = f"Town{name[1]}" if f"born in Town{name[1]}." in content else "no idea"
            return type(
                "A", (), {"text": text, "usage": usage, "seconds": 0.1, "recalled": None, "swept": None,
                          "finish_reason": "stop"}
            )  # fmt: skip

    pool = make_pool(data.hotpot(), 8, seed=1)
    results = Results(tmp_path, {})
    run_cases(
        Knows(), hotpot_plans(pool, words), results, systems=["dense", "bm25"], tail_tokens=100, workers=2
    )  # type: ignore[arg-type]  # fmt: skip
    assert [row["score"] for row in results.rows if row["system"] == "dense"] == [1.0] * 8
    path = write_report(
        results, "HotpotQA", "", sections=[answer_table(results.rows)], with_maps=False
    )
    assert "| dense | 8 | 100 % | 100 % | 100 % | 100 % |" in path.read_text()
