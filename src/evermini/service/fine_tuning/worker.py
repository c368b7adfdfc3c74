"""Does fine-tuning jobs: checks their files, trains in a process beside the server, stores what comes out.

What is known of a job is in the database, what training needs to go on is in the job's folder under the home folder,
`tuning/ID`. A process that dies is started again from its last checkpoint; a server that dies takes its process with
it, and the next one goes on. On another machine, which has no such folder, training begins anew, with that machine's
own device, threads and weights of the tier.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evermini.config import Settings
from evermini.errors import AdapterError, NotFoundError
from evermini.service.adapters import AdapterStore
from evermini.service.files import FileService, random_token
from evermini.service.fine_tuning.metrics import TuningGauges
from evermini.service.fine_tuning.process import TuningProcess
from evermini.service.fine_tuning.service import model_name, new_event, shown_hyperparameters
from evermini.service.fine_tuning.spec import (
    ADAPTERS,
    TENSORBOARD,
    TRAINING,
    VALIDATION,
    JobSpec,
    TrainingSpec,
)
from evermini.service.jobs import FAILED
from evermini.service.loading import name_of_tier
from evermini.storage.database import Database
from evermini.storage.files import StoredFile
from evermini.storage.fine_tuning import FINAL, StoredTuning, TuningStore
from evermini.storage.jobs import Job
from evermini.storage.schema import Cursor
from evermini.storage.tuning_history import Event, TuningCheckpoint

log = logging.getLogger(__name__)

FOLDER = "tuning"
"""Under the home folder: ``ID/`` of each job in work, and of ended ones their TensorBoard files."""
POLL_SECONDS = 0.5
"""How often what happened is stored, and how soon a pause is noticed."""
MAX_RESTARTS = 3
"""How often a process that died is started again without having got further."""
KEPT_CHECKPOINTS = 3
"""Epochs whose weights can be used as models; those before are deleted when a new one comes."""
SHOWN_ERRORS = 10
"""Errors in a job's own message; its events have more."""
COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
"""Of the result file; the first five are the contract's."""


