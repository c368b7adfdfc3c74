"""The contract's response objects, as plain dicts ready for JSON. Keys that are required are there even when null."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evermini.recall.recall import Progress
from evermini.service.answer import (
    ChatChoice,
    ChatDelta,
    ScoredText,
    TokenScore,
    ToolCall,
    ToolCallDelta,
)
from evermini.service.chat import ChatRun, Ticket
from evermini.service.completions import CompletionRun
from evermini.service.embedded import Embeddings
from evermini.service.generation import Usage
from evermini.service.model_info import ModelInfo
from evermini.service.places import Place
from evermini.service.reading import Recalled
from evermini.service.schemas import ChatRequest
from evermini.service.sweep.result import Swept
from evermini.service.text_answer import TextChoice, TextDelta, TextToken

Json = dict[str, Any]

IMPOSSIBLE = -9999.0
"""How the contract writes the log-probability of a token that cannot be drawn; JSON has no infinity."""


def usage(used: Usage) -> Json:
    """Return the ``usage`` object; every count is there, zeros included."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": used.cached_tokens,
            "audio_tokens": 0,
            "image_tokens": used.image_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": used.accepted_prediction_tokens,
            "rejected_prediction_tokens": used.rejected_prediction_tokens,
        },
    }


def embeddings(found: Embeddings, *, as_base64: bool) -> Json:
    """Return the embeddings, as arrays of numbers or as base64 of little-endian float32."""
    rows: Iterable[Any] = found.vectors.tolist()
    if as_base64:
        rows = (base64.b64encode(row.astype("<f4").tobytes()).decode() for row in found.vectors)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ],
        "model": found.model,
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
    }


def model(name: str, info: ModelInfo) -> Json:
    """Return a model object under one of the model's names."""
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": info.owned_by,
        "context_window": info.context_window,
        "input_modalities": ["text", "image"] if info.sees else ["text"],
    }


