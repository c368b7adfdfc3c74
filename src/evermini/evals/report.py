"""Tables, heat maps and one JSON file of a run's results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evermini.errors import ConfigError
from evermini.evals.run import Results, Row, machine

Group = tuple[Any, ...]


def write_report(
    results: Results,
    title: str,
    intro: str,
    *,
    sections: Sequence[str] = (),
    breakdown: str | None = "kind",
    with_maps: bool = True,
    figures: Row | None = None,
) -> Path:
    """Write ``report.md``, ``report.json`` and the heat maps beside the results; return the first one's path.

    Args:
        results: What was answered.
        title: Headline.
        intro: What was run.
        sections: More Markdown, put before the tables.
        breakdown: Label that recall's results are also shown by.
        with_maps: Draw depth against length.
        figures: More figures for ``report.json``.
    """
    rows = results.rows
    parts = [f"# {title}", intro, *sections, summary_table(rows)]
    if breakdown and any(breakdown in row for row in rows):
        parts += [f"## Recall, by {breakdown}", breakdown_table(rows, breakdown)]
    if with_maps:
        for name in draw_maps(rows, results.folder):
            parts.append(f"![{name}]({name})")
    parts += ["## Wrong answers of recall", wrong_answers(rows)]
    facts = machine()
    parts += [
        "## How it was run",
        "\n".join(f"- {key}: {value}" for key, value in (results.config | facts).items()),
    ]
    report = {"config": results.config, "machine": facts, "figures": figures or {}, "rows": rows}
    (results.folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1))
    path = results.folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, rule, *lines])


def summary_table(rows: Sequence[Row]) -> str:
    """Return found and answered by length and system."""
    groups = grouped(rows, lambda row: (row["length"], row["system"]))
    return table(
        [
            "tokens",
            "system",
            "questions",
            "found",
            "answered",
            "found, yet wrong",
            "tokens read",
            "seconds",
        ],
        [[f"{length:,}", system, *figures(found)] for (length, system), found in groups],
    )


def score_table(rows: Sequence[Row], label: str, means: Mapping[str, Sequence[str]]) -> str:
    """Return mean scores by a label (a line each) for every length and system (a column each).

    Args:
        rows: Results.
        label: What the lines are.
        means: More lines: a name, and the labels that it is the mean of.
    """
    columns = sorted({(row["length"], row["system"]) for row in rows})
    names = list(dict.fromkeys(str(row[label]) for row in rows))

    def score(name: str, column: tuple[int, str]) -> float | None:
        found = [
            r["score"] for r in rows if (r["length"], r["system"]) == column and r[label] == name
        ]
        return statistics.mean(found) if found else None

    lines = [[name, *(_share(score(name, column)) for column in columns)] for name in names]
    for title, members in means.items():
        cells = [title]
        for column in columns:
            scores = [score(name, column) for name in members]
            whole = [value for value in scores if value is not None]
            is_whole = bool(whole) and len(whole) == len(scores)
            cells.append(_share(statistics.mean(whole) if is_whole else None))
        lines.append(cells)
    return table([label, *(f"{_short(n)} {system}" for n, system in columns)], lines)


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def breakdown_table(rows: Sequence[Row], label: str) -> str:
    """Return recall's found and answered by a label."""
    own = [row for row in rows if row["system"] == "recall" and label in row]
    groups = grouped(own, lambda row: (str(row[label]),))
    return table(
        [label, "questions", "found", "answered", "found, yet wrong", "tokens read", "seconds"],
        [[key, *figures(found)] for (key,), found in groups],
    )


def figures(rows: Sequence[Row]) -> list[str]:
    """Return the cells of a group: questions, found, answered, found yet wrong, tokens read, seconds.

    Seconds are the median without each case's first question, which reads the text.
    """
    found = [row["found"] for row in rows if row["found"] is not None]
    warm = [row["seconds"] for row in rows if not row["is_first"]]
    return [
        str(len(rows)),
        percent(statistics.mean(found)) if found else "",
        percent(statistics.mean(row["score"] for row in rows)),
        str(sum(row["found"] == 1 and row["score"] < 1 for row in rows)),
        f"{statistics.mean(row['read_tokens'] for row in rows):,.0f}",
        f"{statistics.median(warm):.1f}" if warm else "",
    ]


def percent(share: float) -> str:
    """Return a share as per cent."""
    return f"{100 * share:.3g} %"


def wrong_answers(rows: Sequence[Row], most: int = 40) -> str:
    """List recall's wrong answers and whose fault they are."""
    wrong = [row for row in rows if row["system"] == "recall" and row["score"] < 1]
    if not wrong:
        return "None."
    lines = [
        [
            row["case"],
            row.get("depth", ""),
            _cell(row["asked"]),
            _cell(", ".join(ways[0] for ways in row["wanted"])),
            _cell(row["answer"]),
            "" if row["found"] is None else percent(row["found"]),
        ]
        for row in wrong[:most]
    ]
    more = f"\n\n{len(wrong) - most} more are in report.json." if len(wrong) > most else ""
    return table(["case", "depth", "asked", "wanted", "answered", "found"], lines) + more


def _cell(text: str, most: int = 160) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[:most] + " ..."


def grouped(rows: Sequence[Row], key: Callable[[Row], Group]) -> list[tuple[Group, list[Row]]]:
    """Return the rows by key, the keys in order."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.items())


def draw_maps(rows: Sequence[Row], folder: Path) -> list[str]:
    """Draw depth against length for each system; return the files' names.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "The heat maps need the package matplotlib. Run: pip install 'evermini[evals]'"
        ) from error
    names = []
    for (system,), own in grouped([r for r in rows if "depth" in r], lambda row: (row["system"],)):
        lengths = sorted({row["length"] for row in own})
        depths = sorted({_tens(row) for row in own})
        figure = Figure(figsize=(3 + 1.5 * len(lengths), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for number, (field, title) in enumerate(
            (("found", "passage found"), ("score", "answered"))
        ):
            axes = figure.add_subplot(1, 2, number + 1)
            cells = [[_mean(own, field, length, depth) for length in lengths] for depth in depths]
            image = axes.imshow(cells, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            axes.set_title(f"{system}: {title}", fontsize=10)
            axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
            axes.set_xlabel("tokens")
            if not number:
                axes.set_ylabel("depth")
            for y, line in enumerate(cells):
                for x, value in enumerate(line):
                    if value == value:
                        axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, ax=figure.axes, label="%", shrink=0.8)
        names.append(f"{system}.png")
        figure.savefig(folder / names[-1], dpi=80)
    return names


def _tens(row: Row) -> int:
    return 10 * round(int(row["depth"]) / 10)


def _mean(rows: Sequence[Row], field: str, length: int, depth: int) -> float:
    """Return the mean in per cent; not a number where there is nothing."""
    found = [row[field] for row in rows if row["length"] == length and _tens(row) == depth]
    return 100 * statistics.mean(found) if found else float("nan")


def _short(length: int) -> str:
    return f"{length // 1024}k" if length < 1_000_000 else "1M"
