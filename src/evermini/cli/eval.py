"""``evermini eval``: what a model finds and answers in long texts, against baselines in the same run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from evermini.cli.options import MODEL_SETTINGS, with_settings
from evermini.config import LoadedSettings, Settings
from evermini.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from evermini.evals.cases import CasePlan
    from evermini.evals.corpus import Haystacks
    from evermini.evals.run import Results, Step
    from evermini.llm import LLM

_SETTINGS = tuple(name for name in MODEL_SETTINGS if name != "prompt_disk")

evaluations = typer.Typer(
    help="Measure what is found and answered in long texts, against baselines (needs the extra evals).",
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
    str,
    typer.Option(help="Who answers, of: auto, recall, sweep, dense, bm25, window.", metavar="LIST"),
]
Repeats = Annotated[int, typer.Option(min=1, help="Texts of each length.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal texts and questions.")]
Hay = Annotated[str, typer.Option(help="What the texts are made of: prose, essays or code.")]
Tail = Annotated[
    str, typer.Option(help="Tokens that the system `window` reads: the end of the text.")
]
_DENSE = "Tokens that the system `dense` reads at most; longer texts are left out."
Dense = Annotated[
    str, typer.Option(help=_DENSE, show_default="the model's window", metavar="LENGTH")
]
Workers = Annotated[int, typer.Option(min=1, help="Questions at a time.")]


@evaluations.command()
@with_settings(*_SETTINGS)
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
    dense: Dense = "1M",
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
    with _session(loaded, out, config, systems, tail, dense) as (llm, results):
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
@with_settings(*_SETTINGS)
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
    dense: Dense = "1M",
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
    with _session(loaded, out, config, systems, tail, dense) as (llm, results):
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


@evaluations.command()
@with_settings(*_SETTINGS)
def ruler(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-ruler"),
    lengths: Lengths = "4k,32k,128k",
    systems: Systems = "dense,auto,recall,bm25",
    tasks: Annotated[
        str, typer.Option(help="Which of the thirteen.", show_default="all", metavar="LIST")
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each task and length.")] = 5,
    seed: Seed = 0,
    hay: Hay = "essays",
    tail: Tail = "8k",
    dense: Annotated[str, typer.Option(help=_DENSE, metavar="LENGTH")] = "8k",
    workers: Workers = 4,
) -> None:
    """Run RULER's thirteen tasks: needles in noise and essays, variables, word counts, questions among documents.

    The texts are our own, sized by the model's tokenizer; the scores are RULER's.
    """
    from evermini.evals.corpus import DataFolder
    from evermini.evals.report import score_table
    from evermini.evals.ruler import TASKS, WHOLE_TEXT, Ruler

    chosen = [task for task in TASKS if not tasks or task in tasks.split(",")]
    if unknown := set(filter(None, tasks.split(","))) - set(TASKS):
        raise InvalidRequestError(f"No task {unknown.pop()!r}. Choose from: {', '.join(TASKS)}.")
    wanted = parse_lengths(lengths)
    config = {
        "task": "ruler", "lengths": wanted, "tasks": chosen, "samples": samples, "seed": seed, "hay": hay,
    }  # fmt: skip
    with _session(loaded, out, config, systems, tail, dense) as (llm, results):
        maker = Ruler(DataFolder(data), _haystacks(data, hay, llm), llm.count_tokens)
        plans = maker.plans(lengths=wanted, tasks=chosen, samples=samples, seed=seed)
        _ask(llm, plans, results, workers)
        means = {
            "mean of all": chosen,
            "mean of those that need passages": [t for t in chosen if t not in WHOLE_TEXT],
        }
        _report(
            results,
            "RULER",
            f"RULER's tasks, {samples} text(s) of each at each length, one question each. Scores: the share of the "
            "wanted strings in the answer (qa: whether one of them is).",
            sections=[score_table(results.rows, "kind", means)],
            breakdown="kind",
            with_maps=False,
        )


@evaluations.command()
@with_settings(*_SETTINGS)
def hotpot(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-hotpot"),
    systems: Systems = "recall,bm25",
    questions: Annotated[int, typer.Option(min=1, help="Questions; ten articles each.")] = 30,
    seed: Seed = 0,
    tail: Tail = "8k",
    dense: Dense = "1M",
    workers: Workers = 4,
) -> None:
    """Ask HotpotQA's questions to all their articles in one prompt; rank the articles, against BM25."""
    from evermini.evals.corpus import DataFolder
    from evermini.evals.hotpot import (
        answer_table,
        hotpot_plans,
        make_pool,
        rank_bm25,
        rank_recall,
        ranking_table,
    )  # fmt: skip

    config = {"task": "hotpot", "questions": questions, "seed": seed}
    with _session(loaded, out, config, systems, tail, dense) as (llm, results):
        pool = make_pool(DataFolder(data).hotpot(), questions, seed)
        _ask(llm, hotpot_plans(pool, llm.count_tokens), results, workers)
        rankers = {"recall": rank_recall(llm, pool), "bm25": rank_bm25(llm, pool)}
        ranking, figures = ranking_table(pool, rankers)
        _report(
            results,
            "HotpotQA",
            f"{questions} questions (distractor setting), their {len(pool.bounds)} articles in one prompt.",
            sections=[ranking, answer_table(results.rows)],
            with_maps=False,
            figures=figures,
        )


