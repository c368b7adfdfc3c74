"""``/openapi.json``, and requests made from it: answered as it says, or refused in the contract's shape."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from evermini.api.app import ROUTERS
from evermini.api.description import describe
from evermini.config import load_settings
from evermini.service.runtime import Runtime, ServedModel
from tests.serving import ERROR_KEYS, serving, tiny_model, tiny_served

MODEL = "org/tiny"
DESCRIPTION = describe(ROUTERS)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    allow_header_conformance,
]
FUZZ = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FREE = {
    "/healthz",
    "/readyz",
    "/v1/moderations",
    "/v1/responses/compact",
    "/v1/fine_tuning/alpha/graders/{action}",
}


def narrowed() -> dict[str, Any]:
    """Return the description with values that can be answered, where any string would be fine by it."""
    document = copy.deepcopy(DESCRIPTION)
    schemas = document["components"]["schemas"]
    for name in (
        "ChatRequest",
        "CompletionRequest",
        "EmbeddingRequest",
        "ResponseRequest",
        "TokenCountRequest",
    ):
        schemas[name]["properties"]["model"] = {"const": MODEL}
    for name in ("ChatRequest", "CompletionRequest"):
        schemas[name]["properties"] |= {
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
            "n": {"enum": [None, 1, 2]},
        }
        schemas[name]["required"].append("max_tokens")
    schemas["ChatRequest"]["properties"] |= {"max_completion_tokens": {"type": "null"}}
    schemas["ChatRequest"]["properties"]["messages"]["items"] = {
        "type": "object",
        "properties": {"role": {"const": "user"}, "content": {"type": "string", "maxLength": 20}},
        "required": ["role", "content"],
    }
    schemas["ResponseRequest"]["properties"] |= {
        "input": {"type": "string", "minLength": 1, "maxLength": 20},
        "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": 4},
        "previous_response_id": {"type": "null"},
        "conversation": {"type": "null"},
    }
    schemas["ResponseRequest"]["required"] += ["input", "max_output_tokens"]
    return document


def load(document: dict[str, Any], mode: GenerationMode) -> Any:
    loaded = schemathesis.openapi.from_dict(copy.deepcopy(document))
    loaded.config.generation.update(modes=[mode])
    return loaded


@pytest.fixture(scope="module")
def url(nano: ServedModel) -> Iterator[str]:
    options = load_settings({"model": "nano", "kv_memory": "64MiB"}).settings
    served = tiny_served(nano, tiny_model(nano), options)
    with serving(Runtime([served])) as root:
        yield root
    served.close(timeout=1.0)


def check_events(case: Case, text: str) -> None:
    content = DESCRIPTION["paths"][case.path][case.method.lower()]["responses"]["200"]["content"]
    data = content["text/event-stream"]["schema"]["properties"]["data"]
    schema = {**data["anyOf"][0]["contentSchema"], "components": DESCRIPTION["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            validator.validate(json.loads(line.removeprefix("data: ")))


def check(case: Case, url: str, *more: Any) -> int:
    response = case.call(base_url=url, timeout=60)
    case.validate_response(response, checks=[*CHECKS, *more])
    if response.headers["content-type"][0].startswith("text/event-stream"):
        check_events(case, response.text)
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error.keys() == ERROR_KEYS
        assert error["message"]
    return response.status_code


@load(narrowed(), GenerationMode.POSITIVE).parametrize()
@FUZZ
def test_what_it_allows(case: Case, url: str) -> None:
    check(case, url)


@load(DESCRIPTION, GenerationMode.NEGATIVE).parametrize()
@FUZZ
def test_what_it_does_not_allow(case: Case, url: str) -> None:
    check(case, url, negative_data_rejection)


def test_it_is_served_and_valid(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    assert document == json.loads(json.dumps(DESCRIPTION))
    schemathesis.openapi.from_dict(document).validate()


def test_every_route_says_what_it_answers() -> None:
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            for media, content in operation["responses"]["200"]["content"].items():
                assert media != "application/json" or content["schema"] or path in FREE, path
            has_body = method == "post" and not path.endswith(
                ("/cancel", "/compact", "/pause", "/resume", "moderations", "/{action}")
            )
            assert has_body == ("requestBody" in operation), path
