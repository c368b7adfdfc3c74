"""From a value of the setting ``model`` that names an upstream engine to a served model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from evermini.backends.client import UpstreamClient
from evermini.backends.discover import Found
from evermini.backends.spec import UpstreamSpec
from evermini.config import Settings
from evermini.models import catalogue
from evermini.recall.load import Indexer
from evermini.service.assembly import MAX_PROMPT_TOKENS
from evermini.service.loading import load_index
from evermini.service.model_info import fingerprint, info_of
from evermini.service.reading import LongReader
from evermini.service.upstream.model import UpstreamModel
from evermini.text.chat import ChatTemplate

log = logging.getLogger(__name__)


def load_upstream(
    spec: UpstreamSpec,
    settings: Settings,
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> UpstreamModel:
    """Return a model that an upstream engine runs, with a model of our own that finds passages in long prompts.

    An engine that is not there yet is no error: requests say so until it is.

    Args:
        spec: Where the engine is.
        settings: Key, patience, and what reads long prompts.
        progress: Told how a fetch of the index model's weights goes.

    Raises:
        ConfigError: The key's variable is not set, or the settings do not fit together.
        DownloadError: The index model could not be fetched.
    """
    served = connect(spec, settings)
    found = served.look()
    if found is not None and found.sees is None:
        log.warning(
            "%s at %s does not say whether its model looks at images: it gets the text that is read of them. Say it "
            "(?images=yes or ?images=no).",
            spec.name,
            spec.url,
        )
    if settings.recall and _needs_reader(spec, found):
        index = load_index(settings, progress=progress)
        served.reader = LongReader(
            Indexer(index.model, index.tokenizer, index.checkpoint.fingerprint),
            index.tokenizer,
            ChatTemplate(index.tokenizer),
            home=settings.home,
            max_bytes=settings.recall_disk,
            sweep_limit=settings.sweep_limit,
        )
    return served


def connect(spec: UpstreamSpec, settings: Settings) -> UpstreamModel:
    """Return a model that an upstream engine runs, which reads no long prompts.

    Raises:
        ConfigError: The key's variable is not set.
    """
    client = UpstreamClient(
        spec.url, key=spec.key(settings.upstream_key), timeout=settings.upstream_timeout
    )
    info = info_of(
        catalogue.find(spec.name),
        spec.name,
        created=int(time.time()),
        context_window=None,
        system_fingerprint=fingerprint(spec.url, spec.model or ""),
    )
    return UpstreamModel(info, spec, client, parallel=settings.upstream_parallel)


def _needs_reader(spec: UpstreamSpec, found: Found | None) -> bool:
    """Return whether prompts can be longer than the engine's window. Of an engine that is not there, they can."""
    if found is None:
        return True
    if found.window is None:
        log.warning(
            "%s at %s does not say how long its window is: what is too long is left to it. Say it (?window=TOKENS) to "
            "have longer prompts read in excerpts.",
            spec.name,
            spec.url,
        )
        return False
    return found.window < MAX_PROMPT_TOKENS
