"""``evermini tune``: fine-tuning from the command line, on the local database, with a server or without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from evermini.cli import tune_adapters
from evermini.cli.options import with_settings
from evermini.config import LoadedSettings, Settings

if TYPE_CHECKING:
    from evermini.service.fine_tuning.spec import Hyperparameters

tune = typer.Typer(
    help="Fine-tune models on your examples; import, export and name fine-tuned models.",
    no_args_is_help=True,
)

_DATABASE = ("home", "database_url", "blob_url")
_TRAINING = (
    *(*_DATABASE, "model", "weights_dir", "device", "threads", "organization"),
    "allow_remote_images",
)
_PRICES = ("machine_price", "machine_watts", "electricity_price")

FileArgument = Annotated[
    Path, typer.Argument(help="Examples, one JSON object per line.", exists=True, dir_okay=False)
]
Validation = Annotated[
    Path | None,
    typer.Option(help="Examples to measure on.", exists=True, dir_okay=False, show_default="none"),
]
MethodFlag = Annotated[
    Literal["supervised", "dpo"],
    typer.Option(
        help="What the lines are: conversations, or pairs of a better and a worse answer."
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, max=50, help="Times that every example is seen.", show_default="auto"),
]
Batch = Annotated[
    int | None, typer.Option(min=1, max=256, help="Examples per step.", show_default="auto")
]
Rate = Annotated[
    float | None,
    typer.Option(
        help="Multiplier of the learning rate 0.0001, as learning_rate_multiplier of the API.",
        show_default="auto",
    ),
]
JobArgument = Annotated[str, typer.Argument(help="The job's id.", metavar="JOB")]


@tune.command()
@with_settings("home", "model", "weights_dir", "device", "threads", "allow_remote_images", *_PRICES)
def check(
    loaded: LoadedSettings,
    file: FileArgument,
    validation: Validation = None,
    method: MethodFlag = "supervised",
    epochs: Epochs = None,
) -> None:
    """Check a file of examples, count its tokens, and estimate time and cost. Trains nothing."""
    from evermini.cli.pull import download_bar
    from evermini.service.fine_tuning.spec import MIN_EXAMPLES, TrainingSpec, TuningOptions
    from evermini.service.loading import open_model, what_to_serve
    from evermini.text.chat import ChatTemplate
    from evermini.text.tokenizer import Tokenizer
    from evermini.tuning.check import summary
    from evermini.tuning.data import read_data
    from evermini.tuning.images import ImageReader

    settings = loaded.settings
    name = settings.models[0]
    entry, _ = what_to_serve(name)
    with download_bar(name) as progress:
        checkpoint = open_model(name, settings, progress=progress)
    tokenizer = Tokenizer(checkpoint.tokenizer)
    template = ChatTemplate(tokenizer)
    images = ImageReader(
        checkpoint, tokenizer, allow_remote=settings.allow_remote_images, home=settings.home
    )
    window, found = checkpoint.config.max_position, {}
    for path, least in ((file, MIN_EXAMPLES), (validation, 1)):
        if path is not None:
            found[path] = read_data(
                path, method, template, window, min_examples=least, images=images
            )
    num_errors = sum(data.num_errors for data in found.values())
    for path, data in found.items():
        for error in data.errors:
            print(f"{path}: {error}")
    if num_errors:
        shown = sum(len(data.errors) for data in found.values())
        rest = f" ({shown} shown)" if shown < num_errors else ""
        print(f"{num_errors} errors{rest}. Correct them; nothing can be trained before.")
        raise typer.Exit(1)
    spec = TrainingSpec(
        source=name,
        home=str(settings.home),
        weights_dir=None,
        device=settings.device,
        threads=settings.threads,
        method=method,
        hyperparameters=_hyperparameters(epochs, None, None, None),
        seed=0,
        options=TuningOptions(),
        has_validation=validation is not None,
    )
    measured = summary(
        spec, checkpoint.config, found[file], found.get(validation or Path()), images
    )
    _print_summary(measured, entry.aliases[0] if entry else name, settings)


def _print_summary(measured: dict[str, Any], model: str, settings: Settings) -> None:
    from evermini.service.prices import machine_price, training_price

    wanted, tokens = measured["hyperparameters"], measured["trained_tokens"]
    hours = measured["estimated_seconds"] / 3600
    print(f"{measured['num_examples']} examples, all good")
    images = f" in texts and {measured['num_images']:,} images" if measured["num_images"] else ""
    print(
        f"{measured['num_tokens']:,} tokens{images}, {measured['num_learnt_tokens']:,} of them learnt; the longest "
        f"example has {measured['longest']:,} of {measured['window']:,}"
    )
    print(
        f"{wanted['n_epochs']} epochs, batches of {wanted['batch_size']}, learning rate multiplier "
        f"{wanted['learning_rate_multiplier']:g}: {tokens:,} tokens to train"
    )
    print(f"Time: about {_duration(measured['estimated_seconds'])} on this machine, if it is idle")
    price = machine_price(
        settings.machine_price, settings.machine_watts, settings.electricity_price
    )
    here = f"${hours * price:.2f} here" if price is not None else "here: set machine_price"
    print(f"Cost: {here}; ${tokens * training_price(model) / 1e6:.2f} at OpenAI's list price")


@tune.command()
@with_settings(*_TRAINING)
def run(
    loaded: LoadedSettings,
    file: FileArgument,
    validation: Validation = None,
    suffix: Annotated[
        str | None, typer.Option(help="A part of the model's name.", show_default="none")
    ] = None,
    method: MethodFlag = "supervised",
    epochs: Epochs = None,
    batch_size: Batch = None,
    learning_rate: Rate = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="How close the model stays to what it was; for --method dpo alone, up to 2.",
            show_default="auto",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Makes a training reproducible.", show_default="random"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=50,
            help="End when the validation loss has not fallen for so many epochs.",
            show_default="never",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of the adapter.")] = 16,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the loss curve.", show_default="none")
    ] = None,
) -> None:
    """Train on a file of examples, and say the name of the model that comes out.

    Ctrl-C saves and leaves; `evermini tune resume JOB` or a server on this database goes on.
    """
    from evermini.cli.tune_local import follow, start

    wanted: dict[str, Any] = {
        "model": loaded.settings.models[0].partition("=")[0],
        "suffix": suffix,
        "seed": seed,
        "method": {
            "type": method,
            method: {
                "hyperparameters": _hyperparameters(
                    epochs, batch_size, learning_rate, beta
                ).model_dump()
            },
        },
        "x_evermini": {"early_stopping_patience": patience, "rank": rank},
    }
    job_id = start(loaded.settings, wanted, file, validation)
    follow(loaded.settings, job_id, plot=plot)


@tune.command()
@with_settings(*_TRAINING)
def resume(
    loaded: LoadedSettings,
    job: JobArgument,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the loss curve.", show_default="none")
    ] = None,
) -> None:
    """Go on with a job that was paused or left, here, and follow it to its end."""
    from evermini.cli.tune_local import follow, steer

    steer(loaded.settings, job, "resume")
    follow(loaded.settings, job, plot=plot)


@tune.command()
@with_settings(*_DATABASE)
def ls(loaded: LoadedSettings) -> None:
    """List jobs, the newest first."""
    from evermini.cli.tune_local import print_jobs

    print_jobs(loaded.settings)


@tune.command()
@with_settings(*_DATABASE)
def logs(
    loaded: LoadedSettings,
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Picture of the loss curve.", show_default="none")
    ] = None,
) -> None:
    """Show what happened to a job, and its loss curve."""
    from evermini.cli.tune_local import print_logs

    print_logs(loaded.settings, job, follow=follow, plot=plot)


@tune.command()
@with_settings(*_DATABASE)
def pause(loaded: LoadedSettings, job: JobArgument) -> None:
    """Let a job wait, wherever it runs; what is trained is kept."""
    from evermini.cli.tune_local import steer

    steer(loaded.settings, job, "pause")


@tune.command()
@with_settings(*_DATABASE)
def cancel(loaded: LoadedSettings, job: JobArgument) -> None:
    """End a job, wherever it runs."""
    from evermini.cli.tune_local import steer

    steer(loaded.settings, job, "cancel")


def _hyperparameters(
    epochs: int | None, batch_size: int | None, rate: float | None, beta: float | None
) -> Hyperparameters:
    from evermini.service.fine_tuning.spec import Hyperparameters
    from evermini.service.validation import parse

    given = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": rate,
        "beta": beta,
    }
    return parse(Hyperparameters, {k: v for k, v in given.items() if v is not None})


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


tune.command("models")(tune_adapters.list_models)
tune.command("import")(tune_adapters.import_adapter)
tune.command("export")(tune_adapters.export_model)
tune.command("alias")(tune_adapters.set_alias)
tune.command("rm")(tune_adapters.delete_models)