class TuningWorker:
    """The handlers of the queue's jobs for fine-tuning: `check` and `train`.

    Args:
        database: Where jobs are.
        files: Where their files are.
        adapters: Where what they make goes.
        settings: The home folder and the organization in names.
        gauges: Told of the running training.
    """

    def __init__(
        self,
        database: Database,
        files: FileService,
        adapters: AdapterStore,
        settings: Settings,
        gauges: TuningGauges | None = None,
    ) -> None:
        self._database = database
        self._files = files
        self._adapters = adapters
        self._settings = settings
        self._gauges = gauges
        self._store = TuningStore(database)

    # Checking

    async def check(self, job: Job) -> None:
        """Check a job's files, decide its hyperparameters, and let it wait for its turn.

        Raises:
            LeaseLostError: The job was cancelled, or another process has taken over.
            StorageError: The database or the storage of files cannot be used; the job can be tried again.
        """
        tuning = await self._get(job)
        folder = self._folder(tuning.id) / "check"
        if not await self._prepare(job, tuning, folder):
            return
        process = await TuningProcess.start("check", folder)
        last: dict[str, Any] = {}
        try:
            async for report in process.reports():
                last = report
            code = await process.wait()
        finally:
            await process.kill()
        if last.get("type") == "checked":
            await self._checked(job, tuning, last["data"])
        elif last.get("type") == "invalid":
            await self._invalid(job, tuning, last)
        else:
            message = last.get("message") or _death(code, process.last_words())
            await self._fail(job, "server_error", message, None)
        await asyncio.to_thread(shutil.rmtree, folder.parent, True)

    async def _checked(self, job: Job, tuning: StoredTuning, data: dict[str, Any]) -> None:
        spec = {**tuning.spec, "hyperparameters": data["hyperparameters"]}
        shown = shown_hyperparameters(_job_spec(spec))
        method = spec["method"]
        body = {
            "hyperparameters": {key: value for key, value in shown.items() if key != "beta"},
            "method": {"type": method, method: {"hyperparameters": shown}},
        }
        spec["num_examples"] = data["num_examples"]
        event = new_event(
            f"Files validated, moving job to queued state: {data['num_examples']} examples with {data['num_tokens']} "
            f"tokens, {data['num_learnt_tokens']} of them learnt",
            data=data,
        )
        await self._database.run(self._store.checked, job, body, spec, event)

    async def _invalid(self, job: Job, tuning: StoredTuning, report: dict[str, Any]) -> None:
        errors, param = report["errors"], report["param"]
        lines = [_line(error) for error in errors]
        shown = "; ".join(lines[:SHOWN_ERRORS])
        count = report["count"]
        more = f" And {count - SHOWN_ERRORS} more." if count > SHOWN_ERRORS else ""
        message = (
            f"The job failed due to an invalid {param.replace('_', ' ')} {tuning.body[param]}. "
            f"{count} {'error' if count == 1 else 'errors'}: {shown}{more}"
        )
        events = [new_event(line, "error") for line in lines] + [new_event(message, "error")]
        error = {"code": f"invalid_{param}", "message": message, "param": param}
        await self._database.run(self._store.fail, job, error, events, int(time.time()))

    # Training

    async def train(self, job: Job) -> None:
        """Train, or go on with it, until it is done, paused or cancelled.

        Raises:
            LeaseLostError: The job was cancelled, or another process has taken over.
            StorageError: As for `check`.
        """
        tuning = await self._get(job)
        folder = self._folder(tuning.id)
        if not await self._prepare(job, tuning, folder):
            return
        restarts, furthest = 0, -1
        try:
            while True:
                attempt = _Attempt(self._store, job, tuning)
                process = await TuningProcess.start(
                    "train", folder, num_processes=await asyncio.to_thread(self._num_gpus)
                )
                try:
                    await self._follow(attempt, process, folder)
                    code = await process.wait()
                except asyncio.CancelledError:  # the server ends, or the lease is lost
                    await process.save_and_end()
                    raise
                except AdapterError as error:  # trying again would not make it better
                    await self._fail(job, "training_failed", error.message, None)
                    return
                finally:
                    await process.kill()
                match attempt.ending.get("type"):
                    case "finished":
                        await self._succeed(attempt, folder)
                        return
                    case "failed":
                        await self._fail(job, "training_failed", attempt.ending["message"], None)
                        return
                    case "invalid":  # an image that was there when the file was checked is gone
                        await self._invalid(job, tuning, attempt.ending)
                        return
                    case "stopped":
                        if await self._database.run(self._store.stopped, job):
                            return
                        continue  # resumed in the meantime
                restarts = restarts + 1 if attempt.step <= furthest else 1
                furthest = max(furthest, attempt.step)
                words = _death(code, process.last_words())
                if restarts > MAX_RESTARTS:
                    await self._fail(job, "training_failed", words, None)
                    return
                log.warning("fine-tuning job %s: %s", tuning.id, words)
                event = new_event("The training process ended unexpectedly; going on", "warn")
                await self._database.run(self._store.progress, job, [event], None)
        finally:
            if self._gauges is not None:
                self._gauges.forget(tuning.id)
            if (await self._get(job)).status in FINAL:
                await asyncio.to_thread(self._tidy, folder)

    async def _follow(self, attempt: _Attempt, process: TuningProcess, folder: Path) -> None:
        """Store what a process reports, and pass on to it what clients want."""
        reports = process.reports()
        next_report = asyncio.ensure_future(anext(reports, None))
        try:
            while True:
                await asyncio.wait([next_report], timeout=POLL_SECONDS)
                report = None
                if next_report.done():
                    report = next_report.result()
                    if report is None:
                        break
                    next_report = asyncio.ensure_future(anext(reports, None))
                    await self._take(attempt, report, folder)
                if report is None or attempt.is_due():
                    status = await self._database.run(attempt.flush)
                    if status == "paused":
                        process.stop()
        finally:
            next_report.cancel()
            await asyncio.gather(next_report, return_exceptions=True)
        await self._database.run(attempt.flush)

    async def _take(self, attempt: _Attempt, report: dict[str, Any], folder: Path) -> None:
        match report["type"]:
            case "started":
                step = report["step"]
                attempt.num_steps = report["num_steps"]
                attempt.base_weights = report["base_weights"]
                words = f"Fine-tuning job resumed after step {step}" if step else None
                event = new_event(words or "Fine-tuning job started")
                await self._database.run(self._store.started, attempt.job, step, event)
            case "images":
                words = f"Looking at the images of the files: {report['done']} done"
                event = new_event(words)
                await self._database.run(self._store.progress, attempt.job, [event], None)
            case "metrics":
                attempt.note(report)
                if self._gauges is not None:
                    self._gauges.show(attempt.tuning, report, attempt.num_steps)
            case "checkpoint":
                await self._database.run(attempt.flush)
                await self._keep(attempt, folder, report["step"])
            case _:
                attempt.ending = report

    async def _keep(self, attempt: _Attempt, folder: Path, step: int) -> None:
        """Make a model of an epoch's adapter, and delete the oldest if there are too many."""
        job, tuning = attempt.job, attempt.tuning
        place = folder / ADAPTERS / f"step-{step}"
        name = str(model_name(tuning, step))
        metrics = json.loads(await asyncio.to_thread((place / "metrics.json").read_text))
        await asyncio.to_thread(self._add, place, name, attempt)
        checkpoint = TuningCheckpoint(
            f"ftckpt_{random_token(24)}", step, int(time.time()), name, metrics
        )
        event = new_event(f"Checkpoint created at step {step} with Snapshot ID: {name}")
        await self._database.run(self._store.progress, job, [event], None, checkpoint)
        cursor = Cursor(limit=100, order="desc")
        known = await self._database.run(self._store.checkpoints, tuning.id, cursor)
        assert known is not None, "jobs are never deleted"
        for old in known.rows[KEPT_CHECKPOINTS:]:
            await asyncio.to_thread(self._adapters.delete, old.name)

    def _add(self, place: Path, name: str, attempt: _Attempt) -> None:
        self._adapters.add(
            place,
            name=name,
            tier=attempt.tuning.spec["tier"],
            job_id=attempt.tuning.id,
            base_weights=attempt.base_weights,
        )

    async def _succeed(self, attempt: _Attempt, folder: Path) -> None:
        job, tuning, report = attempt.job, attempt.tuning, attempt.ending
        name = str(model_name(tuning))
        place = folder / ADAPTERS / f"step-{report['adapter_step']}"
        await asyncio.to_thread(self._add, place, name, attempt)
        results = await self._results(tuning)
        body = {"fine_tuned_model": name, "trained_tokens": report["trained_tokens"]}
        events = [
            new_event(f"New fine-tuned model created: {name}"),
            new_event("The job has successfully completed"),
        ]
        now = int(time.time())
        await self._database.run(self._store.succeed, job, body, results, events, now)

    async def _results(self, tuning: StoredTuning) -> StoredFile:
        steps = await self._database.run(self._store.metrics, tuning.id)
        stored = await self._files.make(
            [_table(steps)],
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            seconds=None,
            project=tuning.project,
        )
        assert stored is not None, "the table has a head"
        return stored

    # Both

    async def give_up(self, job: Job) -> None:
        """End a job as failed that the server cannot do.

        Raises:
            LeaseLostError: As for `check`.
            StorageError: As for `check`.
        """
        await self._fail(job, "server_error", FAILED, None)
        folder = self._folder(job.subject)
        if folder.is_dir():
            await asyncio.to_thread(self._tidy, folder)

    async def _get(self, job: Job) -> StoredTuning:
        tuning = await self._database.run(self._store.get, job.subject)
        assert tuning is not None, "jobs are never deleted"
        return tuning

    def _folder(self, tuning_id: str) -> Path:
        return self._settings.home.absolute() / FOLDER / tuning_id

    async def _prepare(self, job: Job, tuning: StoredTuning, folder: Path) -> bool:
        """Put the files and the specification into a folder; ``False``: a file is gone, and the job has failed."""
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        spec = self._training_spec(tuning)
        for param, name in (("training_file", TRAINING), ("validation_file", VALIDATION)):
            if tuning.body[param] is None or (folder / name).exists():
                continue
            try:
                stored = await self._files.get(tuning.body[param])
            except NotFoundError:
                words = f"The file {tuning.body[param]} was deleted or has expired."
                await self._fail(job, "file_not_found", words, param)
                return False
            await asyncio.to_thread(self._copy, stored, folder / name)
        if spec.adapter is not None:
            found = await asyncio.to_thread(self._adapters.get, spec.adapter)
            if found is None:
                words = f"The model {spec.adapter} was deleted."
                await self._fail(job, "model_not_found", words, "model")
                return False
            place = await asyncio.to_thread(self._adapters.folder, found)
            spec = spec.model_copy(update={"adapter": str(place)})
        await asyncio.to_thread(spec.write, folder)
        return True

    def _training_spec(self, tuning: StoredTuning) -> TrainingSpec:
        """Return what the process is told: of the job, and of this machine."""
        settings = self._settings
        return TrainingSpec(
            **dict(_job_spec(tuning.spec)),
            source=name_of_tier(tuning.spec["tier"], settings),
            home=str(settings.home),
            weights_dir=None if settings.weights_dir is None else str(settings.weights_dir),
            device=settings.device,
            threads=settings.threads,
            allow_remote_images=settings.allow_remote_images,
        )

    def _copy(self, stored: StoredFile, place: Path) -> None:
        part = place.with_suffix(".part")
        with part.open("wb") as file:
            file.writelines(self._files.read(stored))
        part.replace(place)

    async def _fail(self, job: Job, code: str, message: str, param: str | None) -> None:
        error = {"code": code, "message": message, "param": param}
        events = [new_event(message, "error")]
        await self._database.run(self._store.fail, job, error, events, int(time.time()))

    def _num_gpus(self) -> int:
        if self._settings.device == "cpu" or ":" in self._settings.device:
            return 1
        import torch

        return max(1, torch.cuda.device_count())

    @staticmethod
    def _tidy(folder: Path) -> None:
        """Delete what training needed, and leave its curves."""
        for place in folder.iterdir():
            if place.name == TENSORBOARD:
                continue
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)