@evaluations.command()
@with_settings(*_SETTINGS)
def tools(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-tools"),
    categories: Annotated[
        str,
        typer.Option(
            help="Which questions, of: simple_python, multiple, parallel, parallel_multiple, "
            "irrelevance, live_simple.",
            metavar="LIST",
        ),
    ] = "simple_python,multiple,parallel,parallel_multiple,irrelevance,live_simple",
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Of each category at most, evenly spread.", show_default="all"),
    ] = None,
    choice: Annotated[
        Literal["auto", "required"],
        typer.Option(help="tool_choice: auto, as on the leaderboard, or required."),
    ] = "auto",
    workers: Workers = 4,
) -> None:
    """Ask the Berkeley Function-Calling Leaderboard's questions and score the calls by its rules."""
    from evermini.cli.talk import open_llm
    from evermini.evals import bfcl

    tasks = [
        task
        for category in categories.split(",")
        for task in bfcl.load_tasks(data, category, questions)
    ]
    with open_llm(_fresh(loaded)) as llm:
        name = f"{loaded.settings.models[0].replace('/', '_')}-{choice}.jsonl"
        outcomes = bfcl.run(
            llm,
            tasks,
            out / name,
            workers=workers,
            choice=choice,
            progress=lambda o: print(f"{o.id}: {o.problem or 'right'}", file=sys.stderr),
        )
    print(bfcl.table(outcomes))
    print(f"\nanswers: {out / name}")


@evaluations.command()
@with_settings(*_SETTINGS)
def ifeval(
    loaded: LoadedSettings,
    data: Data = Path("data"),
    out: Out = Path("eval-ifeval"),
    prompts: Annotated[int, typer.Option(min=1, help="The first so many of the 541.")] = 541,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 1280,
    workers: Workers = 32,
) -> None:
    """Run IFEval: are instructions followed that a program can check, such as "no commas"?"""
    from evermini.cli.talk import open_llm
    from evermini.evals.ifeval import read_tasks, run_tasks, write_ifeval_report
    from evermini.evals.run import Results

    tasks = read_tasks(data)[:prompts]
    settings = _fresh(loaded)
    with open_llm(settings) as llm:
        config = {
            "task": "ifeval", "prompts": len(tasks), "max_tokens": max_tokens, "model": settings.models[0],
            "weights": llm.weights, "precision": settings.precision,
        }  # fmt: skip
        results = Results(out, config)
        run_tasks(
            llm, tasks, results, max_tokens=max_tokens, workers=workers,
            progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
        )  # fmt: skip
    path = write_ifeval_report(results)
    print(path.read_text().partition("\n## ")[0].strip())
    print(f"\nreport: {path}")


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


def _fresh(loaded: LoadedSettings) -> Settings:
    """Return the settings without prompts on the disk: they would make times wrong, and these push out a user's."""
    return replace(loaded.settings, prompt_disk=0)


@contextlib.contextmanager
def _session(
    loaded: LoadedSettings, out: Path, config: dict[str, Any], systems: str, tail: str, dense: str
) -> Iterator[tuple[LLM, Results]]:
    """Yield the loaded model and the results so far; what they depend on is kept in the configuration."""
    from evermini.cli.talk import open_llm
    from evermini.evals.run import Results
    from evermini.evals.systems import parse_systems

    chosen = parse_systems(systems)
    _check_packages()
    settings = _fresh(loaded)
    with open_llm(settings) as llm:
        model = {
            "model": settings.models[0],
            "weights": llm.weights,
            "precision": settings.precision,
        }
        rest = {
            "systems": list(chosen),
            "tail_tokens": parse_lengths(tail)[0],
            "dense_tokens": parse_lengths(dense)[0],
        }
        yield llm, Results(out, config | model | rest)


def _check_packages() -> None:
    """Refuse to begin what would fail after hours, when the baseline or the pictures are due."""
    from importlib.util import find_spec

    if missing := [name for name in ("bm25s", "Stemmer", "matplotlib") if find_spec(name) is None]:
        raise ConfigError(
            f"Evaluations need packages that are not installed ({', '.join(missing)}). Run: pip install "
            "'evermini[evals]'"
        )


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
            dense_tokens=results.config["dense_tokens"],
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
