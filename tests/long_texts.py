"""Long texts with facts to be found in them."""

from __future__ import annotations

import random

NUM_LINES = 3000
NEEDLES = {
    150: ("The captain's parrot is called Biscuit.", "What is the captain's parrot called?", "Biscuit"),
    1500: ("The secret code for Lisbon is tulip-84.", "What is the secret code for Lisbon?", "tulip-84"),
    2900: ("The clock tower was finished in 1732.", "In which year was the clock tower finished?", "1732"),
}  # fmt: skip
"""Line from 1 -> fact, question, answer."""

_NAMES = (
    "Anna",
    "Bruno",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luis",
)
_VERBS = (
    "paints",
    "repairs",
    "visits",
    "sketches",
    "counts",
    "cleans",
    "moves",
    "sells",
    "measures",
    "describes",
)
_THINGS = (
    "ladder",
    "window",
    "kettle",
    "garden",
    "bicycle",
    "lantern",
    "violin",
    "carpet",
    "statue",
    "engine",
)
_PLACES = (
    "harbour",
    "station",
    "market",
    "chapel",
    "library",
    "meadow",
    "workshop",
    "kitchen",
    "bridge",
    "attic",
)


def story(seed: int, num_lines: int = NUM_LINES) -> str:
    """About 20 tokens a line, no line twice, with the needles."""
    draw = random.Random(seed)
    lines = [
        f"{draw.choice(_NAMES)} {draw.choice(_VERBS)} the {draw.choice(_THINGS)} near the {draw.choice(_PLACES)} "
        f"and {draw.choice(_VERBS)} {draw.randrange(2, 90)} of them."
        for _ in range(num_lines)
    ]
    for number, (fact, _, _) in NEEDLES.items():
        if number <= num_lines:
            lines[number - 1] = fact
    return "\n".join(lines)
