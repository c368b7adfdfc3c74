"""``evermini doctor``: what machine this is, what fits on it, what is missing and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evermini import __version__
from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings

if TYPE_CHECKING:
    from evermini.cli.machine import Gpu
    from evermini.models.catalogue import CatalogueEntry
    from evermini.service.machine import Memory

DISK_SHARE = 3
"""Disk space a tier takes, as a multiple of its download: the weights as they come, and quantised for this CPU."""


@dataclass(frozen=True)
class Problem:
    """Something missing; without what is ``required``, nothing works."""

    required: bool
    what: str
    remedy: str


@with_settings("model", "home", "device", "prompt_disk", "database_url", "blob_url", "upstream_key")
def doctor(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what machine this is, which tiers fit, and what is missing.

    Exit code 1 if something required is missing.
    """
    report = examine(loaded.settings)
    print(json.dumps(report, indent=2)) if as_json else _print(report)
    if any(problem["required"] for problem in report["problems"]):
        raise typer.Exit(1)


def examine(settings: Settings) -> dict[str, Any]:
    """Return all findings, ready for JSON."""
    from evermini.cli import machine

    missing = machine.missing_packages()
    problems = [
        Problem(True, f"package {name}", f"{sys.executable} -m pip install '{name.split(' (')[0]}'")
        for name in missing
    ]
    report: dict[str, Any] = {
        "evermini": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": dataclasses.asdict(machine.cpu()),
    }
    if missing:  # the rest needs the packages
        return report | {"problems": [dataclasses.asdict(problem) for problem in problems]}

    from evermini.service.machine import memory as machine_memory

    memory, gpus = machine_memory(), machine.gpus()
    report["memory"] = dataclasses.asdict(memory)
    report["gpus"] = [dataclasses.asdict(gpu) for gpu in gpus]
    report["torch"] = machine.torch_version()
    report["native_kernels"] = _native_kernels(problems)
    report["home"] = _home(settings, problems)
    report["prompts"] = _prompts(settings)
    report["storage"] = _storage(settings, problems)
    report["upstreams"] = _upstreams(settings, problems)
    use_gpu = bool(gpus) and settings.device != "cpu"
    report["tiers"] = _tiers(settings, memory, gpus if use_gpu else [])
    if settings.device.startswith("cuda") and not gpus:
        problems.append(
            Problem(True, f"a GPU for device = {settings.device}", "set device to auto or cpu")
        )
    if not any(tier["fits"] for tier in report["tiers"]):
        problems.append(
            Problem(
                True, "memory for the smallest tier", "close programs, or take a larger machine"
            )
        )
    report["problems"] = [dataclasses.asdict(problem) for problem in problems]
    return report


def _native_kernels(problems: list[Problem]) -> dict[str, Any]:
    import logging

    from evermini import kernels

    logging.getLogger("evermini.kernels").setLevel(logging.ERROR)  # it is told below instead
    reason = kernels.unavailable_reason()
    if reason is not None:
        problems.append(
            Problem(
                False,
                f"native kernels ({reason}); models run several times slower on PyTorch operations",
                "unset EVERMINI_KERNELS"
                if os.environ.get("EVERMINI_KERNELS") == "0"
                else "install a C compiler with OpenMP (Debian: apt install gcc)",
            )
        )
    return {"available": reason is None, "reason": reason}


def _storage(settings: Settings, problems: list[Problem]) -> dict[str, Any]:
    from evermini.errors import EverminiError
    from evermini.storage.blobs import BlobStore
    from evermini.storage.database import Database

    checks: dict[str, Callable[[], object]] = {
        "database": lambda: Database.open(settings).close(),
        "files": lambda: BlobStore.open(settings).check(),
    }
    report: dict[str, Any] = {}
    for name, check in checks.items():
        try:
            check()
        except EverminiError as error:
            report[name] = error.message
            problems.append(
                Problem(
                    True,
                    f"working storage of {name}: {error.message}",
                    "see database_url, blob_url",
                )
            )
        else:
            report[name] = None
    return report


def _upstreams(settings: Settings, problems: list[Problem]) -> list[dict[str, Any]]:
    """Ask the engines that the setting ``model`` names what they serve."""
    import asyncio

    from evermini.backends.client import UpstreamClient
    from evermini.backends.discover import discover
    from evermini.backends.spec import parse_upstream
    from evermini.errors import EverminiError

    rows: list[dict[str, Any]] = []
    for name in settings.models:
        row: dict[str, Any] = {
            "name": name,
            "url": None,
            "model": None,
            "window": None,
            "images": None,
        }
        try:
            if (spec := parse_upstream(name)) is None:
                continue
            row |= {"name": spec.name, "url": spec.url}
            client = UpstreamClient(
                spec.url, key=spec.key(settings.upstream_key), timeout=settings.upstream_timeout
            )
            found = asyncio.run(discover(client, spec))
        except EverminiError as error:
            problems.append(
                Problem(
                    True,
                    f"an engine behind {row['name']} ({row['url'] or 'no URL'}): {error.message}",
                    "start it, or correct the setting model (docs/upstream.md)",
                )
            )
        else:
            row |= {"model": found.model, "window": found.window, "images": found.sees}
            if found.window is None:
                problems.append(
                    Problem(
                        False,
                        f"the window of the engine behind {spec.name}, which it does not tell",
                        "say it: ?window=TOKENS",
                    )
                )
        rows.append(row)
    return rows


