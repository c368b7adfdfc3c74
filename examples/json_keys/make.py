"""Makes support messages and the JSON with five keys that is wanted of each: 200 to learn from, 100 held out.

    python examples/json_keys/make.py OUT_FOLDER

Names, products, order numbers and wordings are drawn anew for each message; no held-out message is one of the others.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

SYSTEM = "Extract name, product, order, issue and urgency from the message. Answer with JSON only."
NAMES = [
    *("Ada", "Ben", "Carla", "Dmitri", "Elif", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kemal"),
    *("Lena", "Mateo", "Nora", "Omar", "Petra", "Quentin", "Rosa", "Sven", "Tara", "Uma", "Viktor"),
    *("Wanda", "Ximena", "Yusuf", "Zoe"),
]
PRODUCTS = [
    "kettle",
    "desk lamp",
    "router",
    "blender",
    "office chair",
    "headset",
    "tent",
    "printer",
]
ISSUES = {
    "broken": ["arrived broken", "stopped working", "is cracked", "does not switch on"],
    "missing": [
        "never arrived",
        "is still not here",
        "was not in the parcel",
        "got lost on the way",
    ],
    "wrong": ["is the wrong colour", "is not the one I chose", "is the wrong size"],
    "refund": ["was charged twice", "is cheaper elsewhere now, I want my money back"],
}
URGENCY = {
    "high": ["Please hurry, I need it today!", "This is urgent.", "I need an answer at once."],
    "normal": ["Can you help?", "What can we do?", "Please tell me what to do next."],
    "low": ["No rush.", "Take your time.", "It can wait until next week."],
}
OPENINGS = [
    "Hi, {name} here.",
    "Hello, my name is {name}.",
    "{name} writing again.",
    "This is {name}.",
]
ORDERS = ["Order {order}:", "It is about order {order}.", "My order number is {order}."]


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(20250414)
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < 300:
        text, wanted = message(chance)
        rows.setdefault(text, row(text, wanted))
    every = list(rows.values())
    for name, some in (("train", every[:200]), ("test", every[200:])):
        lines = "".join(json.dumps(one) + "\n" for one in some)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def message(chance: random.Random) -> tuple[str, dict[str, str]]:
    """Return a message, and what it says."""
    issue, urgency = chance.choice(list(ISSUES)), chance.choice(list(URGENCY))
    wanted = {
        "name": chance.choice(NAMES),
        "product": chance.choice(PRODUCTS),
        "order": f"{chance.choice('ABCD')}{chance.randrange(1000, 10000)}",
        "issue": issue,
        "urgency": urgency,
    }
    parts = [
        chance.choice(ORDERS).format(**wanted),
        f"The {wanted['product']} {chance.choice(ISSUES[issue])}.",
    ]
    end = chance.choice(URGENCY[urgency])
    return " ".join([chance.choice(OPENINGS).format(**wanted), *parts, end]), wanted


def row(text: str, wanted: dict[str, str]) -> dict[str, object]:
    """Return an example in OpenAI's format."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(wanted)},
        ]
    }


if __name__ == "__main__":
    main()
