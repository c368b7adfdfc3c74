"""Who asks, for what, and how urgently: known to everything that a request sets off, without being handed around.

    token = current_caller.set(Caller(...)); ...; current_caller.reset(token)

A context variable, so tasks that a request starts inherit it. Outside a request it is the default: nobody in
particular, who sees everything.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The caller of the request in work.

    Attributes:
        request_id: The request's id.
        endpoint: Its route, such as ``/v1/chat/completions``.
        key_id: The key that it came with; ``None``: none was asked for, or one of the settings' keys.
        project: What its tokens are counted for, and whose what it stores is.
        is_batch: It is a line of a batch: nobody waits for it.
        is_operator: It sees what all projects have stored.
    """

    request_id: str = ""
    endpoint: str = ""
    key_id: str | None = None
    project: str = "default"
    is_batch: bool = False
    is_operator: bool = False

    @property
    def sees(self) -> str | None:
        """The project whose files, batches and so on exist for it; ``None``: those of all."""
        return None if self.is_operator else self.project


NOBODY = Caller(is_operator=True)
current_caller: ContextVar[Caller] = ContextVar("evermini_caller", default=NOBODY)
