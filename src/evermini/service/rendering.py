"""A request's messages as token ids, by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence

from evermini.service.schemas import ChatRequest
from evermini.text.chat import ChatTemplate


def encode(template: ChatTemplate, request: ChatRequest, texts: Sequence[str]) -> list[int]:
    """Return the prompt.

    Args:
        template: The model's.
        request: What is asked.
        texts: Each message's text, which may be another one than was sent (an excerpt).

    Raises:
        InvalidRequestError: The template refuses the conversation.
    """
    messages = [
        message.for_template(text) for message, text in zip(request.messages, texts, strict=True)
    ]
    return template.encode_chat(messages)
