"""Settings: one declaration per setting gives its default, flag, help text, environment name, TOML key and docs.

Precedence, highest first:

    flag (--port 9000)  >  EVERMINI_PORT=9000  >  port = 9000 in a TOML file  >  default

One TOML file is read: ``--config``, else ``EVERMINI_CONFIG``, else ``./evermini.toml``, else ``config.toml`` in the
home folder. A key or ``EVERMINI_*`` variable that is not a setting is an error that names the closest one: a typo must
not leave a server running with a default nobody asked for. ``evermini config`` shows each value and its origin.

This module is on the path of ``evermini --help``, so it imports neither pydantic (needed only to validate) nor torch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from evermini.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

ENV_PREFIX = "EVERMINI_"
OTHER_ENV = {
    "EVERMINI_CONFIG": "Path of the settings file; `--config` wins.",
    "EVERMINI_DEBUG": "Set: the command line shows tracebacks, as with `--debug`.",
    "EVERMINI_EVAL_DATA": "Folder of the data sets that `evermini eval` takes its texts from; `--data` wins.",
    "EVERMINI_KERNELS": "0: compute with PyTorch operations instead of the native CPU kernels.",
}
"""Variables of ours that are not settings, with what they do."""
FOREIGN_ENV_PREFIXES = ("EVERMINI_TEST_", "EVERMINI_BENCH_")
"""Variables that only the tests and the benchmarks read."""
FILE_NAME = "evermini.toml"

ADAPTER_MEMORY = 1024**3

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(value: object) -> int:
    """Return bytes from ``4096``, ``"512MiB"``, ``"4G"`` (binary, as GiB) or ``"4 GB"`` (decimal).

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError("expected a size in bytes such as 4096, 512MiB or 4GiB")
        number, unit = float(match[1]), match[2].lower()
    return int(number * _UNITS[unit])


def _parse_auto_bytes(value: object) -> int | Literal["auto"]:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "auto"') from None


def _parse_list(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part for part in (part.strip() for part in value.split(",")) if part)
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ValueError("expected a list of strings, or one string separated by commas")


