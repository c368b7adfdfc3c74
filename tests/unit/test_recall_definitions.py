"""A question that names code gets its definition, however often the name is used; others are read as before."""

from __future__ import annotations

import json

import pytest

from evermini.recall import recall as recall_module
from evermini.recall.definitions import DEFINITION, asked_names, find_definitions, returned
from evermini.recall.prompt import excerpts
from evermini.recall.segment import Segment
from evermini.recall.select import Policy
from tests.conftest import data_file
from tests.recall_fakes import fake_recall, filler

QUEUES = '''"""Queues."""


class Queue(Base):
    """For coroutines."""

    def __init__(
        self,
        size,
    ) -> None:
        self.size = size

    def qsize(self):
        return len(self.items)


class Other:
    def qsize(self):
        return 0
'''
THREADED = (
    "class Queue:\n    def qsize(self):\n        return 1\n\n    def get(self):\n        return 2\n"
)
USES = (
    "queue = Queue()  # the class Queue and its method qsize\nreturn queue.qsize()  # class Queue\n"
)


def code() -> list[Segment]:
    uses = [Segment(USES * 20 + filler(200, n), f"lib/uses{n}.py") for n in range(8)]
    return [
        *uses[:4],
        Segment(QUEUES, "lib/asyncio/queues.py"),
        *uses[4:],
        Segment(THREADED, "lib/queue.py"),
    ]


def places(context: list[Segment], question: str) -> list[tuple[str, int]]:
    return [
        (context[d.segment].name, context[d.segment].line_of(d.start))
        for d in find_definitions(context, question)
    ]


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Where is the class Queue defined, and what does its method qsize return?", {"Queue": 0, "qsize": 0}),
        ("What does asyncio.Queue.qsize return?", {"asyncio": 1, "Queue": 1, "qsize": 0}),
        ("What does `get` of std::Queue do?", {"get": 0, "std": 1, "Queue": 0}),
        ("the Request class's get_method(), class a_b.C", {"Request": 0, "get_method": 0, "a_b": 1, "C": 0}),
        ("Who calls shouldFlush and HTTPServer?", {"shouldFlush": 0, "HTTPServer": 0}),
        ("What is the function of the heart in Paris, and which class of people lives there?", {}),
    ],
)  # fmt: skip
def test_names_of_code_in_a_question(question, names):
    assert asked_names(question) == names


def test_of_equal_names_the_path_and_the_other_name_decide():
    context = code()
    asyncio = [("lib/asyncio/queues.py", 4), ("lib/asyncio/queues.py", 13)]
    assert places(context, "What does asyncio.Queue.qsize return?") == asyncio
    assert places(context, "Where is the asyncio class Queue, and its method qsize?") == asyncio
    assert places(context, "queue.Queue.qsize?") == [("lib/queue.py", 1), ("lib/queue.py", 2)]
    assert places(context, "What does `get` of the class Queue return?") == [
        ("lib/queue.py", 1),
        ("lib/queue.py", 5),
    ]


def test_a_name_that_is_defined_everywhere_is_left_to_the_ranking():
    context = [Segment("def close(self):\n    pass\n", f"m{n}.py") for n in range(9)]
    assert find_definitions(context, "What does `close` return?") == []
    assert places(context, "What does `m4.close` return?") == [("m4.py", 1)]


