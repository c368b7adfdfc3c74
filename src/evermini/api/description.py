"""The OpenAPI description of this API, made from the models that requests are checked against: ``/openapi.json``.

    @router.post("/v1/embeddings")
    @described(body=EmbeddingRequest, answer=EmbeddingsAnswer)
    async def create_embeddings(request: Request) -> Response: ...

Routes read their requests themselves; the decorator only says what they read. The document is made when somebody asks
for it. OpenAI's own description stays the reference of the contract: this one says which part of it is served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from evermini import __version__
from evermini.service.shapes import ErrorAnswer

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])
Schema = dict[str, Any]

PATH = "/openapi.json"
_REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Parameter:
    """A parameter in the query.

    Attributes:
        name: As it is written.
        schema: JSON schema of its value.
        description: What it does.
        required: It must be there.
        style: How an object is written.
    """

    name: str
    schema: Mapping[str, Any]
    description: str
    required: bool = False
    style: Literal["form", "deepObject"] = "form"

    def to_wire(self) -> Schema:
        """Return it as the description has it."""
        return {
            "name": self.name,
            "in": "query",
            "required": self.required,
            "description": self.description,
            "schema": dict(self.schema),
            "style": self.style,
            "explode": True,
        }


@dataclass(frozen=True)
class PageOf:
    """A list object with a page of ``item``'s."""

    item: Any


@dataclass(frozen=True)
class Media:
    """An answer that is no JSON."""

    type: str


@dataclass(frozen=True)
class _Operation:
    body: Any = None
    form: Mapping[str, Any] | None = None
    query: tuple[Parameter, ...] = ()
    answer: Any = None
    events: Any = None
    statuses: tuple[int, ...] = (200,)


_NO_DETAILS = _Operation()
_OPERATIONS: dict[Callable[..., Any], _Operation] = {}


def described(
    *,
    body: Any = None,
    form: Mapping[str, Any] | None = None,
    query: Iterable[Parameter] = (),
    answer: Any = None,
    events: Any = None,
    statuses: tuple[int, ...] = (200,),
) -> Callable[[EndpointT], EndpointT]:
    """Say what a route reads and answers; the route itself stays as it is.

    Args:
        body: Type of the JSON body.
        form: JSON schema of the form that the body is.
        query: Parameters in the query.
        answer: Type of the answer, a `PageOf` one, or `Media`; ``None``: any JSON.
        events: Type of the events, where the answer may be a stream.
        statuses: Of good answers.
    """

    def note(endpoint: EndpointT) -> EndpointT:
        _OPERATIONS[endpoint] = _Operation(body, form, tuple(query), answer, events, statuses)
        return endpoint

    return note


def cursor(
    order: Literal["asc", "desc"],
    limit: int = 20,
    most: int = 100,
    words: tuple[str, str] = ("asc", "desc"),
) -> list[Parameter]:
    """Return the parameters that choose a page of a list.

    Args:
        order: The default order.
        limit: The default length.
        most: The greatest length.
        words: What the orders are called.
    """
    usual = words[0] if order == "asc" else words[1]
    length = {"type": "integer", "minimum": 1, "maximum": most, "default": limit}
    return [
        Parameter("after", {"type": "string"}, "The last id of the page before."),
        Parameter("limit", length, "Length of the page."),
        Parameter("order", {"enum": [*words], "default": usual}, "By the time of creation."),
    ]


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Serve the description of the routers' routes; it is made when somebody asks for it."""

    @cache
    def made() -> bytes:
        return to_json(describe(routers))

    async def description(request: Request) -> Response:
        return Response(made(), media_type="application/json")

    app.add_route(PATH, description, include_in_schema=False)


def describe(routers: Sequence[APIRouter]) -> Schema:
    """Return the OpenAPI 3.1 document of the routers' routes."""
    routes = [route for one in routers for route in one.routes if isinstance(route, APIRoute)]
    operations = [_OPERATIONS.get(route.endpoint, _NO_DETAILS) for route in routes]
    wanted: dict[tuple[Any, JsonSchemaMode], TypeAdapter[Any]] = {
        (ErrorAnswer, "serialization"): TypeAdapter(ErrorAnswer)
    }
    for operation in operations:
        if operation.body is not None:
            wanted[operation.body, "validation"] = TypeAdapter(operation.body)
        for answer in (operation.answer, operation.events):
            if kind := _type_of(answer):
                wanted[kind, "serialization"] = TypeAdapter(kind)
    keys = list(wanted)
    found, definitions = TypeAdapter.json_schemas(
        [(number, mode, wanted[kind, mode]) for number, (kind, mode) in enumerate(keys)],
        ref_template=_REF,
        schema_generator=_Generator,
    )
    schemas: _Schemas = {key: found[number, key[1]] for number, key in enumerate(keys)}
    paths: dict[str, Schema] = {}
    for route, operation in zip(routes, operations, strict=True):
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, operation, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Evermini",
            "version": __version__,
            "description": "OpenAI's API on open weights. What is not here is answered with an error, never ignored.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "responses": {
                "Error": {
                    "description": "What went wrong.",
                    "content": _json(schemas[ErrorAnswer, "serialization"]),
                }
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],  # servers without keys ask for none
    }


_Schemas = dict[tuple[Any, JsonSchemaMode], Schema]


def _operation(route: APIRoute, path: str, operation: _Operation, schemas: _Schemas) -> Schema:
    lines = (route.endpoint.__doc__ or route.name).strip().splitlines()
    parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]
    parameters += [parameter.to_wire() for parameter in operation.query]
    error = {"$ref": "#/components/responses/Error"}
    good = {"description": lines[0], "content": _content(operation, schemas)}
    responses = {str(status): good for status in operation.statuses}
    described: Schema = {
        "operationId": route.name,
        "summary": lines[0].rstrip("."),
        "responses": {**responses, "4XX": error, "5XX": error},
    }
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        content = _json(schemas[operation.body, "validation"])
        described["requestBody"] = {"required": True, "content": content}
    if operation.form is not None:
        content = {"multipart/form-data": {"schema": dict(operation.form)}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _content(operation: _Operation, schemas: _Schemas) -> Schema:
    answer = operation.answer
    if isinstance(answer, Media):
        return {answer.type: {}}
    kind = _type_of(answer)
    schema = {} if kind is None else schemas[kind, "serialization"]
    content = _json(_page(schema) if isinstance(answer, PageOf) else schema)
    if operation.events is not None:
        event = schemas[operation.events, "serialization"]
        content["text/event-stream"] = {"schema": _event(event, schemas)}
    return content


def _type_of(answer: Any) -> Any:
    """Return the type whose schema an answer needs, if it needs one."""
    if isinstance(answer, PageOf):
        return answer.item
    return None if isinstance(answer, Media) else answer


def _event(content: Schema, schemas: _Schemas) -> Schema:
    """Return the schema of each event of a stream."""
    failure = schemas[ErrorAnswer, "serialization"]
    text: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [content, failure]},
    }
    done: Schema = {"const": "[DONE]", "description": "Ends chat and text completions."}
    data: Schema = {"anyOf": [text, done]}
    fields = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": fields, "required": ["data"]}


def _page(item: Schema) -> Schema:
    an_id = {"type": ["string", "null"]}
    fields: Schema = {
        "object": {"const": "list"},
        "data": {"type": "array", "items": item},
        "first_id": an_id,
        "last_id": an_id,
        "has_more": {"type": "boolean"},
    }
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


class _Generator(GenerateJsonSchema):
    """Without a title for each field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False."""
        return False
