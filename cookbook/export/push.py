"""Uploads to the Hugging Face hub, with its own client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cookbook.errors import CheckpointError, ConfigError
from cookbook.utils import hub

SCHEME = "hf://"


def repository_of(name: str) -> str:
    """Returns owner/name from `hf://owner/name` or `owner/name`. Raises ConfigError for any other text."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository = name.removeprefix(SCHEME)
    scheme = SCHEME if name.startswith(SCHEME) else ""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"Invalid repository {name!r}: write {scheme}owner/name. ({error})") from None
    if repository.count("/") != 1:
        raise ConfigError(f"Invalid repository {name!r}: it has no owner. Write {scheme}owner/name.")
    return repository


def check_access(repository: str) -> None:
    """Raises CheckpointError if the hub cannot be reached or the user is not logged in."""
    from huggingface_hub import HfApi

    if (reason := hub.why_unreachable()) is not None:
        raise CheckpointError(f"Cannot push to {repository}: {reason}. Export to a folder: to=<folder>.")
    with _explained(repository):
        HfApi().whoami()


def push(folder: Path, repository: str, private: bool, message: str, skipped: Sequence[str] = ()) -> str:
    """Uploads a folder in one commit, creates the repository if needed, and returns its URL.

    Files that match one of the patterns `skipped` stay here.

    Raises CheckpointError if the hub refuses, or if `private` is set and the repository is public.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise CheckpointError(
                f"The repository {repository} exists and is public. Set private=False to push to it, or "
                "give another name."
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(skipped) or None,
        )
    return str(url)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turns errors of the hub into CheckpointErrors that say what to do, without the token."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    cannot = f"Cannot push to {repository}"
    try:
        yield
    except LocalTokenNotFoundError:
        raise CheckpointError(
            f"{cannot}: not logged in. Run `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {
            401: "the hub does not know this token. Run `hf auth login` again, or set another HF_TOKEN.",
            403: "this token may not write there. Check the owner's name, and that the token may write.",
            404: "the hub knows no such owner. Check the name.",
        }.get(status, f"the hub answered {status}: {error.server_message or error}.")
        raise CheckpointError(f"{cannot}: {reason}") from None
    except (HTTPError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise CheckpointError(f"{cannot}: {reason}. Run the command again.") from error
