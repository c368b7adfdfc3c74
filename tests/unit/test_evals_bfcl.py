"""Calls are judged as the Berkeley leaderboard does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evermini.errors import InvalidRequestError
from evermini.evals.bfcl import Calls, Outcome, judge, load_tasks, table

ROW = {
    "id": "x_0",
    "question": [[{"role": "user", "content": "?"}]],
    "function": [
        {
            "name": "geo.area",
            "description": "Area",
            "parameters": {
                "type": "dict",
                "properties": {
                    "base": {"type": "integer"},
                    "height": {"type": "float"},
                    "unit": {"type": "string"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "at": {"type": "dict", "properties": {"x": {"type": "float"}}},
                },
                "required": ["base"],
            },
        }
    ],
}
UNITS = ["cm^2", ""]
ONE = {
    "geo.area": {
        "base": [10],
        "height": [2.5, 3],
        "unit": UNITS,
        "tags": [["A b"], ""],
        "at": [{"x": [1]}, ""],
    }
}
TWO = {"geo.area": {"base": [7], "height": [1]}}


def task(folder: Path, truth: list[dict[str, Any]]) -> Any:
    data = folder / "bfcl" / "possible_answer"
    data.mkdir(parents=True, exist_ok=True)
    name = "BFCL_v4_parallel.json"
    (data.parent / name).write_text(json.dumps(ROW) + "\n")
    (data / name).write_text(json.dumps({"id": "x_0", "ground_truth": truth}) + "\n")
    (loaded,) = load_tasks(folder, "parallel")
    return loaded


def area(**arguments: Any) -> tuple[str, Any]:
    return ("geo_area", arguments)


@pytest.mark.parametrize(
    ("calls", "is_right"),
    [
        ([area(base=10, height=2.5)], True),
        ([area(base=10, height=3, unit="CM 2")], True),
        ([area(base=10, height=3, tags=["a B"], at={"x": 1})], True),
        ([area(base=10)], False),
        ([area(height=3)], False),
        ([area(base=11, height=3)], False),
        ([area(base=10.0, height=3)], False),
        ([area(base=True, height=3)], False),
        ([area(base=10, height=3, unit="m")], False),
        ([area(base=10, height=3, tags=["a", "b"])], False),
        ([area(base=10, height=3, at={"x": 2})], False),
        ([area(base=10, height=3, more=1)], False),
        ([("other", {"base": 10, "height": 3})], False),
        ([], False),
        ([area(base=10, height=3)] * 2, False),
    ],
)
def test_one_call(tmp_path: Path, calls: Calls, is_right: bool) -> None:
    assert (judge(calls, task(tmp_path, [ONE])) == "") is is_right


def test_several_calls_in_any_order(tmp_path: Path) -> None:
    both = [area(base=7, height=1), area(base=10, height=3)]
    asked = task(tmp_path, [ONE, TWO])
    assert judge(both, asked) == judge(both[::-1], asked) == ""
    assert judge([both[0], both[0]], asked)


def test_no_call_is_right_where_none_fits(tmp_path: Path) -> None:
    asked = task(tmp_path, [])
    assert judge([], asked) == ""
    assert judge([area(base=1)], asked)


def test_functions_as_the_contract_has_them(tmp_path: Path) -> None:
    (function,) = task(tmp_path, [ONE]).functions
    assert function["name"] == "geo_area"
    properties = function["parameters"]["properties"]
    assert function["parameters"]["type"] == properties["at"]["type"] == "object"
    assert properties["height"]["type"] == "number"


def test_unknown_categories_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="Choose from"):
        load_tasks(tmp_path, "poems")
    with pytest.raises(InvalidRequestError, match="is not there"):
        load_tasks(tmp_path, "simple_python")


def test_the_table_counts() -> None:
    def row(is_right: bool) -> Outcome:
        return Outcome("i", "multiple", is_right, "", True, False, [], "", 1.0)

    assert "| multiple | 4 | 25.0% | 100.0% | 0.0% | 1.0 |" in table(
        [row(True), row(False), row(False), row(False)]
    )