def _home(settings: Settings, problems: list[Problem]) -> dict[str, Any]:
    from evermini.models.store import free_bytes

    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK)
    if not writable:
        problems.append(
            Problem(
                True,
                f"permission to write to {settings.home}",
                "set EVERMINI_HOME to a folder of yours",
            )
        )
    return {"path": str(settings.home), "writable": writable, "free": free_bytes(settings.home)}


def _prompts(settings: Settings) -> dict[str, Any]:
    from evermini.service.prompt_cache import prompts_on_disk

    num_blocks, num_bytes = prompts_on_disk(settings.home)
    return {"blocks": num_blocks, "bytes": num_bytes, "limit": settings.prompt_disk}


def _tiers(settings: Settings, memory: Memory, gpus: list[Gpu]) -> list[dict[str, Any]]:
    from rich.filesize import decimal

    from evermini.models.catalogue import CATALOGUE
    from evermini.models.store import ModelStore, free_bytes

    store = ModelStore(settings.home)
    free_disk = free_bytes(settings.home)
    rows = []
    for entry in CATALOGUE:
        cached = store.is_trusted(entry)
        lacks = _lacks(entry, memory, gpus)
        if not cached and free_disk < DISK_SHARE * entry.size:
            lacks.append(f"{decimal(DISK_SHARE * entry.size - free_disk)} of disk")
        rows.append(
            {
                "tier": entry.tier,
                "model": entry.model,
                "cached": cached,
                "download": 0 if cached else entry.size,
                "memory_needed": entry.memory,
                "fits": not lacks,
                "lacks": lacks,
            }
        )
    return rows


def _lacks(entry: CatalogueEntry, memory: Memory, gpus: list[Gpu]) -> list[str]:
    from rich.filesize import decimal

    available = max((gpu.free_memory for gpu in gpus), default=memory.available)
    if available >= entry.memory:
        return []
    return [f"{decimal(entry.memory - available)} of {'GPU ' if gpus else ''}memory"]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)

    def line(name: str, text: str) -> None:
        console.print(f"[bold]{name:<9}[/bold] {escape(text)}")

    cpu = report["cpu"]
    line("evermini", f"{report['evermini']}, Python {report['python']}, {report['platform']}")
    line(
        "cpu",
        f"{cpu['name']} ({cpu['architecture']}): {cpu['usable_cores']} cores, {cpu['logical_cpus']} threads",
    )
    line("", " ".join(cpu["isa"]) or "no instruction sets known to matter")
    if "memory" in report:
        memory, home, native = report["memory"], report["home"], report["native_kernels"]
        line("memory", f"{decimal(memory['available'])} free of {decimal(memory['total'])}")
        shown = [f"{gpu['name']}: {decimal(gpu['free_memory'])} free" for gpu in report["gpus"]]
        line("gpu", "; ".join(shown) or "none that torch can use")
        line("torch", report["torch"])
        line(
            "kernels",
            "native" if native["available"] else f"PyTorch operations: {native['reason']}",
        )
        line("home", f"{home['path']}: {decimal(home['free'])} free")
        prompts = report["prompts"]
        limit = f"of {decimal(prompts['limit'])}" if prompts["limit"] else "(prompt_disk = 0)"
        line("prompts", f"{decimal(prompts['bytes'])} {limit} computed and kept on the disk")
        for tier in report["tiers"]:
            weights = "weights here" if tier["cached"] else f"fetches {decimal(tier['download'])}"
            verdict = "fits" if tier["fits"] else "lacks " + ", ".join(tier["lacks"])
            needs = decimal(tier["memory_needed"])
            line(tier["tier"], f"{tier['model']}: {weights}, needs {needs} of memory: {verdict}")
        for upstream in report["upstreams"]:
            if upstream["model"] is not None:
                window = (
                    f"window {upstream['window']:,}" if upstream["window"] else "window not known"
                )
                images = {
                    True: "as they are",
                    False: "as text",
                    None: "as text: it does not say if it sees",
                }[upstream["images"]]
                line(
                    upstream["name"],
                    f"{upstream['url']} runs {upstream['model']}: {window}, images {images}",
                )
    for problem in report["problems"]:
        console.print(
            f"[{'red' if problem['required'] else 'yellow'}]missing[/]   {escape(problem['what'])}"
        )
        console.print(f"          {escape(problem['remedy'])}")
    if not report["problems"]:
        console.print("[green]Nothing is missing.[/green]")
