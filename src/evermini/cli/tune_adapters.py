"""``evermini tune import``, ``export``, ``models``, ``rm`` and ``alias``: adapters in, out, and by name."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings
from evermini.errors import AdapterError, InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from evermini.models.checkpoint import Checkpoint

_STORE = ("home", "database_url", "blob_url")


class Form(enum.StrEnum):
    """What `export` writes."""

    peft = "peft"
    safetensors = "safetensors"
    gguf = "gguf"


@with_settings("model", "weights_dir", *_STORE)
def import_adapter(
    loaded: LoadedSettings,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Folder that peft's save_pretrained wrote, or a LoRA file in GGUF.",
        ),
    ],
    name: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="NAME",
            help="What it answers to: ft:BASE:ORG:SUFFIX:ID.",
            show_default=False,
        ),
    ],
    tier: Annotated[
        str | None,
        typer.Option(
            help="nano, mini or full: the tier whose model it was trained on.",
            show_default="the one that BASE means",
        ),
    ] = None,
) -> None:
    """Import a LoRA adapter; servers answer to its name from the next request on.

    \b
    evermini tune import ./adapter --as ft:gpt-4.1-mini-2025-04-14:acme:support:AbCd1234
    evermini tune import lora.gguf --as ft:gpt-4o-mini-2024-07-18:acme::9x8y7z6w --tier mini
    """  # noqa: D301 (\b, a real backspace, keeps the examples' line breaks in --help)
    import tempfile

    from evermini.models import catalogue
    from evermini.models.lora_files import read_gguf_lora, write_peft
    from evermini.service.adapters import AdapterStore, FineTunedName
    from evermini.storage.database import Database

    settings = loaded.settings
    wanted = tier or FineTunedName.parse(name).tier
    entry = catalogue.find(wanted) if wanted else None
    if entry is None:
        problem = f"There is no tier {tier}" if tier else f"{name} does not tell the tier"
        raise InvalidRequestError(
            f"{problem}. Say --tier nano, mini or full: the one whose model the adapter was trained on."
        )
    if not path.exists():
        raise AdapterError(f"There is nothing at {path}. Give an adapter's folder or GGUF file.")
    base = _base(entry.tier, settings)
    with tempfile.TemporaryDirectory(prefix="evermini-import-") as scratch:
        folder = path
        if path.is_file():
            if path.suffix != ".gguf":
                raise AdapterError(
                    f"{path} is no GGUF file. Give the folder that peft wrote, not a file in it."
                )
            folder = Path(scratch)
            write_peft(read_gguf_lora(path, base.config), folder)
        with Database.open(settings) as database:
            added = AdapterStore.open(settings, database).add(
                folder, name=name, tier=entry.tier, base=base.config
            )
    if added.base_name and entry.model.lower() not in added.base_name.lower():
        typer.echo(
            f"Note: the adapter says that it was trained on {added.base_name}; the tier {entry.tier} is {entry.model}. "
            "The sizes fit, but on another model than its own it will answer badly.",
            err=True,
        )
    print(f"{added.name}: tier {added.tier}, rank {added.rank}, {added.num_bytes / 1e6:.1f} MB")


@with_settings("model", "weights_dir", *_STORE)
def export_model(
    loaded: LoadedSettings,
    name: Annotated[str, typer.Argument(help="A fine-tuned model's name or alias.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="A new folder to write to.", show_default=False)
    ],
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="peft: the adapter alone; safetensors: a Hugging Face folder of the merged model; gguf: one file of "
            "the merged model, for llama.cpp and others.",
        ),
    ] = Form.peft,
) -> None:
    """Write a fine-tuned model for other programs, or to serve it merged (`evermini serve --model mini=DIR`)."""
    from evermini.service.adapters import Adapter, AdapterStore
    from evermini.service.export import export
    from evermini.storage.database import Database

    settings = loaded.settings
    with Database.open(settings) as database:
        store = AdapterStore.open(settings, database)
        adapter = store.find(name)
        if not isinstance(adapter, Adapter):
            raise NotFoundError(f"There is no fine-tuned model {name}. See `evermini tune models`.")
        folder = store.folder(adapter)
    print(export(folder, _base(adapter.tier, settings), form.value, out, adapter.name))


@with_settings(*_STORE)
def list_models(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the fine-tuned models and the aliases."""
    import json
    from datetime import datetime

    from evermini.service.adapters import AdapterStore
    from evermini.storage.database import Database

    with Database.open(loaded.settings) as database:
        store = AdapterStore.open(loaded.settings, database)
        adapters, aliases = store.list(), store.aliases()
    if as_json:
        listed = {
            "models": [
                {
                    "name": adapter.name,
                    "tier": adapter.tier,
                    "rank": adapter.rank,
                    "bytes": adapter.num_bytes,
                    "created_at": adapter.created_at,
                    "sha256": adapter.sha256,
                    "job": adapter.job_id,
                    "base": adapter.base_name,
                }
                for adapter in adapters
            ],
            "aliases": {alias.name: alias.target for alias in aliases},
        }
        print(json.dumps(listed))
        return
    if not adapters and not aliases:
        typer.echo("There are no fine-tuned models. See `evermini tune --help`.", err=True)
    for adapter in adapters:
        at = datetime.fromtimestamp(adapter.created_at).strftime("%Y-%m-%d %H:%M")
        source = adapter.job_id or "imported"
        size = f"{adapter.num_bytes / 1e6:.1f} MB"
        print(f"{adapter.name}  {adapter.tier}  rank {adapter.rank}  {size}  {at}  {source}")
    for alias in aliases:
        print(f"{alias.name}  ->  {alias.target}")


@with_settings(*_STORE)
def delete_models(
    loaded: LoadedSettings,
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="As `models` prints them.")],
) -> None:
    """Delete fine-tuned models, or aliases."""
    from evermini.service.adapters import AdapterStore
    from evermini.storage.database import Database

    with Database.open(loaded.settings) as database:
        store = AdapterStore.open(loaded.settings, database)
        for name in names:
            if not (store.delete(name) or store.delete_alias(name)):
                raise NotFoundError(
                    f"There is no fine-tuned model {name}. See `evermini tune models`."
                )
            print(f"{name} deleted")


@with_settings(*_STORE)
def set_alias(
    loaded: LoadedSettings,
    old: Annotated[
        str, typer.Argument(help="The name that programs go on using, such as an old ft: id.")
    ],
    name: Annotated[str, typer.Argument(help="What it means: a fine-tuned model, or a tier.")],
) -> None:
    """Let a name mean another model, from the next request on; `rm` takes it back."""
    from evermini.service.adapters import AdapterStore
    from evermini.storage.database import Database

    with Database.open(loaded.settings) as database:
        alias = AdapterStore.open(loaded.settings, database).set_alias(old, name)
    print(f"{alias.name}  ->  {alias.target}")


def _base(tier: str, settings: Settings) -> Checkpoint:
    """Return the checkpoint of a tier, fetched if need be."""
    from evermini.cli.pull import download_bar
    from evermini.service.loading import name_of_tier, open_model

    with download_bar(tier) as progress:
        return open_model(name_of_tier(tier, settings), settings, progress=progress)
