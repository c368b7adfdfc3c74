"""``/v1/organization/usage/*`` and ``/v1/organization/costs``: what was used and what it cost, by time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from evermini.api.description import Parameter, described
from evermini.api.errors import JsonResponse
from evermini.api.services import services
from evermini.errors import InvalidRequestError
from evermini.service.prices import cost_of
from evermini.service.shapes import UsagePage
from evermini.storage.usage import Filter, Total, UsageStore

router = APIRouter(prefix="/v1/organization")

_WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86_400, 7, 31)}
"""Name of a stretch -> its seconds, how many are listed by default, and at most."""
_COSTS_WIDTH = (86_400, 7, 180)
_COLUMNS = {"project_id": "project", "api_key_id": "key_id", "model": "model", "batch": "is_batch"}
_EMPTY_GROUPS = ("user_id", "service_tier", "line_item")
_EMBEDDINGS = "/v1/embeddings"
_COMPLETIONS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


_TIME = {"type": "integer", "minimum": 0, "maximum": 99_999_999_999}
_NAMES = {"type": "array", "items": {"type": "string"}}
_COMMON = [
    Parameter("start_time", _TIME, "Unix time of the beginning.", required=True),
    Parameter("end_time", _TIME, "Unix time of the end, by default now."),
    Parameter("project_ids", _NAMES, "Of these projects alone."),
    Parameter("api_key_ids", _NAMES, "Of these keys alone."),
    Parameter("models", _NAMES, "Of these models alone."),
    Parameter("batch", {"type": "boolean"}, "Of batches alone, or of all else."),
    Parameter("page", {"type": "string", "pattern": "^page_[0-9]{1,11}$"}, "The next_page before."),
]


def _query(names: Sequence[str], most: int) -> list[Parameter]:
    groups = {"type": "array", "items": {"enum": [*_COLUMNS, *_EMPTY_GROUPS]}}
    return [
        *_COMMON,
        Parameter("bucket_width", {"enum": [*names], "default": "1d"}, "Length of a stretch."),
        Parameter("group_by", groups, "What to tell apart."),
        Parameter(
            "limit", {"type": "integer", "minimum": 1, "maximum": most}, "Stretches on a page."
        ),
    ]


_USAGE_QUERY = _query(list(_WIDTHS), max(most for _, _, most in _WIDTHS.values()))
_COSTS_QUERY = _query(["1d"], _COSTS_WIDTH[2])


@dataclass(frozen=True)
class _Query:
    start: int
    width: int
    num_buckets: int
    end: int
    group_by: tuple[str, ...]
    only: Filter

    @property
    def buckets(self) -> range:
        """Beginnings of the stretches that are listed."""
        first = self.start - self.start % self.width
        return range(first, self.end, self.width)[: self.num_buckets]


@router.get("/usage/completions")
@described(query=_USAGE_QUERY, answer=UsagePage)
async def completions_usage(request: Request) -> Response:
    """Tokens of chats, responses and text completions."""
    query = _read(request, _width(request), _COMPLETIONS)
    return await _answer(request, query, _completions_result)


@router.get("/usage/embeddings")
@described(query=_USAGE_QUERY, answer=UsagePage)
async def embeddings_usage(request: Request) -> Response:
    """Tokens of embeddings."""
    query = _read(request, _width(request), (_EMBEDDINGS,))
    return await _answer(request, query, _embeddings_result)


@router.get("/costs")
@described(query=_COSTS_QUERY, answer=UsagePage)
async def costs(request: Request) -> Response:
    """US dollars by the list prices of the tiers' namesakes, a day each."""
    if request.query_params.get("bucket_width", "1d") != "1d":
        raise _invalid("bucket_width", "'1d'")
    return await _answer(request, _read(request, _COSTS_WIDTH, ()), _cost_result, by_price=True)


async def _answer(
    request: Request, query: _Query, result: Any, *, by_price: bool = False
) -> Response:
    """Return a page of stretches, each with one result per group."""
    meter, database = services(request).metrics.meter, services(request).database
    assert meter is not None
    await meter.flush()  # what was answered a moment ago counts
    columns = [_COLUMNS[name] for name in query.group_by if name in _COLUMNS]
    needed = dict.fromkeys([*columns, *(("model", "is_batch") if by_price else ())])
    buckets = query.buckets
    end = min(query.end, buckets[-1] + query.width) if len(buckets) else query.start
    totals = await database.run(
        UsageStore(database).totals,
        query.start,
        end,
        width=query.width,
        group_by=tuple(needed),
        only=query.only,
    )
    data = []
    for start in buckets:
        mine = [total for total in totals if total.start == start]
        data.append(
            {
                "object": "bucket",
                "start_time": start,
                "end_time": start + query.width,
                "results": [
                    result(query.group_by, group) for group in _grouped(mine, columns).values()
                ],
            }
        )
    rest = range(buckets[-1] + query.width, query.end, query.width) if len(buckets) else range(0)
    return JsonResponse(
        {
            "object": "page",
            "data": data,
            "has_more": bool(rest),
            "next_page": f"page_{rest[0]}" if rest else None,
        }
    )


