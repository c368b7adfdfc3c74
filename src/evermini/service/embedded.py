"""A request for embeddings, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

from evermini.service.schemas import Prompts, as_prompts
from evermini.service.validation import WireModel

MAX_INPUTS = 2048
"""Limit of the contract."""

Vectors = npt.NDArray[np.float32]


class EmbeddingRequest(WireModel):
    """``POST /v1/embeddings``."""

    input: Annotated[
        list[str | list[int]],
        Field(min_length=1, max_length=MAX_INPUTS),
        BeforeValidator(as_prompts, json_schema_input_type=Prompts),
    ]
    model: str
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


@dataclass(frozen=True)
class Embeddings:
    """The result.

    Attributes:
        model: Name of the model.
        vectors: (inputs, dimensions), rows of unit length.
        prompt_tokens: Tokens of all inputs.
    """

    model: str
    vectors: Vectors
    prompt_tokens: int
