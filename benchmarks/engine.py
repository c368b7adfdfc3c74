"""Evermini against llama.cpp on this machine, alternating in one run.

    python benchmarks/engine.py                        # nano and mini, 3 rounds: about an hour on 2 cores
    python benchmarks/engine.py --models mini --rounds 5 --json results.json
    python benchmarks/engine.py --smoke                # does everything work? tiny sizes, minutes

llama.cpp is built natively (`build_llamacpp.py`) and gets its best case for each metric by itself: a scouting round
tries every quantisation (Q4_0, Q8_0, as shipped) with and without flash attention, then the rounds alternate Evermini
and the best of them, A B A B. One side runs at a time, each in fresh processes with the same number of threads. A ratio
above 1 means that Evermini is better; it is the median of the ratios of the rounds.

Nothing else should run meanwhile. Peak memory is that of the process that decodes at depth; of the servers, while they
serve the parallel requests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from build_llamacpp import (
    QUANTISATIONS,
    VERSION,
    LlamaCpp,
    cpu_name,
    ensure_built,
    ensure_quantised,
)
from sides import ALONE, SERVER_RSS, TTFT, Sample, Workload, llamacpp, ours
from sides.llamacpp import Variant

from evermini import __version__
from evermini.errors import EverminiError
from evermini.models.catalogue import CatalogueEntry, find, known_names

FULL = Workload(
    prefill=(512, 4096),
    decode=32,
    depth=4096,
    ttft_prompt=20,
    ttft_repeats=10,
    parallel=8,
    parallel_prompt=64,
    parallel_output=64,
    repeats=3,
    threads=os.cpu_count() or 1,
)
SMOKE = Workload(
    prefill=(32, 64),
    decode=4,
    depth=64,
    ttft_prompt=20,
    ttft_repeats=2,
    parallel=8,
    parallel_prompt=8,
    parallel_output=4,
    repeats=1,
    threads=os.cpu_count() or 1,
)


@dataclass
class Results:
    """All samples of one model: Evermini's by round, llama.cpp's by variant and round (0 is the scouting round)."""

    model: str
    workload: Workload
    ours: list[Sample] = field(default_factory=list)
    theirs: dict[str, dict[int, Sample]] = field(default_factory=dict)

    @property
    def units(self) -> dict[str, str]:
        """The unit of every metric."""
        return self.workload.units()

    def is_better(self, metric: str, a: float, b: float) -> bool:
        """Return whether ``a`` is the better value."""
        return a > b if self.units[metric] == "tok/s" else a < b

    def note(self, variant: str, turn: int, sample: Sample) -> None:
        """Add what llama.cpp did."""
        self.theirs.setdefault(variant, {}).setdefault(turn, {}).update(sample)

    def best(self, metric: str) -> str | None:
        """Return llama.cpp's best variant for a metric, by the scouting round."""
        found: str | None = None
        for variant, turns in self.theirs.items():
            value = turns.get(0, {}).get(metric)
            if value is not None and (
                found is None or self.is_better(metric, value, self.theirs[found][0][metric])
            ):
                found = variant
        return found

    def wanted(self, variant: str) -> set[str]:
        """Return the metrics that a variant is the best for."""
        return {metric for metric in self.units if self.best(metric) == variant}

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of the report per metric, medians over the rounds."""
        rows = []
        for metric, unit in self.units.items():
            variant = self.best(metric)
            turns = self.theirs.get(variant or "", {})
            pairs = [
                (mine[metric], turns[turn][metric])
                for turn, mine in enumerate(self.ours, start=1)
                if metric in mine and metric in turns.get(turn, {})
            ]
            if pairs:
                ratios = [a / b if unit == "tok/s" else b / a for a, b in pairs]
                rows.append(
                    {
                        "metric": metric,
                        "unit": unit,
                        "evermini": statistics.median(a for a, _ in pairs),
                        "llama.cpp": statistics.median(b for _, b in pairs),
                        "variant": variant,
                        "ratio": statistics.median(ratios),
                        "ratios": ratios,
                    }
                )
        return rows


def run_model(
    llama: LlamaCpp,
    entry: CatalogueEntry,
    workload: Workload,
    rounds: int,
    quantisations: Iterable[str],
    log: Path,
) -> Results:
    """Scout llama.cpp's variants, then alternate."""
    results = Results(entry.tier, workload)
    files = {q: ensure_quantised(llama, entry, q) for q in quantisations}
    variants = {
        v.name: v for q, file in files.items() for v in (Variant(q, file, f) for f in (True, False))
    }
    for name, variant in variants.items():
        say(f"{entry.tier}: scouting llama.cpp {name}")
        results.note(name, 0, llamacpp.engine_sample(llama, variant, workload, results.units))
        results.note(name, 0, llamacpp.server_sample(llama, variant, workload, log))
    for turn in range(1, rounds + 1):
        say(f"{entry.tier}: round {turn} of {rounds}: engine, Evermini")
        mine, eos_ids = ours.engine_sample(entry.tier, workload)
        best = {name: metrics for name in variants if (metrics := results.wanted(name))}
        for name, metrics in best.items():
            say(f"{entry.tier}: round {turn} of {rounds}: engine, llama.cpp {name}")
            sample = llamacpp.engine_sample(llama, variants[name], workload, metrics)
            results.note(name, turn, sample)
        say(f"{entry.tier}: round {turn} of {rounds}: server, Evermini")
        mine |= ours.server_sample(entry.tier, workload, eos_ids, log)
        results.ours.append(mine)
        for name, metrics in best.items():
            if metrics & server_metrics(workload):
                say(f"{entry.tier}: round {turn} of {rounds}: server, llama.cpp {name}")
                sample = llamacpp.server_sample(llama, variants[name], workload, log)
                results.note(name, turn, sample)
    return results


