"""Where guesses come from, where they go on after a difference, and how many are worth their time."""

from __future__ import annotations

import random

import pytest

from evermini.engine.speculation import MAX_DRAFT, Draft, Drafter, plan

PROMPT = [1000, 1001, 1002]
FILE = [random.Random(1).randrange(400) for _ in range(300)]


def write(drafter: Drafter, tokens: list[int], output: list[int]) -> int:
    """Write ``output`` as the engine would; return the steps it takes."""
    written, steps = 0, 0
    while written < len(output):
        draft = drafter.propose(MAX_DRAFT, 0.1)
        size = plan([draft], 1, 100)[0]
        steps += 1
        for guess in [*draft.token_ids[:size], None]:
            tokens.append(output[written])
            written += 1
            drafter.observe()
            if tokens[-1] != guess or written == len(output):
                break
    return steps


def steps_for(output: list[int], prediction: list[int], prompt: list[int] = PROMPT) -> int:
    tokens = list(prompt)
    return write(Drafter(tokens, prediction), tokens, output)


EDITS = {
    "none": FILE,
    "replaced": [*FILE[:150], 900, *FILE[151:]],
    "replaced by three": [*FILE[:150], 900, 901, 902, *FILE[151:]],
    "inserted": [*FILE[:150], *range(900, 912), *FILE[150:]],
    "removed": [*FILE[:150], *FILE[190:]],
    "moved": [*FILE[200:], *FILE[:200]],
    "introduced": [*range(900, 905), *FILE],
}


@pytest.mark.parametrize("edit", EDITS)
def test_one_edit_costs_few_steps(edit):
    extra = len(set(EDITS[edit]) - set(FILE))  # new tokens have to be computed one by one
    assert steps_for(EDITS[edit], FILE) <= steps_for(FILE, FILE) + extra + 6
    assert steps_for(EDITS[edit], [], PROMPT + FILE) <= steps_for(FILE, FILE) + extra + 14


def test_a_name_changed_throughout():
    file = [token if i % 25 else 500 for i, token in enumerate(FILE)]
    renamed = [600 if token == 500 else token for token in file]
    assert steps_for(renamed, file) < len(file) / 5


def test_loops_are_followed_beyond_their_length():
    assert steps_for([7, 8, 9] * 60, []) < 40


def test_text_without_repetition_is_not_guessed_at():
    tokens = list(range(50))
    drafter = Drafter(tokens, [])
    for token in range(100, 200):
        assert not drafter.propose(MAX_DRAFT, 0.0).token_ids
        tokens.append(token)
        drafter.observe()


def test_guesses_that_fail_become_rare_and_come_back():
    """Pairs of tokens recur, but what follows them is random; then the text begins to repeat itself."""
    rng = random.Random(3)
    tokens = [rng.randrange(6) for _ in range(300)]
    drafter = Drafter(tokens, [])
    noise = [rng.randrange(6) for _ in range(400)]
    assert write(drafter, tokens, noise) > 300
    assert write(drafter, tokens, noise) < 120


def test_nothing_is_guessed_beyond_an_end():
    drafter = Drafter([1, 2], [3, 4, 5, 6, 7], end_ids=frozenset({6}))
    assert list(drafter.propose(MAX_DRAFT, 0.0).token_ids) == [3, 4, 5]


def draft(*chances: float) -> Draft:
    return Draft(range(len(chances)), chances)


def test_rows_are_taken_while_they_pay():
    sure = draft(*[0.99**i for i in range(1, 33)])
    assert plan([sure], 1, 100) == [32]
    assert plan([draft(0.05)], 1, 100) == [0]
    assert plan([draft(0.3, 0.09, 0.027)], 1, 100) == [1]
    assert plan([], 0, 100) == []


def test_the_best_rows_come_first():
    assert plan([draft(0.9, 0.2), draft(0.8, 0.7)], 2, 3) == [1, 2]


def test_fewer_rows_pay_in_a_crowd():
    likely = draft(0.6, 0.36, 0.22)
    alone = plan([likely], 1, 100)[0]
    crowd = plan([likely] * 40, 40, 100)
    assert alone >= 2
    assert max(crowd) == 0
