"""The settings: one declaration for each gives its default, flag, help text, environment name, TOML key and docs."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from evermini.config.values import (
    Parsed,
    parse_auto_bytes,
    parse_bytes,
    parse_device,
    parse_list,
    parse_organization,
    parse_path,
)

ENV_PREFIX = "EVERMINI_"
ADAPTER_MEMORY = 1024**3


def default_home() -> Path:
    """Return ``EVERMINI_HOME``, else the user's cache folder for Evermini."""
    from platformdirs import user_cache_path

    named = os.environ.get("EVERMINI_HOME")
    return Path(named).expanduser() if named else user_cache_path("evermini", appauthor=False)


def _setting(
    default: Any,
    help: str,
    *,
    group: str,
    shown: str | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """Declare a setting; ``shown`` is what help and docs say for a default that depends on the machine."""
    meta = {"help": help, "group": group, "shown": shown, "metavar": metavar, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=meta, repr=not secret)
    return field(default=default, metadata=meta, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. Built by `load_settings`, which validates; frozen after that."""

    model: str = _setting(
        "mini",
        "Tier (nano, mini, full), alias, or path of a GGUF file or safetensors folder; TIER=PATH gives a "
        "path a tier's names, NAME=URL has an OpenAI-compatible engine answer. `serve` takes several, separated by "
        "commas.",
        group="Model",
        metavar="MODEL",
    )
    home: Annotated[Path, Parsed(parse_path)] = _setting(
        default_home,
        "Folder for weights, chat history and config.toml.",
        group="Model",
        shown="the user's cache folder, e.g. ~/.cache/evermini",
        metavar="DIR",
    )
    weights_dir: Annotated[Path, Parsed(parse_path)] | None = _setting(
        None,
        "Folder with weights files already at hand, looked in before anything is downloaded.",
        group="Model",
        shown="none",
        metavar="DIR",
    )
    device: Annotated[str, Parsed(parse_device)] = _setting(
        "auto",
        "Where the model runs; auto takes a GPU if there is one.",
        group="Model",
        metavar="auto|cpu|cuda[:N]",
    )
    precision: Literal["auto", "int8", "int6", "int5", "int4", "fp32", "bf16"] = _setting(
        "auto", "Number format of the weights; auto is int8 on a CPU, bf16 on a GPU.", group="Model"
    )
    threads: Annotated[int, Ge(1)] | None = _setting(
        None,
        "CPU threads for the model.",
        group="Model",
        shown="one per physical core",
        metavar="N",
    )
    recall: bool = _setting(
        True,
        "Answer chats longer than the model's window, up to 1,047,576 tokens, from the excerpts that the question "
        "needs.",
        group="Recall",
    )
    recall_index: str = _setting(
        "auto",
        "Model that finds passages in long prompts: own for the one that answers, or a tier, alias or path; auto takes "
        "mini for full and for upstream engines, and own for the rest.",
        group="Recall",
        metavar="auto|own|MODEL",
    )
    sweep_limit: Annotated[int, Ge(0)] = _setting(
        65_536,
        "Longest prompt, in tokens, that is read as a whole without being asked to when a question is about all of it; "
        "beyond it, excerpts are read. Minutes of work on a CPU.",
        group="Recall",
        metavar="N",
    )
    recall_disk: Annotated[int, Parsed(parse_bytes), Ge(1)] = _setting(
        16 * 1024**3,
        "Disk space for the index of long contexts; the least recently used go first.",
        group="Recall",
        shown="16GiB",
        metavar="BYTES",
    )
    upstream_key: str | None = _setting(
        None,
        "API key that upstream engines (NAME=URL) are asked with; NAME=URL?key=VARIABLE names another one's variable.",
        group="Upstream",
        shown="none",
        metavar="KEY",
        secret=True,
    )
    upstream_timeout: Annotated[int, Ge(1), Le(86_400)] = _setting(
        600,
        "Seconds an upstream engine may be silent: until the answer is there, or, in a stream, between two pieces.",
        group="Upstream",
        metavar="SECONDS",
    )
    upstream_parallel: Annotated[int, Ge(1), Le(1024)] = _setting(
        8,
        "Questions of one sweep that an upstream engine is sent at the same time.",
        group="Upstream",
        metavar="N",
    )
    host: str = _setting("127.0.0.1", "Address to listen on.", group="Server", metavar="ADDRESS")
    port: Annotated[int, Ge(0), Le(65535)] = _setting(
        8000, "Port to listen on; 0 picks a free one.", group="Server", metavar="PORT"
    )
    api_key: str | None = _setting(
        None,
        "Key that clients must send as `Authorization: Bearer KEY`; several, separated by commas.",
        group="Server",
        shown="none: no key is asked for",
        metavar="KEY",
        secret=True,
    )
    allow_unauthenticated: bool = _setting(
        False,
        "Listen on an address other machines can reach even though no API key is set.",
        group="Server",
    )
    cors_origins: Annotated[tuple[str, ...], Parsed(parse_list)] = _setting(
        (),
        "Web origins whose pages may call the API from a browser, separated by commas.",
        group="Server",
        shown="none",
        metavar="ORIGINS",
    )
    allow_remote_images: bool = _setting(
        False,
        "Fetch images and files from the addresses that requests name; never from private, loopback or link-local "
        "ones.",
        group="Server",
    )
    database_url: str | None = _setting(
        None,
        "Database of stored answers: `postgresql://USER:PASSWORD@HOST/NAME`, or `sqlite:////PATH`. Several servers may "
        "share one.",
        group="Server",
        shown="the file `evermini.db` in the home folder",
        metavar="URL",
        secret=True,
    )
    blob_url: str | None = _setting(
        None,
        "Where the bytes of files are kept: a folder, or `s3://BUCKET/PREFIX` (extra `s3`; credentials as for the AWS "
        "tools). Servers that share a database share this, too.",
        group="Server",
        shown="the folder `blobs` in the home folder",
        metavar="URL",
    )
    organization: Annotated[str, Parsed(parse_organization)] = _setting(
        "personal",
        "Your organization's part in the names of fine-tuned models, ft:MODEL:ORGANIZATION:SUFFIX:ID.",
        group="Server",
        metavar="NAME",
    )
    conformance_fixtures: bool = _setting(
        False,
        "For tests of the API's form only: any model name is answered to, and the ids that OpenAI's client tests use "
        "exist.",
        group="Server",
    )
    max_request_bytes: Annotated[int, Parsed(parse_bytes), Ge(1)] = _setting(
        64 * 1024**2,
        "Largest request body that is read.",
        group="Server",
        shown="64MiB",
        metavar="SIZE",
    )
    batch_requests: Annotated[int, Ge(1)] = _setting(
        16,
        "Requests of batches that run at the same time, behind those that somebody waits for.",
        group="Server",
        metavar="N",
    )
    drain_timeout: Annotated[int, Ge(0), Le(86_400)] = _setting(
        30,
        "Seconds that running requests get to finish after SIGTERM or Ctrl-C.",
        group="Server",
        metavar="SECONDS",
    )
    machine_price: Annotated[float, Ge(0)] | None = _setting(
        None,
        "What an hour of this machine costs, in US dollars; for `evermini usage`.",
        group="Costs",
        shown="not known",
        metavar="USD",
    )
    machine_watts: Annotated[float, Ge(0)] | None = _setting(
        None,
        "What this machine draws when it is busy; counts where machine_price is not set.",
        group="Costs",
        shown="not known",
        metavar="WATTS",
    )
    electricity_price: Annotated[float, Ge(0)] | None = _setting(
        None,
        "What a kilowatt-hour costs, in US dollars.",
        group="Costs",
        shown="not known",
        metavar="USD",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least severe log line to write.", group="Server"
    )
    log_format: Literal["auto", "text", "json"] = _setting(
        "auto",
        "How log lines are written: text to read, json (an object per line) to collect; auto is text on a terminal and "
        "json elsewhere.",
        group="Server",
    )
    kv_memory: Annotated[int | Literal["auto"], Parsed(parse_auto_bytes)] = _setting(
        "auto",
        "Memory for keys and values of one model: a size, or auto to fit the free memory.",
        group="Engine",
        metavar="SIZE",
    )
    prompt_disk: Annotated[int, Parsed(parse_bytes), Ge(0)] = _setting(
        8 * 1024**3,
        "Disk space for computed prompts of 1,024 tokens or more, so that they need not be computed again after a "
        "restart; the least recently used go first, 0 keeps none. On a CPU only.",
        group="Engine",
        shown="8GiB",
        metavar="SIZE",
    )
    max_batch_tokens: Annotated[int, Gt(0)] = _setting(
        512,
        "Tokens computed in one engine step, prompts and decoding together.",
        group="Engine",
        metavar="N",
    )
    max_num_seqs: Annotated[int, Gt(0)] = _setting(
        64, "Sequences that run at the same time.", group="Engine", metavar="N"
    )
    speculation: Literal["auto", "off"] = _setting(
        "auto",
        "Guess tokens from the prompt or a prediction and verify several in one step where that saves time; the "
        "output is the same.",
        group="Engine",
    )
    adapter_memory: Annotated[int, Parsed(parse_bytes), Ge(1)] = _setting(
        ADAPTER_MEMORY,
        "Memory for the adapters of one model's fine-tuned models; the least recently used go first.",
        group="Engine",
        shown="1GiB",
        metavar="SIZE",
    )
    max_waiting: Annotated[int, Ge(0)] = _setting(
        1024,
        "Requests that may wait for a place; more are refused with 429.",
        group="Engine",
        metavar="N",
    )

    @property
    def models(self) -> tuple[str, ...]:
        """The names in ``model``, in order; the first is the default."""
        return parse_list(self.model)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted API keys; empty: no key is asked for."""
        return parse_list(self.api_key or "")


SettingField = Field[Any]


def setting_fields() -> dict[str, SettingField]:
    """Return the declarations by name, in order."""
    return {item.name: item for item in fields(Settings)}


def flag_name(name: str) -> str:
    """Return the command-line flag of a setting: ``max_num_seqs`` → ``--max-num-seqs``."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """Return the environment variable of a setting: ``port`` → ``EVERMINI_PORT``."""
    return ENV_PREFIX + name.upper()


def shown_default(item: SettingField) -> str:
    """Return a setting's default as help and docs show it, the same on every machine."""
    if item.metadata["shown"] is not None:
        return str(item.metadata["shown"])
    assert item.default is not MISSING, f"{item.name} needs a `shown` text"
    return json.dumps(item.default).strip('"')
