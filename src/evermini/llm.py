"""The Python API: a model in this process, without a server.

    from evermini import LLM

    with LLM("mini") as llm:
        answer = llm.chat([{"role": "user", "content": "Name a prime."}], max_tokens=20, temperature=0)
        print(answer.text, answer.usage.completion_tokens)

        with llm.chat([{"role": "user", "content": "Tell me a story."}], stream=True) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.finish_reason)

Parameters, their checks and their meaning are those of ``/v1/chat/completions`` and ``/v1/completions``: the same code
serves both. Everything here blocks; one `LLM` may be used from several threads, whose requests then share batches.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar, overload

from anyio.from_thread import start_blocking_portal

from evermini.backends.spec import parse_upstream
from evermini.config import Settings, load_settings
from evermini.errors import EngineStoppedError, UnsupportedParameterError, UpstreamError
from evermini.service import chat as chat_service
from evermini.service import completions as completion_service
from evermini.service import wire
from evermini.service.directory import load_tuned
from evermini.service.documents import Documents
from evermini.service.embedded import Embeddings
from evermini.service.embeddings import embed, parse_embeddings
from evermini.service.formats import format_of
from evermini.service.model_info import ModelInfo
from evermini.service.runtime import ServedModel, load
from evermini.service.schemas import parse_chat, parse_completion
from evermini.service.upstream.model import UpstreamModel

if TYPE_CHECKING:
    from evermini.recall.recall import Recall
    from evermini.service.answer import ChatChoice, ChatDelta
    from evermini.service.generation import Usage
    from evermini.service.reading import OnProgress, Recalled
    from evermini.service.sweep.result import Swept
    from evermini.service.text_answer import TextChoice, TextDelta
    from evermini.text.tokenizer import Tokenizer

T = TypeVar("T")


class _Text(Protocol):
    """A piece of an answer: a whole choice, or what one step adds to it."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...


ChoiceT = TypeVar("ChoiceT", bound=_Text)
DeltaT = TypeVar("DeltaT", bound=_Text)
DeltaT_co = TypeVar("DeltaT_co", bound=_Text, covariant=True)


class _Run(Protocol[DeltaT_co]):
    """A request in flight, as the service layer gives it."""

    def deltas(self) -> AsyncGenerator[DeltaT_co, None]: ...
    def abort(self) -> None: ...
    @property
    def usage(self) -> Usage: ...