def server_metrics(workload: Workload) -> set[str]:
    """Return the metrics that a server is needed for."""
    return {TTFT, ALONE, workload.together, SERVER_RSS}


def table(results: Results) -> str:
    """Return a Markdown table."""
    lines = [
        f"{results.model}, {len(results.ours)} rounds",
        "",
        "| | Evermini | llama.cpp, best variant | ratio |",
        "|---|---|---|---|",
    ]
    for row in results.rows():
        unit = row["unit"]
        lines.append(
            f"| {row['metric']} | {row['evermini']:.4g} {unit} | {row['llama.cpp']:.4g} {unit} "
            f"({row['variant']}) | {row['ratio']:.2f} |"
        )
    found = {row["metric"]: row for row in results.rows()}
    alone, together = found.get(ALONE), found.get(results.workload.together)
    if alone and together:
        gains = [together[side] / alone[side] for side in ("evermini", "llama.cpp")]
        lines.append(f"| {together['metric']} / alone | {gains[0]:.2f}x | {gains[1]:.2f}x | |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="TIER", help="default: nano mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=FULL.threads, help="of each side")
    parser.add_argument("--quantisations", nargs="+", default=[*QUANTISATIONS, "shipped"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nano, one round")
    options = parser.parse_args()
    models = options.models or (["nano"] if options.smoke else ["nano", "mini"])
    entries = [entry for entry in map(find, models) if entry is not None]
    if len(entries) < len(models):
        parser.error(f"known models: {', '.join(known_names())}")
    workload = Workload(**asdict(SMOKE if options.smoke else FULL) | {"threads": options.threads})
    if (load := os.getloadavg()[0]) > 0.5:
        say(f"Warning: the machine is busy (load {load:.1f}); the figures will suffer.")

    report: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"evermini": __version__, "llama.cpp": VERSION},
        "models": {},
    }
    llama = ensure_built()
    with tempfile.TemporaryDirectory() as folder:
        for entry in entries:
            chosen = [entry.quantisation if q == "shipped" else q for q in options.quantisations]
            rounds = 1 if options.smoke else options.rounds
            log = Path(folder) / "server.log"
            results = run_model(llama, entry, workload, rounds, dict.fromkeys(chosen), log)
            print(f"\n{table(results)}\n", flush=True)
            samples = asdict(results) | {"rows": results.rows()}
            report["models"][entry.tier] = samples
            if options.json:
                options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    try:
        main()
    except (EverminiError, RuntimeError) as error:
        sys.exit(f"Error: {error}")
