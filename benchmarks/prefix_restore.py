"""What prompts kept on the disk are worth: time to the first token after a restart, with them and without.

    python benchmarks/prefix_restore.py                    # mini, 4,096 tokens, 3 rounds
    python benchmarks/prefix_restore.py --model nano --tokens 2048

Each round asks one prompt of random words of an engine that has just been started, four times: without the disk; with
an empty one, which is written meanwhile; with what that wrote, read from the disk itself; and once more from the
system's page cache. The home folder is a temporary one beside which the weights of the real one are used. The answers
must be the same, and after a restart all full blocks but the last token's must have been restored.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from pathlib import Path

from evermini import LLM
from evermini.config import default_home
from evermini.engine.prompt_store import FOLDER
from evermini.models.batch import BLOCK_SIZE

_ANSWER_TOKENS = 8
_PARTS = ("models", "packed", "kernels")


def prompt_of(llm: LLM, num_tokens: int, seed: int) -> str:
    """Return words that nobody has asked before, about ``num_tokens`` tokens of them."""
    draw = random.Random(seed)
    words = [
        "river",
        "stone",
        "light",
        "winter",
        "paper",
        "garden",
        "engine",
        "window",
        "silver",
        "morning",
    ]
    text = " ".join(f"{draw.choice(words)} {draw.randrange(100)}" for _ in range(num_tokens))
    share = num_tokens / llm.count_tokens(text)
    return text[: int(len(text) * share)]


def ask(options: argparse.Namespace, home: Path, seed: int, disk: str) -> tuple[float, int, str]:
    """Start an engine and ask; return the seconds to the first token, the cached tokens, and the answer."""
    with LLM(
        options.model, home=home, threads=options.threads, recall=False, prompt_disk=disk
    ) as llm:
        llm.complete("One, two,", max_tokens=2, temperature=0)  # first use: threads, allocations
        prompt = prompt_of(llm, options.tokens, seed)
        with llm.complete(prompt, max_tokens=_ANSWER_TOKENS, temperature=0, stream=True) as stream:
            for _ in stream:
                pass
        assert stream.first_token_seconds is not None
        cached = stream.usage.cached_tokens
        expected = (stream.usage.prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        if cached not in (0, expected):
            raise SystemExit(f"{cached} tokens were restored, not {expected}")
        return stream.first_token_seconds, cached, stream.text


def forget_pages(folder: Path) -> None:
    """Have the system write the records to the disk and forget them."""
    os.sync()
    for path in folder.glob("*/*/*.kv"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--folder", type=Path, help="where to keep prompts; default the system's temporary folder"
    )
    options = parser.parse_args()
    names = ("computed", "computed and written", "restored, disk", "restored, page cache")
    times: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        home = Path(folder)
        for part in _PARTS:
            (home / part).symlink_to(default_home() / part)
        for seed in range(options.rounds):
            answers = set()
            for name in names:
                if name == "restored, disk":
                    forget_pages(home / FOLDER)
                seconds, cached, answer = ask(
                    options, home, seed, "0" if name == "computed" else "8GiB"
                )
                if bool(cached) != name.startswith("restored"):
                    raise SystemExit(f"{name}: {cached} tokens were cached")
                times[name].append(seconds)
                answers.add(answer)
            if len(answers) > 1:
                raise SystemExit(f"the answers differ: {answers}")
        sizes = [path.stat().st_size for path in (home / FOLDER).glob("*/*/*.kv")]
    print(
        f"{options.model}: {options.tokens} tokens, {len(sizes) // options.rounds} blocks, "
        f"{sum(sizes) / options.rounds / 2**20:.1f} MiB; seconds to the first token"
    )
    for name, seconds in times.items():
        print(f"  {name:<21}{statistics.median(seconds):8.3f}  (of {len(seconds)})")


if __name__ == "__main__":
    main()
