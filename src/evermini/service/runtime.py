"""Models that are loaded and served, by the names they answer to.

with Runtime([load_tier("mini", settings)]) as runtime:
    served = runtime.resolve("gpt-4.1-mini")
    run = await chat.start(served, request)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Self

from evermini.backends.spec import parse_upstream
from evermini.config import ADAPTER_MEMORY, Settings
from evermini.engine.adapters import AdapterCache, Lease
from evermini.engine.engine import Engine, EngineStats
from evermini.engine.worker import EngineWorker
from evermini.errors import ConfigError, ModelNotFoundError
from evermini.models.batch import Model
from evermini.models.config import ModelConfig
from evermini.models.decoder import Decoder
from evermini.models.lora import LoraWeights
from evermini.recall.select import SPARING, Policy
from evermini.service.attachments import Eyes
from evermini.service.loading import load_checkpoint, load_indexer
from evermini.service.memory import kv_blocks
from evermini.service.metrics import Metrics
from evermini.service.model_info import ModelInfo, fingerprint, info_of
from evermini.service.prompt_cache import open_prompts
from evermini.service.reading import LongReader
from evermini.service.sight import Sight
from evermini.service.upstream.load import load_upstream
from evermini.service.upstream.model import UpstreamModel
from evermini.text.chat import ChatTemplate
from evermini.text.grammar import GrammarCompiler
from evermini.text.tokenizer import Tokenizer
from evermini.vision.tower import load_tower

log = logging.getLogger(__name__)

_SMALL = 15_000_000
"""Layers times squared width below which a model counts as a small reader: nano has 10 million, mini 19."""


@dataclass(frozen=True)
class AdapterSource:
    """Where a fine-tuned model's adapter comes from.

    Attributes:
        key: Hash of its content.
        read: Reads it. Blocks.
    """

    key: bytes
    read: Callable[[], LoraWeights]


@dataclass(frozen=True)
class ServedModel:
    """A loaded model and all it takes to talk to it. Its owner closes it."""

    info: ModelInfo
    worker: EngineWorker
    tokenizer: Tokenizer
    template: ChatTemplate
    grammars: GrammarCompiler
    reader: LongReader | None = None
    """Reads prompts longer than the engine's window; ``None``: they are refused."""
    weights: str = ""
    """Hash of the checkpoint; the same file has the same one everywhere."""
    sight: Sight | None = None
    """Looks at images; ``None``: it reads text only."""
    adapters: AdapterCache = field(default_factory=lambda: AdapterCache(ADAPTER_MEMORY))
    """Adapters in memory."""
    adapter: AdapterSource | None = None
    """What it answers with, on top of its weights. What finds passages in long prompts, and reads their parts for a
    question about all of them, is the model without it."""

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests."""
        return self.worker.is_alive

    async def eyes(self) -> Eyes | None:
        """Return what looks at images."""
        return self.sight

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a plain text has."""
        return len(self.tokenizer.encode(text))

    def tuned(self, info: ModelInfo, adapter: AdapterSource) -> ServedModel:
        """Return this model with an adapter, under a name of its own. It shares everything; only this one is closed."""
        return replace(self, info=info, adapter=adapter)

    async def lease_adapter(self) -> Lease | None:
        """Return a lease of its adapter, once that is in memory; ``None`` if it has none.

        Raises:
            AdapterError: It cannot be read, or does not fit the model or the memory.
            StorageError: Its files cannot be read.
            EngineStoppedError: The model is closed.
        """
        source = self.adapter
        if source is None:
            return None
        return await self.adapters.lease(
            source.key, lambda: self.worker.load_adapter(source.read())
        )

    def close(self, timeout: float = 10.0) -> None:
        """Stop the engine; what still runs after ``timeout`` seconds is aborted."""
        self.adapters.close()
        if self.reader is not None:
            self.reader.close()
        if self.sight is not None:
            self.sight.close()
        self.worker.stop(timeout)


Served = ServedModel | UpstreamModel
"""A model that requests can name, whoever runs it."""


