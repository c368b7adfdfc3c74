"""How an upstream engine is named in the setting ``model``.

    mini=http://10.0.0.5:8000/v1
    qwen=https://gpu.example/v1?model=Qwen/Qwen3-32B&window=32768&key=VLLM_KEY

Before the first ``=``, the name that clients say: a tier, which brings its aliases, or any other. Behind the ``?``,
what the engine does not tell by itself: ``model``, its own name for the model; ``window``, in tokens; ``images``,
``yes`` if the model looks at images and ``no`` if it should get their text; ``key``, the environment variable that
holds its API key.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from evermini.errors import ConfigError

_SPEC = re.compile(r"(?:([^=?#]+)=)?(https?://.*)", re.IGNORECASE)
_IMAGES = {"yes": True, "no": False}
_EXAMPLE = "mini=http://127.0.0.1:8080/v1"


@dataclass(frozen=True)
class UpstreamSpec:
    """An upstream engine as the settings name it.

    Attributes:
        name: What clients call it: a tier or a name of its own.
        url: Its base URL, which usually ends in ``/v1``; without a slash at the end.
        model: Its own name for the model; ``None``: it has one only, or one of that name.
        window: Tokens of prompt and answer that it takes; ``None``: it is asked.
        key_variable: The environment variable with its API key; ``None``: the setting ``upstream_key``.
        images: Images are passed on; false: their text is; ``None``: it is asked what it takes.
    """

    name: str
    url: str
    model: str | None = None
    window: int | None = None
    key_variable: str | None = None
    images: bool | None = None

    def key(self, default: str | None) -> str | None:
        """Return the engine's API key.

        Args:
            default: The key of engines that name no variable.

        Raises:
            ConfigError: The variable is not set.
        """
        if self.key_variable is None:
            return default
        if key := os.environ.get(self.key_variable):
            return key
        raise ConfigError(
            f"{self.name}={self.url}: the environment variable {self.key_variable} is not set. It should hold the key.",
            param="model",
        )


def parse_upstream(text: str) -> UpstreamSpec | None:
    """Return the engine that a value of ``model`` names, or ``None`` if it names a model of our own.

    Raises:
        ConfigError: It begins like one and is none.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        return None
    name, url = match[1], match[2]
    if name is None:
        raise _wrong(text, f"it has no name. Write NAME=URL, such as {_EXAMPLE}")
    parts = urlsplit(url)
    if not parts.hostname or parts.fragment:
        raise _wrong(text, f"this is no base URL. Write one such as {_EXAMPLE}")
    if parts.username is not None:
        raise _wrong(
            text, "keys do not belong into the URL. Set upstream_key, or name a variable: ?key=NAME"
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(options.keys() - {"model", "window", "key", "images"}):
        raise _wrong(
            text, f"it has no option '{unknown[0]}'. There are model, window, images and key"
        )
    window = options.get("window")
    if window is not None and not (re.fullmatch(r"[0-9]{1,9}", window) and int(window) > 0):
        raise _wrong(text, "window is a number of tokens, such as 32768")
    images = options.get("images")
    if images is not None and images not in _IMAGES:
        raise _wrong(text, "images is 'yes' or 'no'")
    base = urlunsplit((parts.scheme.lower(), parts.netloc, parts.path.rstrip("/"), "", ""))
    return UpstreamSpec(
        name=name.strip(),
        url=base,
        model=options.get("model") or None,
        window=int(window) if window else None,
        key_variable=options.get("key") or None,
        images=None if images is None else _IMAGES[images],
    )


def _wrong(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"model = {text!r} does not name an upstream engine: {reason}.", param="model"
    )
