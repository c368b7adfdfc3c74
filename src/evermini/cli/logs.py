"""Log lines of a server, all to stderr: readable on a terminal, one JSON object per line elsewhere.

Whatever is logged, here or in a library, passes `redact`: keys and passwords do not get into a log by accident.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection
from typing import Literal

import structlog

LogFormat = Literal["auto", "text", "json"]

REDACTED = "[redacted]"
MIN_KEY_CHARS = 6
"""Shorter keys of the settings are not looked for: they would stand in innocent words."""
_SECRETS = re.compile(
    r"(?P<key>\bsk-[A-Za-z0-9_-]{8,})"
    r"|(?P<scheme>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{6,}"
    r"|(?P<user>\w://[^\s:/@]*:)[^\s/@]+(?=@)",
    re.IGNORECASE,
)


def redact(line: str, keys: Collection[str] = ()) -> str:
    """Return a log line without API keys, authorization headers, and passwords in URLs.

    Args:
        line: What is about to be written.
        keys: The keys of the settings, which may look like anything.
    """
    for key in keys:
        line = line.replace(key, REDACTED)
    return _SECRETS.sub(lambda match: f"{match['scheme'] or match['user'] or ''}{REDACTED}", line)


def configure_logging(
    level: str, log_format: LogFormat = "auto", keys: Collection[str] = ()
) -> None:
    """Send structlog's and the standard library's records, and warnings, through one formatter.

    Args:
        level: Least severe level written: debug, info, warning or error.
        log_format: ``auto``: text on a terminal, JSON elsewhere.
        keys: The keys of the settings; they never get into a line.
    """
    secrets = [key for key in keys if len(key) >= MIN_KEY_CHARS]
    is_terminal = sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
    ]
    if log_format == "text" or (log_format == "auto" and is_terminal):
        # Not the default, rich tracebacks: they show local variables, and with them prompts.
        plain = structlog.dev.ConsoleRenderer(
            colors=is_terminal, exception_formatter=structlog.dev.plain_traceback
        )
        final: list[structlog.typing.Processor] = [plain]
    else:
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]

    def without_secrets(logger: object, name: str, line: object) -> str:
        return redact(str(line), secrets)

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *final,
                without_secrets,
            ],
        )
    )
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # What these say at "info" the server says itself, or nobody needs: each connection, each request to a hub.
    for name in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
