"""Where settings' values come from: flags, the environment, a TOML file, the defaults; and that they are valid."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evermini.config.settings import (
    ENV_PREFIX,
    Settings,
    default_home,
    env_name,
    flag_name,
    setting_fields,
)
from evermini.errors import ConfigError

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