@dataclass(frozen=True)
class Answer(Generic[ChoiceT]):
    """A finished answer.

    Attributes:
        model: Name of the model that answered.
        choices: The ``n`` answers, by index.
        usage: Tokens of the prompt, of them cached, and of all choices.
        seconds: From the call to the last token.
        recalled: The excerpts that a prompt longer than the window was read in; else ``None``.
        swept: How all of a prompt longer than the window was read, if it was; else ``None``.
        why: How the prompt was read, and where words of the answer stand in it, as ``x_evermini`` of the API says it;
            ``None`` unless ``x_evermini={"why": True}`` asks for it.
    """

    model: str
    choices: Sequence[ChoiceT]
    usage: Usage
    seconds: float
    recalled: Recalled | None = None
    swept: Swept | None = None
    why: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended: ``"stop"``, or ``"length"`` if the token limit came first."""
        return self.choices[0].finish_reason


class AnswerStream(Generic[DeltaT]):
    """An answer as it is written: iterate once over its deltas. `close` (or leaving ``with``) ends it early.

    Attributes:
        model: Name of the model that answers.
        text: What the first choice says so far.
        finish_reason: Why the first choice ended; ``None`` until it has.
        first_token_seconds: From the call to the first delta; ``None`` until then.
        seconds: From the call to the latest delta.
        recalled: The excerpts that a prompt longer than the window was read in; else ``None``.
        swept: How all of a prompt longer than the window was read, if it was; else ``None``.
    """

    def __init__(
        self,
        llm: LLM,
        run: _Run[DeltaT],
        started: float,
        recalled: Recalled | None = None,
        swept: Swept | None = None,
        why: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self.recalled = recalled
        self.swept = swept
        self._why = why
        self.model = llm.info.id
        self.text = ""
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self.seconds = 0.0
        self._llm = llm
        self._run = run
        self._deltas = run.deltas()
        self._started = started
        self._is_over = False

    @property
    def usage(self) -> Usage:
        """Tokens so far; final once the deltas are exhausted."""
        return self._run.usage

    @property
    def why(self) -> dict[str, Any] | None:
        """As `Answer.why`, of what has come so far."""
        return self._why()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DeltaT:
        if self._is_over:
            raise StopIteration
        try:
            delta: DeltaT | None = self._llm._call(_next, self._deltas)
        except BaseException:  # Ctrl-C too: the engine must not go on for nobody
            self.close()
            raise
        if delta is None:
            self._is_over = True
            raise StopIteration
        self.seconds = time.perf_counter() - self._started
        if self.first_token_seconds is None:
            self.first_token_seconds = self.seconds
        if delta.index == 0:
            self.text += delta.text
            self.finish_reason = delta.finish_reason
        return delta

    def close(self) -> None:
        """End the request in the engine; does nothing if it has ended."""
        if not self._is_over and not self._llm.is_closed:
            self._is_over = True
            self._llm._call(_abort, self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LLM:
    """A loaded model. Use it as a context manager, or `close` it: it holds memory and a thread.

    Args:
        model: Tier, alias, path of a GGUF file or safetensors folder, ``ft:`` name of a fine-tuned model, or
            ``NAME=URL`` of an engine that answers; default the setting ``model``.
        settings: Ready settings, taken as they are; default: from the environment and the settings file.
        progress: Told how a fetch of the weights goes: bytes done, bytes in total, where from.
        **overrides: Settings by name, e.g. ``threads=4``; they win over the environment and the settings file.

    Attributes:
        is_closed: `close` was called.

    Raises:
        ConfigError: A setting is unknown, malformed, or does not fit the machine.
        ModelNotFoundError: Nothing has that name.
        DownloadError: The weights could not be fetched.
        ModelError: The checkpoint cannot be used.
    """

    def __init__(
        self,
        model: str | PathLike[str] | None = None,
        *,
        settings: Settings | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        **overrides: object,
    ) -> None:
        if settings is None:
            settings = load_settings(overrides, flag_label=lambda name: f"argument {name}").settings
        elif overrides:
            raise TypeError("Give ready settings or single ones by name, not both.")
        name = settings.models[0] if model is None else fspath(model)
        self.is_closed = False
        with ExitStack() as stack:
            # Closed in reverse: the engine first, so that nobody waits for an answer in a loop that is gone.
            self._portal = stack.enter_context(start_blocking_portal())
            if name.startswith("ft:") and parse_upstream(name) is None:
                self._served = load_tuned(name, settings, progress=progress)
            else:
                self._served = load(name, settings, progress=progress)
            stack.callback(self._served.close, timeout=0.0)
            self._documents = Documents.open(settings, None)
            stack.callback(self._documents.close)
            # A script that ends without closing must not end in a traceback of the event loop's.
            stack.callback(atexit.unregister, closing := partial(_close, weakref.ref(self)))
            atexit.register(closing)
            self._stack = stack.pop_all()

    @property
    def info(self) -> ModelInfo:
        """The model's names and its context window."""
        return self._served.info

    @property
    def native_window(self) -> int:
        """Tokens of prompt and answer that the model itself reads at once; longer prompts go through recall.

        Raises:
            UpstreamError: Another engine runs the model, and does not say.
        """
        if isinstance(self._served, ServedModel):
            return self._served.worker.max_model_len
        found = self._call(self._served.found)
        if found.window is None:
            raise UpstreamError(
                "The engine behind this model does not say how long its window is. Say it: ?window=TOKENS."
            )
        return found.window

    @property
    def recall(self) -> Recall | None:
        """The index that prompts longer than the window are read through; ``None`` if the setting is off.

        An unknown model is calibrated first, which takes a minute or more.
        """
        return self._served.reader.recall() if self._served.reader else None

    @property
    def weights(self) -> str:
        """Hash of the checkpoint, everywhere the same for the same file; of another engine's model, its fingerprint."""
        if isinstance(self._served, UpstreamModel):
            return self._served.info.system_fingerprint
        return self._served.weights

    def count_tokens(self, text: str) -> int:
        """Return how many tokens a plain text has for this model."""
        return len(self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, such as those of `Recalled.prompt`; special tokens are left out."""
        return self._tokenizer.decode(ids)

    @property
    def _tokenizer(self) -> Tokenizer:
        """The model's tokenizer; where another engine runs it, that of the model that reads long prompts."""
        if isinstance(self._served, ServedModel):
            return self._served.tokenizer
        if self._served.reader is None:
            raise UnsupportedParameterError(
                "There is no tokenizer for this model, which another engine runs: that takes the setting 'recall'.",
                param="model",
            )
        return self._served.reader.tokenizer

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        progress: OnProgress | None = None,
        **params: Any,
    ) -> Answer[ChatChoice]: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        progress: OnProgress | None = None,
        **params: Any,
    ) -> AnswerStream[ChatDelta]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        progress: OnProgress | None = None,
        **params: Any,
    ) -> Answer[ChatChoice] | AnswerStream[ChatDelta]:
        """Answer a conversation; one longer than the model's window as ``x_evermini.reading`` says.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            stream: Return an iterator over the answer as it is written.
            progress: Told, from another thread, how reading a long text goes.
            **params: Those of ``/v1/chat/completions``: ``max_completion_tokens``, ``temperature``, ``top_p``, ``n``,
                ``stop``, ``seed``, ``logprobs``, ``top_logprobs``, ``logit_bias``, ``presence_penalty``,
                ``frequency_penalty``, ``tools`` (a choice has ``tool_calls``), ``tool_choice``,
                ``parallel_tool_calls``, ``x_evermini``; ``response_format`` as there, or a pydantic model's class.

        Raises:
            ContextLengthError: The prompt is longer than `ModelInfo.context_window`, or prompt and output do not fit
                into the model's window and recall is off or cannot help.
            InvalidRequestError: A parameter is unknown, malformed or out of range.
        """
        started = time.perf_counter()
        body = {**params, "model": self.info.id, "messages": [dict(item) for item in messages]}
        if isinstance(form := params.get("response_format"), type):
            body["response_format"] = format_of(form)
        request = parse_chat({**body, "stream": stream})
        run = self._call(
            partial(
                chat_service.start,
                self._served,
                request,
                documents=self._documents,
                progress=progress,
            )
        )
        why = partial(_why, run)
        if stream:
            return AnswerStream(self, run, started, run.recalled, run.swept, why)
        choices = self._call(run.collect)
        seconds = time.perf_counter() - started
        return Answer(self.info.id, choices, run.usage, seconds, run.recalled, run.swept, why())

    @overload
    def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **params: Any
    ) -> Answer[TextChoice]: ...
    @overload
    def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **params: Any
    ) -> AnswerStream[TextDelta]: ...
    def complete(
        self, prompt: str | Sequence[int], *, stream: bool = False, **params: Any
    ) -> Answer[TextChoice] | AnswerStream[TextDelta]:
        """Continue a text (or token ids), without a chat template; 16 tokens unless ``max_tokens`` says more.

        Args:
            prompt: The text to continue.
            stream: As in `chat`.
            **params: Those of ``/v1/completions``; besides the sampling parameters ``echo`` and ``logprobs``.

        Raises:
            ContextLengthError: Prompt and output do not fit into the model's window.
            InvalidRequestError: A parameter is unknown, malformed or out of range.
        """
        started = time.perf_counter()
        body = {**params, "model": self.info.id, "stream": stream}
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        run = self._call(completion_service.start, self._served, parse_completion(body))
        if stream:
            return AnswerStream(self, run, started)
        choices = self._call(run.collect)
        return Answer(self.info.id, choices, run.usage, time.perf_counter() - started)

    def embed(
        self, texts: str | Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None
    ) -> Embeddings:
        """Return a vector of unit length for each text: the mean of its hidden states after the last layer.

        The models were trained to write, not to search; see docs/api.md.

        Args:
            texts: One or several, as text or token ids; up to 8,192 tokens each.
            dimensions: Keep this many numbers of each vector.

        Raises:
            ContextLengthError: A text is too long.
            InvalidRequestError: One is empty, or there are too many.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        inputs = [text if isinstance(text, str) else list(text) for text in given]
        body = {"model": self.info.id, "input": inputs, "dimensions": dimensions}
        return self._call(embed, self._served, parse_embeddings(body))

    def close(self) -> None:
        """End what still runs and free the model; does nothing the second time."""
        self.is_closed = True
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a coroutine function in the portal's event loop; Ctrl-C here cancels it there."""
        if self.is_closed:
            raise EngineStoppedError("This LLM is closed. Make a new one.")
        future = self._portal.start_task_soon(function, *args)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _close(llm: weakref.ref[LLM]) -> None:
    """Close an LLM that is still there."""
    if (open_one := llm()) is not None:
        open_one.close()


def _why(run: chat_service.ChatRun) -> dict[str, Any] | None:
    return wire.why(run, run.choices) if run.request.wants_why else None


async def _next(deltas: AsyncGenerator[DeltaT, None]) -> DeltaT | None:
    return await anext(deltas, None)


async def _abort(run: _Run[Any]) -> None:
    run.abort()