def _grouped(
    totals: Iterable[Total], columns: Sequence[str]
) -> dict[tuple[object, ...], list[Total]]:
    groups: dict[tuple[object, ...], list[Total]] = {}
    for total in totals:
        groups.setdefault(tuple(total.group[name] for name in columns), []).append(total)
    return groups


def _group_fields(group_by: Sequence[str], total: Total) -> dict[str, Any]:
    shown = {
        name: total.group[column] if name in group_by else None for name, column in _COLUMNS.items()
    }
    return shown | dict.fromkeys(_EMPTY_GROUPS[:2])


def _completions_result(group_by: Sequence[str], totals: Sequence[Total]) -> dict[str, Any]:
    cached = sum(total.cached_tokens for total in totals)
    sent = sum(total.input_tokens for total in totals)
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sent,
        "input_cached_tokens": cached,
        "input_uncached_tokens": sent - cached,
        "input_text_tokens": sent - cached,
        "input_cached_text_tokens": cached,
        "input_audio_tokens": 0,
        "output_tokens": sum(total.output_tokens for total in totals),
        "output_text_tokens": sum(total.output_tokens for total in totals),
        "output_audio_tokens": 0,
        "num_model_requests": sum(total.num_requests for total in totals),
        **_group_fields(group_by, totals[0]),
    }


def _embeddings_result(group_by: Sequence[str], totals: Sequence[Total]) -> dict[str, Any]:
    fields = _group_fields(group_by, totals[0])
    return {
        "object": "organization.usage.embeddings.result",
        "input_tokens": sum(total.input_tokens for total in totals),
        "num_model_requests": sum(total.num_requests for total in totals),
        **{name: fields[name] for name in ("project_id", "user_id", "api_key_id", "model")},
    }


def _cost_result(group_by: Sequence[str], totals: Sequence[Total]) -> dict[str, Any]:
    fields = _group_fields(group_by, totals[0])
    return {
        "object": "organization.costs.result",
        "amount": {"value": cost_of(totals), "currency": "usd"},
        "line_item": None,
        "quantity": None,
        "project_id": fields["project_id"],
        "api_key_id": fields["api_key_id"],
    }


def _width(request: Request) -> tuple[int, int, int]:
    name = request.query_params.get("bucket_width", "1d")
    if name not in _WIDTHS:
        raise _invalid("bucket_width", "'1m', '1h' and '1d'")
    return _WIDTHS[name]


def _read(request: Request, width: tuple[int, int, int], endpoints: Sequence[str]) -> _Query:
    seconds, default, most = width
    start = _integer(request, "start_time", None)
    end = _integer(request, "end_time", int(time.time()) + 1)
    limit = _integer(request, "limit", default)
    page = request.query_params.get("page")
    if page is not None:
        digits = page.removeprefix("page_")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 12):
            raise _invalid("page", "the 'next_page' of an earlier answer")
        start = max(start, int(digits))
    if not 1 <= limit <= most:
        raise _invalid("limit", f"integers from 1 to {most}")
    group_by = tuple(_several(request, "group_by"))
    unknown = [name for name in group_by if name not in (*_COLUMNS, *_EMPTY_GROUPS)]
    if unknown:
        raise _invalid("group_by", ", ".join(f"'{name}'" for name in (*_COLUMNS, *_EMPTY_GROUPS)))
    batch = request.query_params.get("batch")
    if batch not in (None, "true", "false"):
        raise _invalid("batch", "'true' and 'false'")
    only = Filter(
        models=_several(request, "models"),
        projects=_several(request, "project_ids"),
        keys=_several(request, "api_key_ids"),
        endpoints=endpoints,
        is_batch=None if batch is None else batch == "true",
    )
    return _Query(start, seconds, limit, end, group_by, only)


def _integer(request: Request, name: str, default: int | None) -> int:
    given = request.query_params.get(name)
    if given is None:
        if default is None:
            raise InvalidRequestError(
                f"Missing required parameter: '{name}'.",
                param=name,
                code="missing_required_parameter",
            )
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 12):
        raise _invalid(name, "integers")
    return int(given)


def _several(request: Request, name: str) -> list[str]:
    params = request.query_params
    return [*params.getlist(name), *params.getlist(f"{name}[]")]


def _invalid(name: str, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"Invalid value for '{name}'. Supported values are: {allowed}.",
        param=name,
        code="invalid_value",
    )
