"""What an upstream engine says of itself: which model it serves, and how long prompt and answer may be.

vLLM and SGLang list ``max_model_len`` with their models, an Evermini ``context_window``; llama-server tells the context
of one slot under ``/props``. For engines that tell nothing (OpenAI's own API), ``?window=`` says it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evermini.backends.client import UpstreamClient, not_compatible
from evermini.backends.spec import UpstreamSpec
from evermini.errors import UpstreamError


@dataclass(frozen=True)
class Found:
    """An engine as it is.

    Attributes:
        model: Its name for the model.
        window: Tokens of prompt and answer together; ``None``: it does not say.
    """

    model: str
    window: int | None


async def discover(client: UpstreamClient, spec: UpstreamSpec) -> Found:
    """Ask an engine what it serves.

    Raises:
        UpstreamError: It cannot be reached, is no OpenAI-compatible engine, or does not have the model.
    """
    body = await client.look("/models")
    listed = body.get("data") if body is not None else None
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in listed
    ):
        raise not_compatible(client.url)
    entries: dict[str, dict[str, Any]] = {entry["id"]: entry for entry in listed}
    name = _choose(list(entries), spec)
    window = spec.window or _window(entries[name])
    if window is None:
        window = await _window_of_slot(client)
    return Found(name, window)


def _choose(names: list[str], spec: UpstreamSpec) -> str:
    if spec.model is not None:
        if spec.model in names:
            return spec.model
        reason = f"has no model {spec.model}"
    elif spec.name in names:
        return spec.name
    elif len(names) == 1:
        return names[0]
    else:
        reason = "has several models, none of them by that name" if names else "has no model"
    there = f" It has: {', '.join(names[:20])}." if names else ""
    raise UpstreamError(
        f"The engine behind {spec.name} {reason}.{there} Its operator names one with ?model=NAME."
    )


def _window(entry: dict[str, Any]) -> int | None:
    return _tokens(entry.get("max_model_len")) or _tokens(entry.get("context_window"))


async def _window_of_slot(client: UpstreamClient) -> int | None:
    """Return llama-server's window: that of a slot, not the one the model was trained for."""
    try:
        props = await client.look("/props", root=True) or {}
    except UpstreamError:  # it lists its models, so it is there; it keeps this to itself
        return None
    settings = props.get("default_generation_settings")
    return _tokens(settings.get("n_ctx")) if isinstance(settings, dict) else None


def _tokens(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