@pytest.mark.parametrize(
    ("text", "question", "end"),
    [
        ("export class Cart {\n  total() {}\n}\nlet x\n", "class Cart", "}\n"),
        ("pub fn add_one(x: i32)\n{\n    x + 1\n}\nfn b() {}\n", "add_one", "}\n"),
        ("    async def one_two(\n        self\n    ):\n        return 1\n\n    def b(): ...\n", "one_two", "1\n\n"),
        ("type A int\nfunc make_it(\n) int {\n\treturn 1\n}\n", "make_it", "return 1\n}\n"),
        ("impl Shape {\n    fn area() {}\n}", "struct Shape", "}"),
        ("class Last:", "class Last", "Last:"),
    ],
)  # fmt: skip
def test_a_definition_ends_where_its_body_does(text, question, end):
    (found,) = find_definitions([Segment(text)], question)
    assert text[found.start : found.end].endswith(end)
    assert DEFINITION.match(text, found.start)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("def f(a):\n    return 3 + len(a)\n\nreturn 4\n", ["3 + len(a)"]),
        ("def f(a):\n    if a:\n        return None\n    return a.b\n    return None\n", ["None", "a.b"]),
        ("function f(a) {\n  return a ? 'x' : g(a);\n}\n", ["a ? 'x' : g(a)"]),
        ("func f() (int, error) {\n\treturn 0, nil\n}\n", ["0, nil"]),
        ("def f():\n    def g():\n        return 1\n    return g()\n", ["g()"]),
        ("def f():\n    # It may\n    return stale numbers\n    return not 1\n", ["not 1"]),
        ("def f():\n    return (\n        1\n    )\n", []),
        ("def f():\n    return 1 + \\\n        2\n", []),
        ("def f():\n    x = 1\n    return x\n", []),
        ("def f():\n    return\n", []),
        ("def f(a):\n" + "".join(f"    if a == {n}:\n        return {n}\n" for n in range(4)), []),
        ("class f:\n    def g():\n        return 1\n", []),
    ],
)  # fmt: skip
def test_what_a_function_returns_is_told_where_that_is_the_whole_truth(text, values):
    match = DEFINITION.search(text)
    assert match is not None
    assert returned(text, match) == values


def test_definitions_are_read_although_uses_rank_higher(tmp_path, monkeypatch):
    context, question = code(), "What does the asyncio class Queue return from its method qsize?"
    recall, policy = fake_recall(tmp_path), Policy(max_tokens=300)
    selection = recall.ask(context, question, policy)
    assert selection.num_tokens <= 300
    best = max(selection.spans, key=lambda span: span.score)
    assert best.name == "lib/asyncio/queues.py"
    shown = excerpts(context, selection.spans, len, 10_000, question).text
    assert "class Queue is defined in lib/asyncio/queues.py on line 4" in shown
    assert "return len(self.items)" in shown

    monkeypatch.setattr(recall_module, "find_definitions", lambda *_: [])
    without = recall.ask(context, question, policy)
    assert "lib/asyncio/queues.py" not in {span.name for span in without.spans}


@pytest.mark.parametrize("budget", [1, 20, 128, 2048])
def test_definitions_keep_to_the_budget_and_leave_room_for_the_ranking(tmp_path, budget):
    context = code()
    question = "asyncio.Queue.qsize and `Other`"
    selection = fake_recall(tmp_path).ask(context, question, Policy(max_tokens=budget))
    assert selection.num_tokens <= budget
    names = {span.name for span in selection.spans}
    if budget > 100:
        assert "lib/asyncio/queues.py" in names
        assert len(names) > 1


@pytest.mark.parametrize(
    "question",
    ["where is Queue used", "What does the class Stack return?", "Who wrote `nothing_here`?"],
)
def test_without_a_definition_of_an_asked_name_nothing_changes(tmp_path, monkeypatch, question):
    recall, context = fake_recall(tmp_path), code()
    selection = recall.ask(context, question)
    monkeypatch.setattr(recall_module, "find_definitions", lambda *_: [])
    assert selection.spans == recall.ask(context, question).spans


def test_questions_about_prose_define_nothing():
    lines = data_file("hotpotqa/hotpot_distractor_sample.jsonl").read_text("utf-8").splitlines()
    for row in map(json.loads, lines):
        titles, sentences = row["context"]["title"], row["context"]["sentences"]
        context = [
            Segment("\n".join(text), title) for title, text in zip(titles, sentences, strict=True)
        ]
        assert find_definitions(context, row["question"]) == [], row["question"]
