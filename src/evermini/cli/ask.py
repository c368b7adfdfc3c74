"""``evermini ask``: one question about some files, answered in this process."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evermini.cli.files import (
    ExcludeFlag,
    collect_documents,
    naming_images,
    piped_input,
    split_images,
    too_long_by_folder,
)
from evermini.cli.options import MODEL_SETTINGS, with_settings
from evermini.config import LoadedSettings
from evermini.errors import InvalidRequestError

if TYPE_CHECKING:
    from evermini.documents import Document


class Reading(StrEnum):
    """How a long prompt is read."""

    auto = "auto"
    recall = "recall"
    sweep = "sweep"
    dense = "dense"


@with_settings(*MODEL_SETTINGS)
def ask(
    loaded: LoadedSettings,
    question: Annotated[
        str | None,
        typer.Argument(
            help="What to ask. Without it, piped input is the question.", show_default=False
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help="File (text, PDF, DOCX, PPTX, image), folder or quoted glob to put into the prompt; - is piped input. "
            "May be repeated.",
            metavar="PATH",
        ),
    ] = None,
    exclude: ExcludeFlag = None,
    system: Annotated[
        str | None, typer.Option(help="System message.", metavar="TEXT", show_default=False)
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest answer, the same each time. Up to 2.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to answer with at most.", show_default="what fits")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text; may be repeated.", metavar="TEXT"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes drawing repeatable.", show_default="random")
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="From -2 to 2: above 0, less of what was said at all.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="From -2 to 2: above 0, less of what was said often.")
    ] = 0.0,
    schema: Annotated[
        Path | None,
        typer.Option(
            help="Answer in JSON that follows the JSON schema in this file.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    reading: Annotated[
        Reading,
        typer.Option(
            help="How to read what exceeds the model's window: recall finds the passages that the question needs, "
            "sweep reads everything (for summaries, counts, lists), dense refuses it."
        ),
    ] = Reading.auto,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="Print to stderr what of a long text was read, or what was found in it; with --json, into the object.",
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print token counts, speed and every file that was skipped to stderr.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
) -> None:
    """Ask one question, about files and piped input if there are any.

    \b
    evermini ask "What is a monad?"
    evermini ask -f main.py -f util.py "Where is the bug?"
    evermini ask -f src -f 'docs/**/*.md' --why "Where is the retry limit set?"
    git diff | evermini ask -v "Write a commit message."
    evermini ask -f letter.txt --schema invoice.json "Which invoice is this?"
    evermini ask -f receipt.jpg "What is the total?"

    Of a folder, what is hidden or ignored (.gitignore, .ignore) is left out; binaries, empty and very large files are
    skipped, and stderr says so.

    Files longer than the model's window are read once, kept indexed, and answered from the passages that the question
    needs. For summaries, counts and lists of the whole: `--reading sweep`. See `evermini contexts`.
    """  # noqa: D301 (\b, a real backspace, keeps the examples' line breaks in --help)
    from evermini.documents import STDIN, read_document

    named, piped = list(files or ()), piped_input()
    if question is None:
        question = "" if STDIN in named else read_document(piped, "Standard input").text.strip("\n")
        if not question:
            raise typer.BadParameter("Give a question, or pipe one in.", param_hint="QUESTION")
    elif piped.strip() and STDIN not in named:
        named.append(STDIN)
    named, images = split_images(named, piped)
    documents = collect_documents(named, piped, exclude, settings=loaded.settings, verbose=verbose)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    text = build_prompt(documents, question)
    messages.append({"role": "user", "content": _content(list(images.values()), text)})
    params = {
        "temperature": temperature,
        "top_p": top_p,
        "max_completion_tokens": max_tokens,
        "stop": stop,
        "seed": seed,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "response_format": None if schema is None else _schema_format(schema),
        "x_evermini": {"reading": reading.value, "why": why},
    }
    with naming_images(list(images)):
        _answer(loaded, messages, params, as_json=as_json, verbose=verbose)


def build_prompt(documents: Sequence[Document], question: str) -> str:
    """Return the documents, each between tags that name it, and the question after them."""
    from evermini.service.parts import wrap_document

    return "\n".join([*(wrap_document(item.name, item.text) for item in documents), question])


def _content(images: Sequence[bytes], text: str) -> str | list[dict[str, Any]]:
    """Return a message's content: the images, then the text."""
    if not images:
        return text
    urls = [f"data:;base64,{base64.b64encode(data).decode()}" for data in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*parts, {"type": "text", "text": text}]


def _schema_format(path: Path) -> dict[str, Any]:
    """Return the form of an answer that follows the schema in a file.

    Raises:
        InvalidRequestError: The file is no JSON object.
    """
    from evermini.documents import read_file

    try:
        definition = json.loads(read_file(path).text)
    except ValueError as error:
        raise InvalidRequestError(f"{path} is not JSON: {error}. Give a JSON schema.") from None
    if not isinstance(definition, dict):
        raise InvalidRequestError(f"{path} holds no JSON object. Give a JSON schema.")
    name = re.sub(r"[^a-zA-Z0-9_-]+", "_", path.stem)[:64] or "answer"
    return {"type": "json_schema", "json_schema": {"name": name, "schema": definition}}


def _answer(
    loaded: LoadedSettings,
    messages: list[dict[str, Any]],
    params: dict[str, Any],
    *,
    as_json: bool,
    verbose: bool,
) -> None:
    from evermini.cli.reading import cited_lines, first_word_awaited, reading_bar, why_lines
    from evermini.cli.talk import (
        as_json_object,
        computed_tokens,
        open_llm,
        speed_line,
        warn_if_cut,
    )

    with open_llm(loaded.settings) as llm:
        with reading_bar() as progress, too_long_by_folder():
            stream = llm.chat(messages, stream=True, progress=progress, **params)
        with stream, first_word_awaited(computed_tokens(stream)) as begins:
            for delta in stream:
                if not as_json:
                    begins()
                    print(delta.text, end="", flush=True)
        print(as_json_object(stream) if as_json else "")
        warn_if_cut(stream.finish_reason, params["max_completion_tokens"])
        if stream.why is not None and not as_json:
            told = why_lines(stream.why, stream.usage.prompt_tokens)
            print(*told, *cited_lines(stream.why), sep="\n", file=sys.stderr)
        if verbose:
            print(speed_line(stream), file=sys.stderr)
