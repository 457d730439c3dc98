"""The errors that this project raises deliberately.

    CookbookError, which is TinkerError too
    ├── ConfigError       (ValueError)    a key or a value of a config
    ├── RequestError      (ValueError)    an argument of a client's method: a Datum, a loss, a name
    ├── RendererError     (ValueError)    a conversation or a template that cannot be rendered
    ├── DataError         (ValueError)    a dataset, a file or a row
    ├── ModelError        (OSError)       a model or tokenizer that is missing or cannot be loaded
    ├── CheckpointError   (OSError)       a checkpoint that is missing, damaged, foreign or not writable
    ├── FileError         (OSError)       a file that is not written, read or removed: a link, a device
    ├── TrainingError     (RuntimeError)  a step that failed while it ran
    ├── ClosedError       (RuntimeError)  a call on a client after it, or its service, was closed
    └── ClusterError      (RuntimeError)  a Ray cluster that cannot be reached, or a job that is not on it

Programs that were written for Tinker name the errors of its SDK. RequestError is its BadRequestError,
ModelError and CheckpointError are its NotFoundError, TrainingError its RequestFailedError, and ClosedError
its APIError.

A message says what was asked, what was found and what to do. Callers attach context (the row, the file, the
step) with `add_note`, and `describe` prints both.
"""

from typing import Literal


class CookbookError(Exception):
    """The base class of all errors that are raised deliberately."""

    @property
    def message(self) -> str:
        return str(self)


# -- the tree of the Tinker SDK, which programs name in `except` -------------------------------

TinkerError = CookbookError


class APIError(CookbookError):
    """A request that was refused, or that could not be sent."""


class APIStatusError(APIError):
    """A request that was refused. `status_code` is that of the same refusal over HTTP."""

    status_code = 500


class BadRequestError(APIStatusError):
    """A request with an invalid argument."""

    status_code = 400


class NotFoundError(APIStatusError):
    """A request for a run or a checkpoint that does not exist."""

    status_code = 404


class RequestFailedError(CookbookError):
    """A request that was accepted and failed while it ran."""

    category: Literal["user", "server", "unknown"] = "server"
    request_id = ""


# Only servers raise these. They exist so that programs can name them.


class APIConnectionError(APIError):
    """A server cannot be reached."""


class APITimeoutError(APIConnectionError):
    """A server did not answer in time."""


class APIResponseValidationError(APIError):
    """A server gave an answer that cannot be read."""


class AuthenticationError(APIStatusError):
    status_code = 401


class BillingError(APIStatusError):
    status_code = 402


class PermissionDeniedError(APIStatusError):
    status_code = 403


class ConflictError(APIStatusError):
    status_code = 409


class UnprocessableEntityError(APIStatusError):
    status_code = 422


class RateLimitError(APIStatusError):
    status_code = 429


class InternalServerError(APIStatusError):
    status_code = 500


# -- the errors of this project ----------------------------------------------------------------


class ConfigError(CookbookError, ValueError):
    """A config has an unknown key or a value that cannot be used."""


class RequestError(BadRequestError, ValueError):
    """A client method was called with an invalid argument."""


class RendererError(CookbookError, ValueError):
    """A conversation cannot be turned into tokens, or a template cannot be masked exactly."""


class DataError(CookbookError, ValueError):
    """A dataset is missing, malformed, or leaves nothing to train on."""


class ModelError(NotFoundError, OSError):
    """A model or its tokenizer is missing or cannot be loaded."""


class CheckpointError(NotFoundError, OSError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class FileError(CookbookError, OSError):
    """A file or folder is not written, read or removed: it is a link, not a file, or not the intended one."""


class TrainingError(RequestFailedError, RuntimeError):
    """A step failed while it ran."""


class ClosedError(APIError, RuntimeError):
    """A client was used after it, or the service that created it, was closed."""


class ClusterError(CookbookError, RuntimeError):
    """A Ray cluster cannot be reached, cannot do what is asked, or has no such job."""


def describe(error: BaseException) -> str:
    """Returns the message of `error` and the notes attached to it, one per line."""
    notes: list[str] = getattr(error, "__notes__", [])
    return "\n".join([f"{type(error).__name__}: {error}", *notes])
