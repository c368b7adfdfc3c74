"""What `ask` and `chat` share: a model in this process or behind a URL, and how its answers are summed up."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

import httpx

from evermini.cli.pull import download_bar
from evermini.config import Settings
from evermini.errors import UpstreamError
from evermini.llm import LLM, AnswerStream

Messages = Sequence[Mapping[str, str]]


class Talker(Protocol):
    """Someone to talk to.

    Attributes:
        name: The model.
        finish_reason: Why the latest reply ended.
    """

    name: str
    finish_reason: str | None

    def reply(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str, None, None]:
        """Yield the answer piece by piece; closing the generator ends it."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_llm(settings: Settings) -> LLM:
    """Load the settings' first model, with a bar if its weights have to be fetched."""
    name = settings.models[0]
    if sys.stderr.isatty():
        print(f"Loading {name} ...", file=sys.stderr)
    with download_bar(name) as progress:
        return LLM(settings=settings, progress=progress)


class InProcess:
    """A model in this process; a `Talker`."""

    def __init__(self, settings: Settings) -> None:
        self._llm = open_llm(settings)
        self.name = self._llm.info.id
        self.finish_reason: str | None = None

    def reply(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str, None, None]:
        """Yield the answer piece by piece."""
        with self._llm.chat(messages, stream=True, **params) as stream:
            for delta in stream:
                yield delta.text
            self.finish_reason = stream.finish_reason

    def close(self) -> None:
        """Free the model."""
        self._llm.close()


class Remote:
    """A model behind an OpenAI-compatible URL; a `Talker`.

    Args:
        base_url: As for OpenAI's clients, e.g. ``http://127.0.0.1:8000/v1``.
        api_key: Sent if given.
        model: Its name there; ``None``: the first one the server lists.
    """

    def __init__(self, base_url: str, api_key: str | None, model: str | None) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A long prompt may take minutes until its first token, so reading has no limit; Ctrl-C ends it.
        timeout = httpx.Timeout(None, connect=10)
        self._base_url = base_url.rstrip("/")
        self._client = httpx.Client(base_url=self._base_url, headers=headers, timeout=timeout)
        self.finish_reason: str | None = None
        try:
            self.name = model or self._first_model()
        except BaseException:
            self.close()
            raise

    def reply(self, messages: Messages, params: Mapping[str, Any]) -> Generator[str, None, None]:
        """Yield the answer piece by piece."""
        body = {**params, "model": self.name, "messages": list(messages), "stream": True}
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise self._refused(response)
                for event in _events(response.iter_lines()):
                    if "error" in event:
                        raise UpstreamError(f"{self._base_url}: {event['error'].get('message')}")
                    for choice in event.get("choices", ()):
                        self.finish_reason = choice.get("finish_reason")
                        yield choice["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _first_model(self) -> str:
        try:
            response = self._client.get("/models")
            if response.is_error:
                raise self._refused(response)
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UpstreamError(
                f"{self._base_url} does not answer like an OpenAI-compatible server. Check --url; it usually ends "
                "in /v1."
            ) from error

    def _refused(self, response: httpx.Response) -> UpstreamError:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = "no explanation; check --url, which usually ends in /v1"
        return UpstreamError(f"{self._base_url} answers {response.status_code}: {message}")

    def _unreachable(self, error: httpx.HTTPError) -> UpstreamError:
        return UpstreamError(
            f"{self._base_url} cannot be reached: {error}. Start a server with `evermini serve`, or correct --url."
        )


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a stream of server-sent events, up to ``[DONE]``."""
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def warn_if_cut(finish_reason: str | None, max_tokens: int | None) -> None:
    """Say on stderr that, and why, an answer is not complete."""
    if finish_reason == "length":
        why = f"after {max_tokens} tokens, as asked" if max_tokens else "the model's window is full"
        print(f"(the answer ends early: {why})", file=sys.stderr)


def speeds(stream: AnswerStream[Any]) -> dict[str, float | None]:
    """Return an answer's times in seconds and speeds in tokens per second; ``None`` where there is nothing to measure.

    Prefill counts the prompt tokens that were not cached, up to the first token; decoding, the tokens after that. A
    prompt read in excerpts or windows has no speed of prefill: most of it is never computed for the answer.
    """
    usage, first = stream.usage, stream.first_token_seconds
    prefill = decode = None
    if first:
        if stream.recalled is None and stream.swept is None:
            prefill = (usage.prompt_tokens - usage.cached_tokens) / first
        if usage.completion_tokens > 1 and stream.seconds > first:
            decode = (usage.completion_tokens - 1) / (stream.seconds - first)
    return {
        "first_token_seconds": first,
        "seconds": stream.seconds,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
    }


def computed_tokens(stream: AnswerStream[Any]) -> int:
    """Return how many tokens of the prompt the model reads for the answer, those in its cache included."""
    read = stream.recalled or stream.swept
    return stream.usage.prompt_tokens if read is None else len(read.prompt)


def speed_line(stream: AnswerStream[Any]) -> str:
    """Return usage and speed in one line."""
    usage, measured = stream.usage, speeds(stream)
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    parts = [f"{usage.prompt_tokens} prompt tokens{cached}", f"{usage.completion_tokens} written"]
    for name, unit, label in (
        ("prefill_tokens_per_second", "tok/s", "prefill"),
        ("first_token_seconds", "s", "first token"),
        ("decode_tokens_per_second", "tok/s", "decode"),
        ("seconds", "s", "in all"),
    ):
        value = measured[name]
        if value is not None:
            parts.append(
                f"{label} {value:.3g} {unit}" if value < 1000 else f"{label} {value:.0f} {unit}"
            )
    return " · ".join(parts)


def as_json_object(stream: AnswerStream[Any]) -> str:
    """Return an answer, its usage and its speed as JSON, and what ``x_evermini`` says if that was asked for."""
    usage = stream.usage
    report = {
        "model": stream.model,
        "text": stream.text,
        "finish_reason": stream.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "speed": speeds(stream),
    }
    if stream.why is not None:
        report["x_evermini"] = stream.why
    return json.dumps(report, ensure_ascii=False)
