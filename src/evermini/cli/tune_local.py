"""What `evermini tune` does with the local database: creates jobs, works on them, shows them."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evermini.config import Settings
from evermini.errors import EverminiError
from evermini.service.adapters import AdapterStore
from evermini.service.file_requests import MAX_UPLOAD_BYTES, FileCreate
from evermini.service.files import FileService
from evermini.service.fine_tuning.schemas import parse_tuning
from evermini.service.fine_tuning.service import FineTuning
from evermini.service.fine_tuning.worker import TuningWorker
from evermini.service.jobs import JobRunner
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from evermini.storage.fine_tuning import CHECK, FINAL, TRAIN, StoredTuning, TuningStore
from evermini.storage.schema import Cursor
from evermini.storage.tuning_history import Event

POLL_SECONDS = 0.5
_CHUNK = 1024 * 1024


class _Parts:
    """The services that jobs need, on the local database."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.database = database
        self.files = FileService(database, BlobStore.open(settings))
        self.adapters = AdapterStore.open(settings, database)
        self.tunings = FineTuning(database, self.files, self.adapters, settings)
        self.store = TuningStore(database)


def start(settings: Settings, wanted: dict[str, Any], file: Path, validation: Path | None) -> str:
    """Store the files and a job, and return its id."""

    async def create(parts: _Parts) -> str:
        wanted["training_file"] = await _store(parts.files, file)
        if validation is not None:
            wanted["validation_file"] = await _store(parts.files, validation)
        return (await parts.tunings.create(parse_tuning(wanted))).id

    with Database.open(settings) as database:
        job_id = asyncio.run(create(_Parts(settings, database)))
    print(job_id, flush=True)
    return job_id


def steer(settings: Settings, job_id: str, what: Literal["cancel", "pause", "resume"]) -> None:
    """Cancel, pause or resume a job, and say its state."""
    with Database.open(settings) as database:
        tunings = _Parts(settings, database).tunings
        calls = {"cancel": tunings.cancel, "pause": tunings.pause, "resume": tunings.resume}
        print(f"{job_id}: {asyncio.run(calls[what](job_id)).status}")


def print_jobs(settings: Settings) -> None:
    """List jobs, a line each: ids and names are for copying, so nothing is cut to the terminal's width."""
    with Database.open(settings) as database:
        found = TuningStore(database).list(Cursor(limit=100, order="desc"))
    assert found is not None, "there is no cursor"
    if not found.rows:
        print("There are no jobs. See `evermini tune run --help`.", file=sys.stderr)
    for tuning in found.rows:
        body = tuning.body
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(body["created_at"]))
        made = body["fine_tuned_model"] or ""
        print(f"{tuning.id}  {created}  {tuning.status:<16}  {body['model']}  {made}".rstrip())


def print_logs(settings: Settings, job_id: str, *, follow: bool, plot: Path | None) -> None:
    """Show a job's events, all there will be if ``follow``, and its loss curve."""
    with Database.open(settings) as database:
        parts = _Parts(settings, database)
        after: str | None = None
        seen: set[str] = set()
        while True:
            tuning = asyncio.run(parts.tunings.get(job_id))
            after = _print_events(parts, job_id, after, seen)
            if not follow or tuning.status in FINAL:
                break
            time.sleep(POLL_SECONDS)
        _print_curve(parts, tuning, plot)


def follow(settings: Settings, job_id: str, *, plot: Path | None) -> None:
    """Work on the queue until a job has ended, showing how it goes.

    Raises:
        EverminiError: It failed or was cancelled.
    """
    with Database.open(settings) as database:
        parts = _Parts(settings, database)
        tuning = asyncio.run(_work(settings, parts, job_id))
        if tuning.status not in FINAL:
            print(f"{job_id} is {tuning.status}. Go on with `evermini tune resume {job_id}`.")
            return
        _print_curve(parts, tuning, plot)
    if tuning.status != "succeeded":
        error = tuning.body["error"]
        raise EverminiError(error["message"] if error else f"The job {job_id} was cancelled.")
    print(tuning.body["fine_tuned_model"])


async def _work(settings: Settings, parts: _Parts, job_id: str) -> StoredTuning:
    """Do jobs until this one has ended, is paused, or somebody presses Ctrl-C."""
    is_left = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, is_left.set)
    print("Ctrl-C saves and leaves.", file=sys.stderr, flush=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    async with _running(settings, parts):
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("checking", total=None, loss="")
            while True:
                tuning = await parts.tunings.get(job_id)
                steps = await parts.database.run(parts.store.metrics, job_id)
                if steps and steps[-1].data:
                    last = steps[-1].data
                    loss = f"loss {last['train_loss']:.4f}"
                    progress.update(bar, completed=last["step"], total=last["total_steps"])
                    progress.update(bar, loss=loss)
                progress.update(bar, description=tuning.status)
                if tuning.status in FINAL or is_left.is_set():
                    break
                if tuning.status == "paused" and not await parts.database.run(
                    parts.store.is_queued, job_id
                ):
                    break  # and saved
                await asyncio.sleep(POLL_SECONDS)
    return await parts.tunings.get(job_id)


@asynccontextmanager
async def _running(settings: Settings, parts: _Parts) -> AsyncIterator[None]:
    worker = TuningWorker(parts.database, parts.files, parts.adapters, settings)
    jobs = JobRunner(parts.database)
    jobs.handle(CHECK, worker.check, give_up=worker.give_up, num_slots=1)
    jobs.handle(TRAIN, worker.train, give_up=worker.give_up, num_slots=1)
    jobs.start()
    try:
        yield
    finally:
        await jobs.stop()


async def _store(files: FileService, path: Path) -> str:
    name = path.name if path.name.lower().endswith(".jsonl") else f"{path.name}.jsonl"
    async with files.incoming() as writer:
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                await files.write(writer, data, MAX_UPLOAD_BYTES)
        return (await files.finish(writer, name, FileCreate(purpose="fine-tune"))).id


def _print_events(parts: _Parts, job_id: str, after: str | None, seen: set[str]) -> str | None:
    """Print what is new, and return where to go on."""
    while True:
        found = parts.store.events(job_id, Cursor(after, 100, "asc"))
        if found is None:  # the job went on from an earlier step, and forgot later ones
            after = None
            continue
        for event in found.rows:
            after = event.id
            if event.id not in seen:
                seen.add(event.id)
                print(_shown(event), flush=True)
        if not found.has_more:
            return after


def _shown(event: Event) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    mark = "" if event.level == "info" else f"{event.level}: "
    return f"{when}  {mark}{event.message}"


def _print_curve(parts: _Parts, tuning: StoredTuning, plot: Path | None) -> None:
    from evermini.tuning import curve

    steps = [event.data or {} for event in parts.store.metrics(tuning.id)]
    losses = [step["train_loss"] for step in steps if step.get("train_loss") is not None]
    for line in curve.draw(losses):
        print(line)
    if plot is not None:
        curve.save(steps, plot, f"{tuning.body['model']}, {tuning.id}")
        print(f"Loss curve: {plot}")
