"""The requests to the Hub. Whatever goes wrong there is one `InputError`, in one line, that holds no secret."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emloc_tools
from emloc_tools.errors import InputError
from emloc_tools.files.json_files import read_bytes

REPOSITORY = re.compile(r"\w[\w.\-]*/\w[\w.\-]*", re.ASCII)
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class State:
    """A repository at one commit: its files by name, and whether only its owners see it."""

    commit: str
    private: bool
    names: frozenset[str]


def require_repository_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository."""
    if REPOSITORY.fullmatch(repo) is None or len(repo) > 96:
        raise InputError(f"{repo!r} is no name of a repository on the Hub; expected a name such as org/name")


def state(repo: str, revision: str | None = None) -> State:
    """A repository's state at a branch, tag or commit. Raises `InputError` if there is none."""
    with _one_line(repo, revision, "read"):
        info = _api().model_info(repo, revision=revision)
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return State(str(info.sha), bool(info.private), names)


def state_if_any(repo: str, revision: str | None = None) -> State | None:
    """As `state`; None if there is no such repository or revision, or none that one may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return state(repo, revision)
    except InputError as error:
        cause = error.__cause__
        absent = isinstance(cause, (RepositoryNotFoundError, RevisionNotFoundError))
        if absent and not isinstance(cause, GatedRepoError):
            return None
        raise


def create_repository(repo: str, *, private: bool) -> None:
    """Create an empty model repository."""
    with _one_line(repo, None, "create"):
        _api().create_repo(repo, private=private)


def create_branch(repo: str, branch: str) -> None:
    """Create a branch from main."""
    with _one_line(repo, branch, "create the branch of"):
        _api().create_branch(repo, branch=branch)


def upload(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    deleted: Sequence[str],
    parent: str | None,
    branch: str | None,
    message: str,
    done: Callable[[int, str], None],
) -> str:
    """Upload files and commit them at once, without `deleted`; returns the commit's address.

    `done(number, name)` is called after each file. Nothing is in the repository before the commit, which fails if the
    branch is no longer at the commit `parent`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = _api()
    with _one_line(repo, branch, "write to"), _without_bars():
        operations: list[Any] = []
        for number, (name, content) in enumerate(files.items(), 1):
            operation = CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            api.preupload_lfs_files(repo, [operation], revision=branch, free_memory=False)
            operations.append(operation)
            done(number, name)
        operations += [CommitOperationDelete(name) for name in deleted]
        committed = api.create_commit(repo, operations, commit_message=message, revision=branch, parent_commit=parent)
    return str(committed.commit_url)


def download(repo: str, names: Sequence[str], commit: str, folder: Path, *, done: Callable[[int, str], None]) -> None:
    """Fetch files of one commit into `folder`, and nothing else; `done(number, name)` is called after each."""
    from huggingface_hub import hf_hub_download

    for number, name in enumerate(names, 1):
        with _one_line(repo, commit, f"fetch {name} of"), _without_bars():
            hf_hub_download(repo, name, revision=commit, local_dir=folder)
        done(number, name)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # what it remembers of its downloads


def read_text(repo: str, name: str, revision: str | None, *, limit: int) -> str | None:
    """The text of a small file; None if the repository has none of that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with _one_line(repo, revision, f"fetch {name} of"), _without_bars():
            path = Path(hf_hub_download(repo, name, revision=revision))
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return None
        raise
    return read_bytes(path, "card", limit).decode("utf-8", "replace")


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="emloc-tools", library_version=emloc_tools.__version__)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Progress is the stages' own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _one_line(repo: str, revision: str | None, doing: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        cause: BaseException = error
        # Uploads wrap what happened in a RuntimeError, downloads in a LocalEntryNotFoundError.
        if not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, (HTTPError, OSError)):
            cause = error.__cause__
        raise InputError(_explained(repo, revision, doing, cause)) from cause


def _explained(repo: str, revision: str | None, doing: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return f"cannot {doing} {repo}: HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms on the Hub, then {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision} on the Hub"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match status:
        case 401:
            return f"cannot {doing} {repo}: the Hub does not know you, or you may not see it (401); {LOGIN}"
        case 403:
            return f"cannot {doing} {repo}: the Hub forbids it (403); use a token that may do that, or another name"
        case 404:
            return f"cannot {doing} {repo}: it is not on the Hub (404); check its name, and for a private one {LOGIN}"
        case 409 if doing == "create":
            return f"cannot create {repo}: it exists, and you may not see it (409); {LOGIN}, or choose another name"
        case 409 | 412:
            return f"cannot {doing} {repo}: somebody else changed it just now ({status}); run the command again"
        case int() if status >= 500:
            return f"cannot {doing} {repo}: the Hub has an error of its own ({status}); try again later"
    return f"cannot {doing} {repo}: {_said(error)}"


def _said(error: BaseException) -> str:
    """What an error says, in one line, without the queries of addresses, which may hold signatures."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)[:300]
