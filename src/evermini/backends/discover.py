"""What an upstream engine says of itself: its model, how long prompt and answer may be, whether it looks at images.

| Engine | window | images |
|---|---|---|
| vLLM | ``max_model_len`` with its models | nowhere |
| SGLang | the same | ``has_image_understanding`` under ``/model_info`` (``/get_model_info`` before) |
| llama-server | of one slot, under ``/props`` | ``modalities`` under ``/props`` |
| Ollama | nowhere | ``capabilities`` from ``/api/show`` |
| Evermini | ``context_window`` with its models | ``input_modalities`` with its models |

For engines that tell nothing, ``?window=`` and ``?images=`` say it.
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
        sees: Its model looks at images; ``None``: it does not say.
        is_evermini: It is one of us, and knows ``x_evermini``.
    """

    model: str
    window: int | None
    sees: bool | None = None
    is_evermini: bool = False


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
    entry = entries[name]
    window, sees = spec.window or _window(entry), spec.images
    props: dict[str, Any] = {}
    if window is None or (sees is None and _told_by_props(entry)):
        props = await _told(client, "/props")
    if window is None:
        window = _window_of_slot(props)
    if sees is None:
        sees = await _sees(client, entry, props)
    is_evermini = any(
        listed.get("owned_by") == "evermini" and "context_window" in listed
        for listed in entries.values()
    )
    return Found(name, window, sees, is_evermini)


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


def _window_of_slot(props: dict[str, Any]) -> int | None:
    """Return llama-server's window: that of a slot, not the one the model was trained for."""
    settings = props.get("default_generation_settings")
    return _tokens(settings.get("n_ctx")) if isinstance(settings, dict) else None


def _told_by_props(entry: dict[str, Any]) -> bool:
    """Return whether an engine may tell under ``/props`` what its models' list does not."""
    return "input_modalities" not in entry and entry.get("owned_by") not in ("vllm", "sglang")


async def _sees(
    client: UpstreamClient, entry: dict[str, Any], props: dict[str, Any]
) -> bool | None:
    """Return whether the model looks at images; ``None``: the engine does not say."""
    if isinstance(kinds := entry.get("input_modalities"), list):
        return "image" in kinds
    if isinstance(kinds := props.get("modalities"), dict):
        return _yes_or_no(kinds.get("vision"))
    if entry.get("owned_by") == "sglang":
        told = await _told(client, "/model_info") or await _told(client, "/get_model_info")
        return _yes_or_no(told.get("has_image_understanding"))
    if props or not _told_by_props(entry):
        return None
    told = await _told(client, "/api/show", asking={"model": entry["id"]})
    capabilities = told.get("capabilities")
    return "vision" in capabilities if isinstance(capabilities, list) else None


def _yes_or_no(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


async def _told(
    client: UpstreamClient, path: str, *, asking: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return what an engine tells under a path that others do not have; nothing if it does not."""
    try:
        return await client.look(path, root=True, asking=asking) or {}
    except UpstreamError:  # it lists its models, so it is there; it keeps this to itself
        return {}


def _tokens(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
