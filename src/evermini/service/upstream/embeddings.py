"""Embeddings by an upstream engine: as it gives them, in the order of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from evermini.errors import UpstreamError
from evermini.service.embedded import EmbeddingRequest, Embeddings
from evermini.service.upstream.exchange import Exchange
from evermini.service.upstream.model import UpstreamModel
from evermini.service.upstream.replies import EmbeddingsReply, read

PATH = "/embeddings"


async def embed(served: UpstreamModel, request: EmbeddingRequest) -> Embeddings:
    """Have the engine compute the embeddings of a request's inputs; cancelled, it ends the request there.

    Raises:
        InvalidRequestError: The engine refuses it.
        UnsupportedParameterError: It serves no embeddings.
        UpstreamError: It cannot be reached, or fails.
    """
    found = await served.found()
    inputs = request.input
    body: dict[str, Any] = {
        "model": found.model,
        "input": inputs[0] if len(inputs) == 1 else inputs,
        "encoding_format": "float",
    }
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    exchange = Exchange(served, PATH, body)
    await exchange.start()
    replies = [
        read(EmbeddingsReply, reply, served.client.url) async for reply in exchange.replies()
    ]
    rows = {row.index: row.embedding for row in replies[0].data}
    widths = {len(row) for row in rows.values()}
    if rows.keys() != set(range(len(inputs))) or len(widths) != 1:
        raise UpstreamError(
            "The engine behind this model gave embeddings that do not match the inputs. Send the request again."
        )
    vectors = np.array([rows[number] for number in range(len(inputs))], np.float32)
    used = replies[0].usage
    return Embeddings(served.info.id, vectors, used.prompt_tokens if used else 0)
