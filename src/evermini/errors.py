"""Every error Evermini raises on purpose.

Each class knows the HTTP status, the OpenAI error ``type`` and ``code`` it becomes on the wire, and each
message says the cause and the remedy. ``assert`` is kept for our own bugs.

    EverminiError
    ├── RequestError                    what a caller sent; 4xx
    │   ├── InvalidRequestError         400 invalid_request_error
    │   │   ├── UnsupportedParameterError   400 code unsupported_parameter
    │   │   ├── ContextLengthError      400 code context_length_exceeded
    │   │   ├── GrammarLimitError       400 code grammar_limit_exceeded: known only while the answer is written
    │   │   └── DocumentError           400: a file that is no text that can be read
    │   ├── AuthenticationError         401 code invalid_api_key
    │   ├── PermissionDeniedError       403
    │   ├── NotFoundError               404
    │   │   └── ModelNotFoundError      404 code model_not_found
    │   ├── RequestTooLargeError        413
    │   ├── RecallDiskError             413 code recall_disk_exceeded: a long context's index exceeds its disk cap
    │   ├── RangeError                  416
    │   ├── UnsupportedMediaTypeError   415
    │   ├── RateLimitError              429 code rate_limit_exceeded: this key's limit
    │   ├── QuotaError                  429 code insufficient_quota: this key's budget
    │   └── OverloadedError             429 code rate_limit_exceeded: nobody's fault
    ├── EngineError                     500: a step failed; the request is lost, the server lives
    │   └── EngineStoppedError          503: the engine is shutting down
    ├── ModelError                      a checkpoint that cannot be used
    │   ├── UnsupportedArchitectureError
    │   ├── UnsupportedQuantizationError
    │   ├── UnsupportedTokenizerError
    │   ├── DamagedCheckpointError
    │   └── AdapterError                an adapter (LoRA) that cannot be read, or does not fit its base
    ├── DownloadError                   weights that could not be fetched
    │   ├── SourceUnreachableError
    │   ├── ChecksumMismatchError
    │   └── DiskSpaceError
    ├── UpstreamError                   502: another server that was asked fails, or refuses
    │   └── UpstreamUnavailableError    503: it cannot be reached, is not ready, or says nothing
    ├── StorageError                    503: the database or the storage of files cannot be used
    │   └── InsufficientStorageError    507: the disk is full
    └── ConfigError                     a setting that cannot be honoured
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, ClassVar


class EverminiError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: Cause and remedy, for a person.
        param: Path of the offending request field, e.g. ``"messages[0].role"``.
        code: Overrides the class's machine-readable code.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def to_wire(self) -> dict[str, Any]:
        """Return the OpenAI error body: ``{"error": {message, type, param, code}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class RequestError(EverminiError):
    """Something the caller sent cannot be served."""

    status = 400
    type = "invalid_request_error"


class InvalidRequestError(RequestError):
    """A field is missing, malformed or out of range."""


class UnsupportedParameterError(InvalidRequestError):
    """A known field of the contract that this server does not act on; refused, never ignored."""

    default_code = "unsupported_parameter"


class GrammarLimitError(InvalidRequestError):
    """What an answer must look like cannot be worked out any further, or asks for what the model cannot write."""

    default_code = "grammar_limit_exceeded"


class ContextLengthError(InvalidRequestError):
    """The prompt (plus the requested output) does not fit; nothing is ever cut to make it fit.

    Args:
        message: Cause and remedy, with the counts.
        param: As in `EverminiError`.
        documents: Tokens of each named document in the prompt, where they were counted.
    """

    default_code = "context_length_exceeded"

    def __init__(
        self, message: str, *, param: str | None = None, documents: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.documents = documents or {}


class DocumentError(InvalidRequestError):
    """A file is no text that can be read.

    Args:
        message: Cause and remedy, with the file's name.
        reason: The cause in a word or two, to sum up many files.
    """

    def __init__(self, message: str, *, reason: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.reason = reason


class AuthenticationError(RequestError):
    """Missing or wrong API key."""

    status = 401
    default_code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    """The caller is known, or need not be, and may not do this."""

    status = 403


class NotFoundError(RequestError):
    """The named object does not exist."""

    status = 404


class ModelNotFoundError(NotFoundError):
    """The named model is not served here."""

    default_code = "model_not_found"


class RequestTooLargeError(RequestError):
    """The request body is larger than the server accepts."""

    status = 413


class RangeError(RequestError):
    """The wanted range of bytes lies beyond the end."""

    status = 416


class RecallDiskError(RequestError):
    """The index of a long context does not fit under the cap on its disk space; sending it again will not help."""

    status = 413
    default_code = "recall_disk_exceeded"


class UnsupportedMediaTypeError(RequestError):
    """The request body is not JSON by its own account."""

    status = 415


class RateLimitError(RequestError):
    """A key's limit is reached; ``retry_after`` is the pause in seconds until it is not."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QuotaError(RequestError):
    """A key's budget is spent; trying again does not help."""

    status = 429
    type = "insufficient_quota"
    default_code = "insufficient_quota"


class OverloadedError(RequestError):
    """The waiting queue is full; try again later."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class EngineError(EverminiError):
    """A model step failed; the requests in it are ended with this error, the server goes on."""


class EngineStoppedError(EngineError):
    """The engine is stopped or shutting down."""

    status = 503


class ModelError(EverminiError):
    """A checkpoint cannot be used."""


class UnsupportedArchitectureError(ModelError):
    """The checkpoint's architecture is not one of the supported families."""


class UnsupportedQuantizationError(ModelError):
    """The checkpoint holds a quantisation that cannot be read."""


class UnsupportedTokenizerError(ModelError):
    """The checkpoint's tokenizer is of a kind that cannot be read."""


class DamagedCheckpointError(ModelError):
    """A checkpoint file is truncated, inconsistent or lacks a tensor."""


class AdapterError(ModelError):
    """An adapter (LoRA) cannot be read, has a part that is not supported, or does not fit its base model."""


class DownloadError(EverminiError):
    """Weights could not be fetched."""


class SourceUnreachableError(DownloadError):
    """A source does not answer or does not have the file."""


class ChecksumMismatchError(DownloadError):
    """Downloaded bytes are not the catalogue's bytes."""


class DiskSpaceError(DownloadError):
    """Not enough free disk space."""


class UpstreamError(EverminiError):
    """Another server that was asked fails, or refuses."""

    status = 502


class UpstreamUnavailableError(UpstreamError):
    """Another server that was asked cannot be reached, is not ready, or says nothing; later it may be."""

    status = 503


class StorageError(EverminiError):
    """The database or the storage of files cannot be reached or written, or is another version's.

    Attributes:
        may_be_stored: The connection was lost at the very end of a change, which may or may not have been made.
    """

    status = 503
    may_be_stored = False


class InsufficientStorageError(StorageError):
    """There is no room on the disk; the same request will fail until somebody makes some."""

    status = 507


def is_disk_full(error: OSError) -> bool:
    """Return whether the disk, or the user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class ConfigError(EverminiError):
    """A setting is unknown, malformed or contradictory."""
