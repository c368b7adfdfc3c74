"""What clients may know of a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from evermini import __version__
from evermini.models.catalogue import CatalogueEntry

TIER_CREATED = 1_744_588_800
"""2025-04-14, the snapshot that the tiers stand in for."""


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know of a model.

    Attributes:
        id: Its own name, which every response carries.
        aliases: Other names it answers to.
        created: Unix time.
        context_window: Tokens of a chat's prompt at most; without recall, of prompt and output together.
            ``None``: not known, for another server answers and does not say.
        system_fingerprint: Changes whenever the same request may get other tokens.
        owned_by: The organisation in a fine-tuned model's name.
        sees: It looks at images itself; others read what is recognised on them.
    """

    id: str
    aliases: tuple[str, ...]
    created: int
    context_window: int | None
    system_fingerprint: str
    owned_by: str = "evermini"
    sees: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The id, then the aliases."""
        return (self.id, *self.aliases)


def info_of(
    entry: CatalogueEntry | None,
    name: str,
    *,
    created: int,
    context_window: int | None,
    system_fingerprint: str,
) -> ModelInfo:
    """Return what is known of a model, under the names of a tier or one of its own.

    Args:
        entry: The tier, if any.
        name: Its name otherwise...
        created: ...and since when it is there.
        context_window: As in `ModelInfo`.
        system_fingerprint: As in `ModelInfo`.
    """
    if entry is None:
        return ModelInfo(name, (), created, context_window, system_fingerprint)
    aliases = (*entry.aliases[:-1], entry.tier)
    return ModelInfo(entry.aliases[-1], aliases, TIER_CREATED, context_window, system_fingerprint)


def fingerprint(*parts: str) -> str:
    """Return OpenAI's ``fp_`` and ten hex digits, from all that decides which tokens come out."""
    return (
        "fp_"
        + hashlib.sha256("\n".join((parts[0], __version__, *parts[1:])).encode()).hexdigest()[:10]
    )