class Runtime:
    """The models of one process. Closing it closes them.

    Args:
        models: At least one; the first is the default.
        answers_to_any_name: A name that no model has means the default.

    Raises:
        ConfigError: There is no model, or two of them answer to one name.
    """

    def __init__(self, models: Sequence[Served], *, answers_to_any_name: bool = False) -> None:
        if not models:
            raise ConfigError("There is no model to serve. Name at least one.")
        self.models = tuple(models)
        self._answers_to_any_name = answers_to_any_name
        self._by_name: dict[str, Served] = {}
        for served in models:
            for name in served.info.names:
                if name in self._by_name:
                    raise ConfigError(
                        f"Two models answer to the name {name}. Name each model once."
                    )
                self._by_name[name] = served
        self.metrics = Metrics(self.engine_stats)

    @property
    def default(self) -> Served:
        """The model that was named first."""
        return self.models[0]

    @property
    def answers_to_any_name(self) -> bool:
        """Whether a name that no model has means the default."""
        return self._answers_to_any_name

    @property
    def names(self) -> Mapping[str, Served]:
        """Every name that is answered to."""
        return self._by_name

    @property
    def is_ready(self) -> bool:
        """Whether every engine takes requests."""
        return all(served.is_alive for served in self.models)

    def resolve(self, name: str) -> Served:
        """Return the model that a request's ``model`` means.

        Raises:
            ModelNotFoundError: It is not served here; lists what is.
        """
        if served := self._by_name.get(name):
            return served
        if self._answers_to_any_name:
            return self.default
        raise ModelNotFoundError(
            f"The model `{name[:200]}` does not exist or you do not have access to it. This server has: "
            f"{', '.join(self._by_name)}.",
            param="model",
        )

    def engine_stats(self) -> dict[str, EngineStats]:
        """Return the statistics of the engines in this process by model id."""
        return {
            served.info.id: served.worker.stats()
            for served in self.models
            if isinstance(served, ServedModel)
        }

    def close(self, timeout: float = 10.0) -> None:
        """Stop every engine."""
        for served in self.models:
            served.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def load(
    name: str | PathLike[str],
    settings: Settings,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Served:
    """Load a model, or get ready to have an upstream engine answer (``NAME=URL``). Raises what `load_tier` does."""
    spec = parse_upstream(fspath(name))
    if spec is not None:
        return load_upstream(spec, settings, progress=progress)
    return load_tier(name, settings, progress=progress)


def load_tier(
    name_or_path: str | PathLike[str],
    settings: Settings,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> ServedModel:
    """Fetch (if need be) and load a model, and start its engine.

    Args:
        name_or_path: Tier, alias or path of a checkpoint; ``mini=PATH`` serves the checkpoint at PATH under the names
            of the tier mini.
        settings: Device, precision, memory and limits.
        progress: Told how a fetch of the weights goes, as in `evermini.models.pull.ensure`.

    Raises:
        ModelNotFoundError: Nothing has that name.
        DownloadError: The weights could not be fetched.
        ModelError: The checkpoint cannot be used.
        ConfigError: The settings do not fit together or the machine, or a package that it takes is not installed.
    """
    loaded = load_checkpoint(name_or_path, settings, progress=progress)
    entry, checkpoint, tokenizer = loaded.entry, loaded.checkpoint, loaded.tokenizer
    template = ChatTemplate(tokenizer)
    device = loaded.model.device if isinstance(loaded.model, Decoder) else "cpu"
    tower = load_tower(checkpoint, device=device, precision=settings.precision, home=settings.home)
    worker = start_worker(loaded.model, settings, weights=checkpoint.fingerprint)
    sight = None if tower is None else Sight(tower, tokenizer, window=worker.max_model_len)
    reader = None
    if settings.recall:
        reader = LongReader(
            load_indexer(loaded, settings, progress=progress),
            tokenizer,
            template,
            home=settings.home,
            policy=reading_policy(loaded.model.config),
            max_bytes=settings.recall_disk,
            sweep_limit=settings.sweep_limit,
        )
    info = info_of(
        entry,
        _name_of(checkpoint.path),
        created=int(checkpoint.path.stat().st_mtime),
        context_window=reader.max_prompt_tokens if reader else worker.max_model_len,
        system_fingerprint=fingerprint(checkpoint.fingerprint, settings.precision, settings.device),
    )
    return ServedModel(
        replace(info, sees=sight is not None),
        worker,
        tokenizer,
        template,
        GrammarCompiler(tokenizer),
        reader,
        checkpoint.fingerprint,
        sight,
        AdapterCache(settings.adapter_memory),
    )


def reading_policy(config: ModelConfig) -> Policy:
    """Return how much of a long prompt a model is given to read for a question."""
    is_small = config.num_layers * config.hidden_size**2 < _SMALL
    return SPARING if is_small else Policy()


def start_worker(model: Model, settings: Settings, *, weights: str | None = None) -> EngineWorker:
    """Return a running engine for ``model``, its KV memory sized by the settings.

    Args:
        model: The model.
        settings: Memory and limits.
        weights: Hash of its checkpoint, under which computed prompts are kept on the disk; ``None``: they are not.

    Raises:
        ConfigError: The limits contradict each other, or there is too little memory.
    """
    if settings.max_batch_tokens <= settings.max_num_seqs:
        raise ConfigError(
            f"max_batch_tokens ({settings.max_batch_tokens}) must be larger than max_num_seqs "
            f"({settings.max_num_seqs}): each running request takes a token of every step. Raise the one or lower the "
            "other.",
            param="max_batch_tokens",
        )
    engine = Engine(
        model,
        num_blocks=kv_blocks(model, settings),
        max_batch_tokens=settings.max_batch_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_waiting=settings.max_waiting,
        speculation=settings.speculation == "auto",
        disk=None if weights is None else open_prompts(model, settings, weights),
    )
    worker = EngineWorker(engine)
    worker.start()
    return worker


def _name_of(path: Path) -> str:
    return path.name.removesuffix(".gguf")