def chat_completion(run: ChatRun) -> Json:
    """Return the whole answer, when all of it is there."""
    body = {
        **_chat_head(run, "chat.completion"),
        "choices": [
            {
                "index": choice.index,
                "message": chat_message(run.request, choice),
                "logprobs": _chat_logprobs(run, choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for choice in run.choices
        ],
        "usage": usage(run.usage),
    }
    if run.request.wants_why:
        body["x_evermini"] = why(run, run.choices)
    if run.request.metadata is not None:
        body["metadata"] = run.request.metadata
    return body


def stored_messages(run: ChatRun) -> list[Json]:
    """Return the messages that a completion answers, as they are listed when it is stored: each with an id."""
    listed = []
    for number, message in enumerate(run.request.messages):
        parts = message.content or []
        fields = message.model_dump(exclude={"content"}, exclude_none=True)
        listed.append(
            {
                "id": f"{run.id}-{number}",
                "content": "".join(part.text or "" for part in parts) if parts else None,
                "refusal": None,
                "content_parts": [part.model_dump(exclude_none=True) for part in parts]
                if len(parts) > 1
                else None,
                **fields,
            }
        )
    return listed


def chat_message(request: ChatRequest, choice: ChatChoice) -> Json:
    """Return the assistant's message; ``content`` is null where tools were offered and it has no text."""
    message: Json = {
        "role": "assistant",
        "content": choice.text or (None if request.offers_tools else ""),
        "refusal": None,
        "annotations": [],
    }
    if choice.tool_calls and request.functions:
        call = choice.tool_calls[0]
        message["function_call"] = {"name": call.name, "arguments": call.arguments}
    elif choice.tool_calls:
        message["tool_calls"] = [tool_call(call) for call in choice.tool_calls]
    return message


def tool_call(call: ToolCall) -> Json:
    """Return a call as it stands in a message."""
    if call.type == "custom":
        called = {"custom": {"name": call.name, "input": call.arguments}}
    else:
        called = {"function": {"name": call.name, "arguments": call.arguments}}
    return {"id": call.id, "type": call.type, **called}


def why(run: ChatRun, choices: Sequence[ChatChoice]) -> Json:
    """Return how the prompt was read, and the citations of finished answers.

    ``recall`` and ``sweep`` are null if it was read whole.
    """
    if run.told is not None:
        return run.told
    recalled, swept = run.recalled, run.swept
    return {
        "reading": "sweep" if swept is not None else "dense" if recalled is None else "recall",
        "recall": None if recalled is None else _recall(recalled),
        "sweep": None if swept is None else _sweep(swept),
        "citations": [
            {
                "choice": choice.index,
                "answer": [found.start, found.end],
                "quote": found.quote,
                **_place(found),
            }
            for choice in choices
            for found in choice.citations
        ],
    }


def _recall(recalled: Recalled) -> Json:
    found = recalled.selection
    return {
        "question": recalled.question,
        "note": recalled.note,
        "prompt_tokens_read": len(recalled.prompt),
        "spans": [
            {
                "score": round(passage.score, 4),
                **_place(passage),
                "included": passage.is_included,
            }
            for passage in recalled.passages
        ],
        "rounds": found.rounds,
        "top_score": round(found.top_score, 4),
        "spread": round(found.spread, 4),
        "ingest_seconds": round(recalled.ingest_seconds, 3),
        "query_seconds": round(found.query_seconds, 3),
        "scan_seconds": round(found.scan_seconds, 3),
    }


def _place(place: Place) -> Json:
    return {
        "source": place.source,
        "message": place.message,
        "part": place.part,
        "characters": list(place.characters),
        **_lines_and_pages(place),
    }


def _lines_and_pages(place: Place) -> Json:
    pages = place.pages
    return {"lines": list(place.lines), "pages": None if pages is None else list(pages)}


def file_citations(run: ChatRun) -> list[Json]:
    """Return the annotations of the first answer: uploaded files in which words of it stand, after those words.

    The contract's form has no page; that is an extra key.
    """
    found = []
    for citation in run.choices[0].citations:
        parts = run.request.messages[citation.message].content or ()
        file = parts[citation.part].file if citation.part < len(parts) else None
        if file is None or file.file_id is None:
            continue
        found.append(
            {
                "type": "file_citation",
                "file_id": file.file_id,
                "filename": citation.source or "",
                "index": citation.end,
                "x_evermini": {"quote": citation.quote, **_lines_and_pages(citation)},
            }
        )
    return found


def _sweep(swept: Swept) -> Json:
    return {
        "task": swept.task,
        "question": swept.question,
        "windows": swept.num_windows,
        "counts": swept.counts,
        "items": None if swept.items is None else list(swept.items),
        "empty_windows": swept.num_empty,
        "dropped_items": swept.num_dropped,
        "reduce_rounds": swept.num_rounds,
        "prompt_tokens_read": len(swept.prompt),
        "tokens_read": swept.tokens_read,
        "tokens_written": swept.tokens_written,
        "seconds": round(swept.seconds, 3),
    }


def chat_progress_chunk(ticket: Ticket, info: ModelInfo, now: Progress) -> Json:
    """Return a chunk without choices that says how far the reading of a long text is."""
    return {
        "id": ticket.id,
        "object": "chat.completion.chunk",
        "created": ticket.created,
        "model": info.id,
        "choices": [],
        "x_evermini": {
            "progress": {
                "stage": now.stage,
                "done_tokens": now.done_tokens,
                "total_tokens": now.total_tokens,
                "seconds": round(now.seconds, 3),
                "tokens_per_second": round(now.tokens_per_second, 1),
                "eta_seconds": None if now.eta is None else round(now.eta, 1),
            }
        },
    }


def chat_role_chunk(run: ChatRun, index: int) -> Json:
    """Return the chunk that opens a choice."""
    content = None if run.request.offers_tools else ""
    return _chat_chunk(
        run, index, {"role": "assistant", "content": content, "refusal": None}, None, None
    )


def chat_chunks(run: ChatRun, delta: ChatDelta) -> list[Json]:
    """Return what a delta is in a stream: text, calls, then the end, each in a chunk of its own."""
    chunks = []
    if delta.text or delta.logprobs:
        logprobs = _chat_logprobs(run, delta.logprobs)
        chunks.append(_chat_chunk(run, delta.index, {"content": delta.text}, logprobs, None))
    for piece in delta.tool_calls:
        chunks.append(_chat_chunk(run, delta.index, _call_delta(run.request, piece), None, None))
    if delta.finish_reason is not None:
        last = _chat_chunk(run, delta.index, {}, None, delta.finish_reason)
        if run.request.wants_why:
            last["x_evermini"] = why(run, [run.choices[delta.index]])
        chunks.append(last)
    return chunks


def chat_usage_chunk(run: ChatRun) -> Json:
    """Return the chunk after the last choice, for ``include_usage``."""
    return {**_chat_head(run, "chat.completion.chunk"), "choices": [], "usage": usage(run.usage)}


def text_completion(run: CompletionRun, choices: Sequence[TextChoice]) -> Json:
    """Return the whole completion."""
    return {
        **_text_head(run),
        "choices": [
            {
                "text": choice.text,
                "index": choice.index,
                "logprobs": _text_logprobs(run, choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
        "usage": usage(run.usage),
    }


def text_chunk(run: CompletionRun, delta: TextDelta) -> Json:
    """Return a delta of a streamed completion."""
    chunk = {
        **_text_head(run),
        "choices": [
            {
                "text": delta.text,
                "index": delta.index,
                "logprobs": _text_logprobs(run, [*delta.echoed, *delta.tokens]),
                "finish_reason": delta.finish_reason,
            }
        ],
    }
    return {**chunk, "usage": None} if run.request.wants_usage_chunk else chunk


def text_usage_chunk(run: CompletionRun) -> Json:
    """Return the chunk after the last choice, for ``include_usage``."""
    return {**_text_head(run), "choices": [], "usage": usage(run.usage)}


def _chat_head(run: ChatRun, kind: str) -> Json:
    return {
        "id": run.id,
        "object": kind,
        "created": run.created,
        "model": run.info.id,
        "service_tier": "default",
        "system_fingerprint": run.info.system_fingerprint,
    }


def _call_delta(request: ChatRequest, piece: ToolCallDelta) -> Json:
    """Return a piece of a call; id and type stand in its first one alone."""
    named = {} if piece.name is None else {"name": piece.name}
    if request.functions:
        return {"function_call": {**named, "arguments": piece.arguments}}
    head = {} if piece.id is None else {"id": piece.id, "type": piece.type}
    text = "input" if piece.type == "custom" else "arguments"
    called = {piece.type: {**named, text: piece.arguments}}
    return {"tool_calls": [{"index": piece.index, **head, **called}]}


def _chat_chunk(
    run: ChatRun, index: int, delta: Json, logprobs: Json | None, finish_reason: str | None
) -> Json:
    chunk = {
        **_chat_head(run, "chat.completion.chunk"),
        "choices": [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        ],
    }
    return {**chunk, "usage": None} if run.request.wants_usage_chunk else chunk


def _chat_logprobs(run: ChatRun, tokens: Sequence[ScoredText]) -> Json | None:
    if not run.request.logprobs:
        return None
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[ScoredText]) -> list[Json]:
    """Return tokens' log-probabilities as chat completions and responses show them."""
    return [
        {**_token_score(token), "top_logprobs": [_token_score(best) for best in token.top]}
        for token in tokens
    ]


def _token_score(score: TokenScore) -> Json:
    return {
        "token": score.text,
        "bytes": None if score.raw is None else list(score.raw),
        "logprob": _finite(score.logprob),
    }


def _text_head(run: CompletionRun) -> Json:
    return {
        "id": run.id,
        "object": "text_completion",
        "created": run.created,
        "model": run.info.id,
        "system_fingerprint": run.info.system_fingerprint,
    }


def _text_logprobs(run: CompletionRun, tokens: Sequence[TextToken]) -> Json | None:
    if run.request.logprobs is None:
        return None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if token.logprob is None else _finite(token.logprob) for token in tokens
        ],
        "top_logprobs": [_finite_values(token.top) for token in tokens]
        if run.request.logprobs
        else None,
        "text_offset": [token.offset for token in tokens],
    }


def _finite_values(top: Mapping[str, float] | None) -> Json | None:
    return None if top is None else {text: _finite(logprob) for text, logprob in top.items()}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
