"""``evermini eval``: what a model finds and answers in long texts, against baselines in the same run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evermini.cli.options import MODEL_SETTINGS, with_settings
from evermini.config import LoadedSettings
from evermini.errors import InvalidRequestError

if TYPE_CHECKING:
    from evermini.evals.cases import CasePlan
    from evermini.evals.corpus import Haystacks
    from evermini.evals.run import Results, Step
    from evermini.llm import LLM

evaluations = typer.Typer(
    help="Measure what is found and answered in long texts, against baselines (needs evermini[evals]).",
    no_args_is_help=True,
)

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        envvar="EVERMINI_EVAL_DATA",
        metavar="FOLDER",
        help="Public data sets (docs/evaluation.md).",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Results; run again, it goes on there.")
]
Lengths = Annotated[
    str, typer.Option(help="Tokens of a prompt with its answer, such as 8k,32k,1047576.")
]
Systems = Annotated[
    str, typer.Option(help="Who answers, of: recall, dense, bm25, window.", metavar="LIST")
]
Repeats = Annotated[int, typer.Option(min=1, help="Texts of each length.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal texts and questions.")]
Hay = Annotated[str, typer.Option(help="What the texts are made of: prose, essays or code.")]
Tail = Annotated[
    str, typer.Option(help="Tokens that the system `window` reads: the end of the text.")
]
Workers = Annotated[int, typer.Option(min=1, help="Questions at a time.")]


@evaluations.command()
@with_settings(*MODEL_SETTINGS)
def needle(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-needle"),
    lengths: Lengths = "8k,32k,128k,512k,1047576",
    systems: Systems = "recall,dense,bm25,window",
    depths: Annotated[int, typer.Option(min=1, help="Depths, evenly spread.")] = 11,
    kinds: Annotated[
        str, typer.Option(help="Which passages are hidden; they take turns.")
    ] = "value,paraphrase,number,two_hop,code",
    repeats: Repeats = 1,
    seed: Seed = 0,
    hay: Hay = "prose",
    tail: Tail = "8k",
    workers: Workers = 4,
) -> None:
    """Hide passages of several kinds at every depth of texts of every length, and ask for each.

    All passages of a text are there from the start; the questions come one by one after its only reading.
    """
    from evermini.evals.needles import KINDS, needle_plans

    chosen = [kind for kind in KINDS if kind in kinds.split(",")]
    if unknown := set(kinds.split(",")) - set(KINDS):
        raise InvalidRequestError(f"No kind {unknown.pop()!r}. Choose from: {', '.join(KINDS)}.")
    wanted = parse_lengths(lengths)
    spread = [number / max(1, depths - 1) for number in range(depths)]
    config = {
        "task": "needle", "lengths": wanted, "kinds": chosen, "depths": depths, "repeats": repeats,
        "seed": seed, "hay": hay,
    }  # fmt: skip
    with _session(loaded, out, config, systems, tail) as (llm, results):
        plans = needle_plans(
            _haystacks(data, hay, llm), llm.count_tokens, lengths=wanted, kinds=chosen,
            depths=spread, repeats=repeats, seed=seed,
        )  # fmt: skip
        _ask(llm, plans, results, workers)
        _report(
            results,
            "Needles",
            f"{depths} passages of {len(chosen)} kinds, one at each depth, in {repeats} text(s) of each length, made "
            f"of {hay} that does not repeat. Found: the passage (for two_hop: the share of both) stands word for word "
            "in what the model read.",
        )


@evaluations.command()
@with_settings(*MODEL_SETTINGS)
def multikey(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-multikey"),
    lengths: Lengths = "32k,256k",
    systems: Systems = "recall,dense,bm25,window",
    keys: Annotated[int, typer.Option(min=1, max=30, help="Look-alikes in a text.")] = 20,
    repeats: Repeats = 1,
    seed: Seed = 0,
    hay: Hay = "prose",
    tail: Tail = "8k",
    workers: Workers = 4,
) -> None:
    """Hide sentences that differ in a city and its code alone, and ask for each city's code.

    An answer that has another city's code, too, is wrong.
    """
    from evermini.evals.needles import multikey_plans

    wanted = parse_lengths(lengths)
    config = {
        "task": "multikey", "lengths": wanted, "keys": keys, "repeats": repeats, "seed": seed, "hay": hay,
    }  # fmt: skip
    with _session(loaded, out, config, systems, tail) as (llm, results):
        plans = multikey_plans(
            _haystacks(data, hay, llm), llm.count_tokens, lengths=wanted, num_keys=keys,
            repeats=repeats, seed=seed,
        )  # fmt: skip
        _ask(llm, plans, results, workers)
        _report(
            results,
            "Look-alikes",
            f'{keys} sentences "The secret code for CITY is WORD-WORD-NN." in {repeats} text(s) of each length, made '
            f"of {hay}; each is asked for.",
        )


def parse_lengths(text: str) -> list[int]:
    """Return token counts: ``8k`` is 8,192, ``1M`` the longest prompt there is.

    Raises:
        InvalidRequestError: It is no list of lengths.
    """
    from evermini.service.assembly import MAX_PROMPT_TOKENS

    found: list[int] = []
    for item in text.lower().replace("_", "").split(","):
        number, factor = (item[:-1], 1024) if item.endswith("k") else (item, 1)
        if item == "1m":
            found.append(MAX_PROMPT_TOKENS)
        elif number.isdecimal() and int(number):
            found.append(min(int(number) * factor, MAX_PROMPT_TOKENS))
        else:
            raise InvalidRequestError(f"{item!r} is no length. Write, for instance: 8k,32k,1M")
    return found


@contextlib.contextmanager
def _session(
    loaded: LoadedSettings, out: Path, config: dict[str, Any], systems: str, tail: str
) -> Iterator[tuple[LLM, Results]]:
    """Yield the loaded model and the results so far; what they depend on is kept in the configuration."""
    from evermini.cli.talk import open_llm
    from evermini.evals.run import Results
    from evermini.evals.systems import parse_systems

    chosen = parse_systems(systems)
    settings = loaded.settings
    with open_llm(settings) as llm:
        model = {
            "model": settings.models[0],
            "weights": llm.weights,
            "precision": settings.precision,
        }
        rest = {"systems": list(chosen), "tail_tokens": parse_lengths(tail)[0]}
        yield llm, Results(out, config | model | rest)


def _haystacks(data: Path, hay: str, llm: LLM) -> Haystacks:
    from evermini.evals.corpus import DataFolder, Haystacks

    if hay not in ("prose", "essays", "code"):
        raise InvalidRequestError(f"No haystacks of {hay!r}. Choose from: prose, essays, code.")
    return Haystacks(DataFolder(data).documents(hay), llm.count_tokens)  # type: ignore[arg-type]


def _ask(llm: LLM, plans: Iterable[CasePlan], results: Results, workers: int) -> None:
    from evermini.cli.reading import reading_bar
    from evermini.evals.run import run_cases

    with reading_bar() as reading:
        run_cases(
            llm,
            plans,
            results,
            systems=results.config["systems"],
            tail_tokens=results.config["tail_tokens"],
            workers=workers,
            progress=_say,
            reading=reading if sys.stderr.isatty() else None,
        )


def _say(step: Step) -> None:
    row = step.row
    found = "" if row["found"] is None else f"found {row['found']:.0%}, "
    print(
        f"{step.case} {step.system} {step.done}/{step.total}: {found}score {row['score']:.2f}, {row['seconds']:.1f} s",
        file=sys.stderr,
    )


def _report(results: Results, title: str, intro: str, **options: Any) -> None:
    from evermini.evals.report import write_report

    path = write_report(results, title, intro, **options)
    print(path.read_text().partition("\n## ")[0].strip())
    print(f"\nreport: {path}")
