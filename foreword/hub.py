"""Prefix files on the Hugging Face Hub: `hf://user/name`, at a revision `hf://user/name@v1`.

A repository holds one prefix, `prefix.safetensors`, and a model card. Reading goes through the Hub's local cache and works
offline for what is in it; writing happens in `upload` alone.
"""

import re
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError, HubError

__all__ = ["CARD", "FILE", "Reference", "local_file", "parse", "upload"]

FILE, CARD = "prefix.safetensors", "README.md"
_FORM = re.compile(r"hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?/?")  # a Path has one slash only


class Reference(NamedTuple):
    """A prefix on the Hub."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + ("" if self.revision is None else f"@{self.revision}")


def parse(path: str | Path) -> Reference | None:
    """The reference that `path` is, or `None` if it is a file.

    Raises:
        ConfigError: it begins with `hf:`, and is none.

    Example:
        >>> parse("hf://ada/tickets@v2")
        Reference(repo='ada/tickets', revision='v2')
        >>> parse("tickets.safetensors")
    """
    if not str(path).startswith("hf:"):
        return None
    found = _FORM.fullmatch(str(path))
    if found is None:
        raise ConfigError(f"{path}: expected hf://user/name, or hf://user/name@revision.")
    return Reference(found["repo"], found["revision"])


def local_file(path: str | Path) -> Path:
    """`path`, or where the file of a `hf://` reference is in the local cache, downloaded if needed.

    Raises:
        HubError: the Hub has no such prefix, or cannot be reached.
    """
    reference = parse(path)
    if reference is None:
        return Path(path)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(reference.repo, FILE, revision=reference.revision))
    except Exception as error:
        raise _explained(str(reference), error) from error


def upload(
    repo: str, files: dict[str, bytes], message: str, *, private: bool = False, keep: tuple[str, ...] = ()
) -> str:
    """Make the repository if there is none, and write the files in one commit. Returns its address.

    Args:
        repo: `user/name`.
        files: what goes where.
        message: of the commit.
        private: whether a new repository is.
        keep: of the files those that are left as they are, where they exist.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        kept = [name for name in keep if name in files and api.file_exists(repo, name)]
        operations = [CommitOperationAdd(name, content) for name, content in files.items() if name not in kept]
        api.create_commit(repo, operations, commit_message=message)
    except Exception as error:
        raise _explained(f"hf://{repo}", error) from error
    return str(address)


def _explained(where: str, error: Exception) -> HubError:
    """What happened, in words, and what to do."""
    from huggingface_hub import errors

    chain = [error, error.__cause__, error.__context__]
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)  # pyright: ignore
    if isinstance(error, errors.OfflineModeIsEnabled) or any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        told = "not in the local cache, and the Hub is switched off (HF_HUB_OFFLINE). Unset it, or give a file."
    elif isinstance(error, errors.RevisionNotFoundError):
        told = "the Hub has no such revision."
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        told = f"the repository has no {FILE}, so it holds no prefix."
    elif isinstance(error, errors.GatedRepoError):
        told = "access has to be asked for on its page; then log in with hf auth login."
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        told = (
            "the Hub has no such repository, or this login may not see it. Check the name; log in with hf auth login."
        )
    elif status in (401, 403):
        told = "this login may not do that. Log in with hf auth login, with a token that may write."
    elif status is not None:
        told = f"the Hub answered with status {status}: {_first_line(error)}"
    elif isinstance(error, errors.HFValidationError):
        told = f"not a name that the Hub knows: {_first_line(error)}"
    else:
        told = f"the Hub cannot be reached, and the local cache has no copy ({_first_line(error)}). Try again, or give a file."
    return HubError(f"{where}: {told}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