def _parse_device(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("expected auto, cpu, cuda or cuda:N")


def _parse_organization(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        return value
    raise ValueError("expected up to 64 letters, digits, '-', '_' and '.'")


def _parse_path(value: object) -> Path:
    if isinstance(value, str | Path):
        return Path(value).expanduser()
    raise ValueError("expected a path")


@dataclass(frozen=True)
class _Parsed:
    """Annotation: pydantic runs ``parse`` on the raw value before it checks the type."""

    parse: Callable[[object], object]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.parse, handler(source))


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
    home: Annotated[Path, _Parsed(_parse_path)] = _setting(
        default_home,
        "Folder for weights, chat history and config.toml.",
        group="Model",
        shown="the user's cache folder, e.g. ~/.cache/evermini",
        metavar="DIR",
    )
    weights_dir: Annotated[Path, _Parsed(_parse_path)] | None = _setting(
        None,
        "Folder with weights files already at hand, looked in before anything is downloaded.",
        group="Model",
        shown="none",
        metavar="DIR",
    )
    device: Annotated[str, _Parsed(_parse_device)] = _setting(
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
    recall_disk: Annotated[int, _Parsed(parse_bytes), Ge(1)] = _setting(
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
    cors_origins: Annotated[tuple[str, ...], _Parsed(_parse_list)] = _setting(
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
    organization: Annotated[str, _Parsed(_parse_organization)] = _setting(
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
    max_request_bytes: Annotated[int, _Parsed(parse_bytes), Ge(1)] = _setting(
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
    kv_memory: Annotated[int | Literal["auto"], _Parsed(_parse_auto_bytes)] = _setting(
        "auto",
        "Memory for keys and values of one model: a size, or auto to fit the free memory.",
        group="Engine",
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
    adapter_memory: Annotated[int, _Parsed(parse_bytes), Ge(1)] = _setting(
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
        return _parse_list(self.model)

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The accepted API keys; empty: no key is asked for."""
        return _parse_list(self.api_key or "")


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


@dataclass(frozen=True)
class LoadedSettings:
    """Validated settings and, for each, where the value came from (``"flag --port"``, ``"default"``, …)."""

    settings: Settings
    sources: Mapping[str, str]
    file: Path | None


def load_settings(
    flags: Mapping[str, object] | None = None,
    *,
    config: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    flag_label: Callable[[str], str] = lambda name: f"flag {flag_name(name)}",
) -> LoadedSettings:
    """Merge flags, environment, TOML file and defaults, and validate the result.

    Args:
        flags: Explicitly given values by setting name; ``None`` values count as not given.
        config: TOML file to read instead of looking for one.
        env: Environment; default ``os.environ``.
        cwd: Folder searched for ``evermini.toml``; default the working directory.
        flag_label: How a flag is named in sources and errors.

    Raises:
        ConfigError: A key is unknown, a value is malformed, or the file cannot be read.
    """
    env = os.environ if env is None else env
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    _refuse_unknown(given, "setting", lambda name: name)
    from_env = _read_env(env)
    home = given.get("home") or from_env.get("home") or default_home()
    file = _find_file(config, env, cwd or Path.cwd(), Path(str(home)).expanduser())
    from_file = _read_file(file) if file is not None else {}

    values: dict[str, object] = {}
    sources = dict.fromkeys(setting_fields(), "default")
    layers: list[tuple[Mapping[str, object], Callable[[str], str]]] = [
        (from_file, lambda name: f"file {file}"),
        (from_env, lambda name: f"environment {env_name(name)}"),
        (given, flag_label),
    ]
    for layer, label in layers:
        for name, value in layer.items():
            values[name] = value
            sources[name] = label(name)
    return LoadedSettings(_validate(values, sources), sources, file)


def _read_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings in the environment; an empty variable counts as unset."""
    ours = {
        key: value
        for key, value in env.items()
        if key.startswith(ENV_PREFIX)
        and key not in OTHER_ENV
        and not key.startswith(FOREIGN_ENV_PREFIXES)
    }
    by_name = {key.removeprefix(ENV_PREFIX).lower(): value for key, value in ours.items()}
    _refuse_unknown(by_name, "environment variable", env_name)
    return {name: value for name, value in by_name.items() if value}


def _find_file(config: Path | None, env: Mapping[str, str], cwd: Path, home: Path) -> Path | None:
    named = config or (Path(env["EVERMINI_CONFIG"]) if env.get("EVERMINI_CONFIG") else None)
    if named is not None:
        if not named.expanduser().is_file():
            raise ConfigError(
                f"The settings file {named} does not exist. Correct the path given with --config or "
                "EVERMINI_CONFIG, or leave it out."
            )
        return named.expanduser()
    return next((path for path in (cwd / FILE_NAME, home / "config.toml") if path.is_file()), None)


def _read_file(path: Path) -> dict[str, object]:
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"The settings file {path} cannot be read: {error}. Correct or remove it."
        ) from error
    _refuse_unknown(content, f"key in {path}", lambda name: name)
    return content


def _refuse_unknown(given: Mapping[str, object], what: str, spell: Callable[[str], str]) -> None:
    known = list(setting_fields())
    for name in given:
        if name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {spell(close[0])}?" if close else "`evermini config` lists them all."
        raise ConfigError(f"Unknown {what} {spell(name)}. {hint}", param=name)


def _validate(values: Mapping[str, object], sources: Mapping[str, str]) -> Settings:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Settings).validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = str(problem["loc"][0])
        secret = setting_fields()[name].metadata["secret"]
        value = "(hidden)" if secret else repr(values[name])
        reason = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{name} = {value} (from {sources[name]}) is not valid: {reason[:1].lower()}{reason[1:]}.",
            param=name,
        ) from None
