"""The answer's deltas as the events of a stream, and as the items of the output.

    response.created, response.in_progress
      response.output_item.added
        response.content_part.added, response.output_text.delta ..., .done, response.content_part.done       (a message)
        response.function_call_arguments.delta ..., .done                                                    (a call)
      response.output_item.done
    response.completed | response.incomplete | response.failed

Every event has the next sequence number. Snapshots of the response are not changed by what comes later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from evermini.service.answer import ChatDelta, FinishReason, ScoredText, ToolCallDelta
from evermini.service.generation import Usage
from evermini.service.responses.items import PREFIXES, new_id

Json = dict[str, Any]

_INPUT_NAME = {"function_call": "arguments", "custom_tool_call": "input"}
_EVENT_NAME = {
    "function_call": "response.function_call_arguments",
    "custom_tool_call": "response.custom_tool_call_input",
}


class EventWriter:
    """Writes one response's events and keeps its object up to date.

    Args:
        body: The response's object, whose status is ``queued`` or ``in_progress``.
        scores: Gives tokens' log-probabilities as they are shown; ``None``: they are not.

    Attributes:
        annotate: Gives the annotations of the finished text; none unless it is set.
    """

    def __init__(
        self, body: Json, scores: Callable[[Sequence[ScoredText]], list[Json]] | None
    ) -> None:
        self.body = body
        self.annotate: Callable[[], list[Json]] = list
        self._scores = scores
        self._next = 0
        self._item: Json | None = None
        self._written = ""
        self._logprobs: list[Json] = []

    def snapshot(self, kind: str) -> Json:
        """Return an event with the response as it is now, such as ``response.created``."""
        return self._event(kind, response={**self.body, "output": [*self.body["output"]]})

    def skip(self, number: int) -> None:
        """Leave out sequence numbers that events had before this process."""
        self._next += number

    def started(self) -> list[Json]:
        """Return the events that come before the answer's; those that came before are not repeated."""
        self.body["status"] = "in_progress"
        first = [] if self._next else [self.snapshot("response.created")]
        return [*first, self.snapshot("response.in_progress")]

    def add(self, delta: ChatDelta) -> list[Json]:
        """Return the events of what the answer gained."""
        events: list[Json] = []
        if delta.text or delta.logprobs:
            if self._item is None or self._item["type"] != "message":
                events += [*self._close("completed"), *self._open_message()]
            events.append(self._add_text(delta))
        for piece in delta.tool_calls:
            events += self._add_call(piece)
        return events

    def finish(self, reason: FinishReason | None, usage: Usage) -> list[Json]:
        """Return the last events but one, and complete the object; `terminal` is the last."""
        cut_by = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            reason or ""
        )
        is_cut = cut_by is not None
        events = self._close("incomplete" if is_cut else "completed")
        if not self.body["output"]:  # an answer without text is a message without text
            events += [*self._open_message(), *self._close("incomplete" if is_cut else "completed")]
        self.body["status"] = "incomplete" if is_cut else "completed"
        if is_cut:
            self.body["incomplete_details"] = {"reason": cut_by}
        else:
            self.body["completed_at"] = int(time.time())
        self.body["usage"] = wire_usage(usage)
        return events

    def fail(self, error: Json) -> Json:
        """Make the response failed, and return the ``error`` event that comes before the last one.

        Args:
            error: Its code and message.
        """
        self.body["status"] = "failed"
        self.body["error"] = error
        return self._event("error", code=error["code"], message=error["message"], param=None)

    def terminal(self) -> Json:
        """Return the last event."""
        return self.snapshot(f"response.{self.body['status']}")

    # Items

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._next, **fields}
        self._next += 1
        return event

    def _place(self) -> Json:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.body["output"])}

    def _open(self, item: Json) -> Json:
        self._item, self._written, self._logprobs = item, "", []
        return self._event(
            "response.output_item.added", output_index=len(self.body["output"]), item=item
        )

    def _open_message(self) -> list[Json]:
        item = {
            "id": new_id("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        return [
            self._open(item),
            self._event(
                "response.content_part.added", **self._place(), content_index=0, part=self._part()
            ),
        ]

    def _part(self) -> Json:
        return {
            "type": "output_text",
            "text": self._written,
            "annotations": [],
            "logprobs": self._logprobs,
        }

    def _add_text(self, delta: ChatDelta) -> Json:
        logprobs = self._scores(delta.logprobs) if self._scores else []
        self._written += delta.text
        self._logprobs = self._logprobs + logprobs
        return self._event(
            "response.output_text.delta",
            **self._place(),
            content_index=0,
            delta=delta.text,
            logprobs=logprobs,
        )

    def _add_call(self, piece: ToolCallDelta) -> list[Json]:
        events: list[Json] = []
        if piece.id is not None:
            kind = "function_call" if piece.type == "function" else "custom_tool_call"
            item = {
                "id": new_id(PREFIXES[kind]),
                "type": kind,
                "status": "in_progress",
                "call_id": piece.id,
                "name": piece.name,
                _INPUT_NAME[kind]: "",
            }
            events += [*self._close("completed"), self._open(item)]
        assert self._item is not None, "a call begins with its head"
        if piece.arguments:
            self._written += piece.arguments
            name = f"{_EVENT_NAME[self._item['type']]}.delta"
            events.append(self._event(name, **self._place(), delta=piece.arguments))
        return events

    def _close(self, status: str) -> list[Json]:
        """End the open item, if there is one."""
        if self._item is None:
            return []
        place, kind = self._place(), self._item["type"]
        if kind == "message":
            part = self._part() | {"annotations": self.annotate()}
            item = {**self._item, "status": status, "content": [part]}
            fields = {**place, "content_index": 0}
            events = [
                *(
                    self._event(
                        "response.output_text.annotation.added",
                        **fields,
                        annotation_index=number,
                        annotation=annotation,
                    )
                    for number, annotation in enumerate(part["annotations"])
                ),
                self._event(
                    "response.output_text.done",
                    **fields,
                    text=self._written,
                    logprobs=self._logprobs,
                ),
                self._event("response.content_part.done", **fields, part=part),
            ]
        else:
            name = _INPUT_NAME[kind]
            item = {**self._item, "status": status, name: self._written}
            shown = {name: self._written}
            if kind == "function_call":
                shown["name"] = self._item["name"]  # clients before 3.0 ask for it
            events = [self._event(f"{_EVENT_NAME[kind]}.done", **place, **shown)]
        events.append(
            self._event(
                "response.output_item.done", output_index=len(self.body["output"]), item=item
            )
        )
        self.body["output"] = [*self.body["output"], item]
        self._item = None
        return events


def wire_usage(used: Usage) -> Json:
    """Return the response's ``usage``; clients before and after 3.0 ask for different keys of it."""
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
