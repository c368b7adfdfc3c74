"""What form an answer must have: ``response_format``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from evermini.errors import InvalidRequestError
from evermini.service.strict import check_strict
from evermini.service.validation import WireModel

MAX_SHOWN_CHARACTERS = 4096
"""A longer schema is enforced without being shown to the model: it would fill the window, and take long to read."""


def format_of(model: type) -> dict[str, Any]:
    """Return the ``response_format`` whose answers a pydantic model's class can read.

    Raises:
        InvalidRequestError: It is another class.
    """
    if not issubclass(model, BaseModel):
        raise InvalidRequestError(
            f"response_format is the class {model.__name__}, which is no pydantic model. Give one, or a dict.",
            param="response_format",
        )
    definition = {"name": model.__name__[:64], "schema": model.model_json_schema()}
    return {"type": "json_schema", "json_schema": definition}


class JsonSchemaFormat(WireModel):
    """A named JSON schema.

    Attributes:
        name: For error messages, and shown to the model.
        description: What the answer is for; shown to the model.
        definition: The schema.
        strict: It must keep to the subset that OpenAI's strict mode allows.
    """

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(WireModel):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def check(self, texts: Sequence[str], path: str = "response_format") -> None:
        """Check what depends on the type.

        Args:
            texts: Those of the messages.
            path: Where the format stands in the request.

        Raises:
            InvalidRequestError: Naming the field.
        """
        wanted = self.json_schema
        if (wanted is None) == (self.type == "json_schema"):
            raise InvalidRequestError(
                f"{'Missing required' if wanted is None else 'Unknown'} parameter: '{path}.json_schema'.",
                param=f"{path}.json_schema",
                code="missing_required_parameter" if wanted is None else "unknown_parameter",
            )
        if self.type == "json_object" and not any("json" in text.lower() for text in texts):
            raise InvalidRequestError(
                "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.",
                param="messages",
            )
        if wanted is not None and wanted.strict:
            check_strict(wanted.definition, subject=f"response_format '{wanted.name}'", param=path)

    @property
    def instruction(self) -> str | None:
        """What the model is told: the grammar makes an answer fit the schema, this makes it sensible."""
        wanted = self.json_schema
        if wanted is None:
            return None
        schema = json.dumps(wanted.definition, ensure_ascii=False)
        purpose = f" ({wanted.description})" if wanted.description else ""
        if len(schema) > MAX_SHOWN_CHARACTERS:
            return f"Answer in JSON: one {wanted.name}{purpose}."
        return f"Answer in JSON: one {wanted.name}{purpose}. It must follow this JSON schema:\n{schema}"
