"""Every error this project raises on purpose.

    CookbookError
    ├── ConfigError       (ValueError)    a key or a value of a config
    ├── RequestError      (ValueError)    what a caller handed to a client: a Datum, a loss, a name
    ├── RendererError     (ValueError)    a conversation or a template that cannot be rendered
    ├── DataError         (ValueError)    a dataset, a file or a row
    ├── ModelError        (OSError)       a model or tokenizer that is missing or cannot be loaded
    ├── CheckpointError   (OSError)       a checkpoint that is missing, damaged, foreign or not writable
    ├── FileError         (OSError)       a file that is not written, read or removed: a link, a device
    ├── TrainingError     (RuntimeError)  a step that failed while it ran
    ├── ClosedError       (RuntimeError)  a call on a client after it, or its service, was closed
    └── ClusterError      (RuntimeError)  a Ray cluster that cannot be reached, or a job that is not on it

A message says what was asked, what was found and what to do. Context gathered on the way up
(the row, the file, the step) is attached with `add_note`, and `describe` prints both.
"""


class CookbookError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(CookbookError, ValueError):
    """A config has an unknown key or a value that cannot be honoured."""


class RequestError(CookbookError, ValueError):
    """A client method was called with an invalid argument."""


class RendererError(CookbookError, ValueError):
    """A conversation cannot be turned into tokens, or a template cannot be masked exactly."""


class DataError(CookbookError, ValueError):
    """A dataset is missing, malformed, or leaves nothing to train on."""


class ModelError(CookbookError, OSError):
    """A model or its tokenizer is missing or cannot be loaded."""


class CheckpointError(CookbookError, OSError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class FileError(CookbookError, OSError):
    """A file or folder is not written, read or removed: a link, not a file, or not the one that was meant."""


class TrainingError(CookbookError, RuntimeError):
    """A step failed while it ran."""


class ClosedError(CookbookError, RuntimeError):
    """A client was used after it, or the service that it came from, was closed."""


class ClusterError(CookbookError, RuntimeError):
    """A Ray cluster cannot be reached or cannot do what is asked, or has no such job."""


def describe(error: BaseException) -> str:
    """The message of `error` with the notes attached to it, one per line."""
    notes: list[str] = getattr(error, "__notes__", [])
    return "\n".join([f"{type(error).__name__}: {error}", *notes])
