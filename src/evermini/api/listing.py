"""Listings: the cursor in a query, and the list object that answers it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from evermini.errors import InvalidRequestError, NotFoundError
from evermini.storage.schema import Cursor, Order, Page

T = TypeVar("T")

MAX_LIMIT = 100


def read_cursor(
    request: Request,
    *,
    order: Order,
    limit: int = 20,
    max_limit: int = MAX_LIMIT,
    words: tuple[str, str] = ("asc", "desc"),
) -> Cursor:
    """Return which page the query asks for.

    Args:
        request: The HTTP request.
        order: The endpoint's default order.
        limit: The length of a page if the query names none.
        max_limit: The longest page.
        words: What the endpoint calls the two orders.

    Raises:
        InvalidRequestError: ``limit`` or ``order`` is not one that the contract knows.
    """
    query = request.query_params
    ascending, descending = words
    wanted = query.get("order", ascending if order == "asc" else descending)
    if wanted not in words:
        raise InvalidRequestError(
            f"Invalid value: '{wanted[:40]}'. Supported values are: '{ascending}' and '{descending}'.",
            param="order",
            code="invalid_value",
        )
    given = query.get("limit", str(limit))
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise InvalidRequestError(
            f"Invalid type for 'limit': expected an integer, but got '{given[:40]}' instead.",
            param="limit",
            code="invalid_type",
        )
    if not 1 <= int(given) <= max_limit:
        above = int(given) > max_limit
        raise InvalidRequestError(
            f"Invalid 'limit': integer {'above maximum' if above else 'below minimum'} value. Expected a value "
            f"{f'<= {max_limit}' if above else '>= 1'}, but got {int(given)} instead.",
            param="limit",
            code=f"integer_{'above_max' if above else 'below_min'}_value",
        )
    return Cursor(query.get("after") or None, int(given), "asc" if wanted == ascending else "desc")


def read_metadata(request: Request) -> dict[str, str]:
    """Return the pairs that the query asks for, each written ``metadata[key]=value``."""
    return {
        match[1]: value
        for key, value in request.query_params.multi_items()
        if (match := re.fullmatch(r"metadata\[(.+)\]", key, re.DOTALL))
    }


def list_object(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return the contract's list object."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


def page_object(
    found: Page[T] | None, cursor: Cursor, item: Callable[[T], dict[str, Any]]
) -> dict[str, Any]:
    """Return a page that was found as a list object.

    Args:
        found: The page; ``None``: the list has nothing of the id ``cursor.after``.
        cursor: Which page was asked for.
        item: Makes the contract's object of a row.

    Raises:
        NotFoundError: There is no such page.
    """
    if found is None:
        raise no_such_cursor(cursor)
    return list_object([item(row) for row in found.rows], found.has_more)


def page_of(items: Sequence[dict[str, Any]], cursor: Cursor) -> dict[str, Any]:
    """Return a page of a list at hand, as a list object.

    Raises:
        NotFoundError: It has no item ``cursor.after``.
    """
    ordered = list(items) if cursor.order == "asc" else list(reversed(items))
    if cursor.after is not None:
        places = [place for place, item in enumerate(ordered) if item["id"] == cursor.after]
        if not places:
            raise no_such_cursor(cursor)
        ordered = ordered[places[0] + 1 :]
    return list_object(ordered[: cursor.limit], len(ordered) > cursor.limit)


def no_such_cursor(cursor: Cursor) -> NotFoundError:
    """Return the error for an ``after`` that is not in the list."""
    return NotFoundError(
        f"There is no object with id '{(cursor.after or '')[:200]}' in this list. Give the 'last_id' of an earlier "
        "page as 'after'.",
        param="after",
    )
