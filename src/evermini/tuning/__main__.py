"""A process that checks or trains: ``python -m evermini.tuning check|train FOLDER``.

It reads the folder's specification, writes reports (`evermini.tuning.reports`) to standard output, and runs at low
priority. A line on standard input tells it to save and stop; when its standard input ends, whoever started it is gone,
and it ends at once: whoever comes next goes on from the last checkpoint.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from pathlib import Path

import torch

from evermini.errors import EngineStoppedError, EverminiError
from evermini.models import pull
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.service.fine_tuning.spec import IMAGES, TRAINING, VALIDATION, TrainingSpec
from evermini.service.loading import what_to_serve
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.data import Data, read_data
from evermini.tuning.device import own_device
from evermini.tuning.images import ImageReader, ImageStore
from evermini.tuning.reports import Reporter

NICE = 10
IMAGES_SECONDS = 60.0
"""How often it is told how many images are computed."""


def main() -> int:
    """Do what the command line says; 0 unless it failed."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    reporter = Reporter()
    stop = threading.Event()
    rank = os.environ.get("LOCAL_RANK")  # one of several: accelerate has started them
    if rank in (None, "0"):
        threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    if rank is not None:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    os.nice(NICE)
    try:
        _run(what, folder, reporter, stop)
    except EverminiError as error:
        reporter.send("failed", message=error.message)
        return 1
    return 0


def _listen(stop: threading.Event) -> None:
    for _ in sys.stdin:
        stop.set()
    os._exit(3)


def _watch(parent: int) -> None:
    """End with accelerate's launcher, which may be killed without a chance to end what it has started."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(3)


def _run(what: str, folder: Path, reporter: Reporter, stop: threading.Event) -> None:
    spec = TrainingSpec.read(folder)
    _, source = what_to_serve(spec.source)
    checkpoint = open_checkpoint(
        pull.ensure(
            source,
            home=Path(spec.home),
            weights_dir=Path(spec.weights_dir) if spec.weights_dir else None,
        )
    )
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    tokenizer = Tokenizer(checkpoint.tokenizer)
    store = ImageStore(folder / IMAGES) if what == "train" else None
    images = _images(spec, checkpoint, tokenizer, store, stop, reporter)
    try:
        training, validation = _read(spec, folder, checkpoint, tokenizer, images)
    except EngineStoppedError:
        reporter.send("stopped", step=0)
        sys.exit(1)  # others that train with this process are ended by accelerate for that
    for param, data in (("training_file", training), ("validation_file", validation)):
        if data is not None and data.num_errors:
            listed = [{"line": e.line, "path": e.path, "message": e.message} for e in data.errors]
            reporter.send("invalid", param=param, count=data.num_errors, errors=listed)
            return
    if what == "check":
        from evermini.tuning.check import summary

        found = summary(spec, checkpoint.config, training, validation, images)
        reporter.send("checked", data=found)
        return
    del images  # and the vision tower: the language model needs the room
    from evermini.tuning.train import train

    train(spec, folder, checkpoint, training, validation, reporter, stop.is_set)


def _images(
    spec: TrainingSpec,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    store: ImageStore | None,
    stop: threading.Event,
    reporter: Reporter,
) -> ImageReader:
    """Return what looks at the examples' images; with a ``store``, it embeds them into it."""
    told = -math.inf

    def progress(done: int) -> None:
        nonlocal told
        if os.environ.get("LOCAL_RANK", "0") == "0" and time.monotonic() - told > IMAGES_SECONDS:
            told = time.monotonic()
            reporter.send("images", done=done)

    return ImageReader(
        checkpoint,
        tokenizer,
        allow_remote=spec.allow_remote_images,
        device=own_device(spec.device) if store is not None else "cpu",
        precision=spec.options.precision,
        home=Path(spec.home),
        store=store,
        is_told_to_stop=stop.is_set,
        progress=progress,
    )


def _read(
    spec: TrainingSpec,
    folder: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    images: ImageReader,
) -> tuple[Data, Data | None]:
    """Read the files.

    Raises:
        EngineStoppedError: It was told to stop before all of their images were embedded.
    """
    template = ChatTemplate(tokenizer)
    window = checkpoint.config.max_position
    training = read_data(folder / TRAINING, spec.method, template, window, images=images)
    validation = None
    if spec.has_validation:
        validation = read_data(
            folder / VALIDATION, spec.method, template, window, min_examples=1, images=images
        )
    return training, validation


if __name__ == "__main__":
    sys.exit(main())