class _Attempt:
    """What one process has reported and is not stored yet."""

    def __init__(self, store: TuningStore, job: Job, tuning: StoredTuning) -> None:
        self._store = store
        self.job = job
        self.tuning = tuning
        self.num_steps = 0
        self.base_weights: str | None = None
        self.step = -1
        self.ending: dict[str, Any] = {}
        self._events: list[Event] = []
        self._finish: int | None = None
        self._flushed = time.monotonic()

    def note(self, report: dict[str, Any]) -> None:
        """Keep a step's metrics to be stored."""
        step, metrics = report["step"], report["metrics"]
        self.step = max(self.step, step)
        words = [
            f"{label} loss={metrics[key]:.4f}"
            for key, label in (
                ("train_loss", "training"),
                ("valid_loss", "validation"),
                ("full_valid_loss", "full validation"),
            )
            if metrics.get(key) is not None
        ]
        data = {"step": step, "total_steps": self.num_steps, **metrics}
        message = f"Step {step}/{self.num_steps}: {', '.join(words)}"
        self._events.append(new_event(message, step=step, data=data))
        if (left := report.get("seconds_left")) is not None:
            self._finish = int(time.time() + left)

    def is_due(self) -> bool:
        """Return whether it is time to store what there is."""
        return time.monotonic() - self._flushed > POLL_SECONDS

    def flush(self) -> str:
        """Store it, and return the job's status."""
        self._flushed = time.monotonic()
        if not self._events and not self.ending:
            status = self._store.status(self.job)
            if status != "cancelled":
                return status
        events, self._events = self._events, []
        return self._store.progress(self.job, events, self._finish)


def _job_spec(spec: dict[str, Any]) -> JobSpec:
    """Return what a job was created with; what else is stored of it is the worker's own."""
    return JobSpec.model_validate({key: spec[key] for key in JobSpec.model_fields})


def _table(steps: Sequence[Event]) -> bytes:
    def rows() -> Iterator[list[object]]:
        for event in steps:
            metrics = event.data or {}
            renamed = {**metrics, "train_accuracy": metrics.get("train_mean_token_accuracy")}
            yield [renamed.get(column) for column in COLUMNS]

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows())
    return text.getvalue().encode()


def _line(error: dict[str, Any]) -> str:
    where = f"Line {error['line']}, {error['path']}" if error["path"] else f"Line {error['line']}"
    return f"{where}: {error['message']}"


def _death(code: int, words: str) -> str:
    how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
    hint = " It may have run out of memory." if code == -9 else ""
    last = words.splitlines()[-1] if words else ""
    return f"The training process ended {how}.{hint} {last}".strip()
