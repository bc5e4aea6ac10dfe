"""push: an artifact into a repository of the Hub, with a card that explains it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emloc_tools.errors import InputError
from emloc_tools.files.json_files import read_bytes
from emloc_tools.hub import client
from emloc_tools.hub.artifact import CARD, Artifact, Kind, examine, files_of, kind_of
from emloc_tools.hub.card import base_of, card, is_of_a_user
from emloc_tools.hub.client import State
from emloc_tools.hub.licenses import LARGEST_CARD, License, license_of
from emloc_tools.hub.privacy import is_on_hub, recorded_paths
from emloc_tools.records import Progress, Step, silent


@dataclass(frozen=True)
class PushedFile:
    """A file of the repository and its bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Pushed:
    """What `push` did, or would do: then `commit` is None.

    `files` are all that is uploaded; `left_out` what stays behind because it is no part of the artifact, and `deleted`
    what an earlier push left in the repository. `card` is the text of README.md, None where one is kept that a user
    wrote. `license` is that of the base, None if unknown. `warnings` are lines on what others will see.
    """

    repo: str
    kind: Kind
    public: bool
    files: list[PushedFile]
    left_out: list[str]
    deleted: list[str]
    card: str | None
    license: str | None
    warnings: list[str]
    commit: str | None


def push(
    folder: Path,
    *,
    repo: str,
    public: bool = False,
    dry_run: bool = False,
    repo_revision: str | None = None,
    message: str | None = None,
    progress: Progress = silent,
) -> Pushed:
    """Upload a calibration, an emulator or an adapter to `repo`, in one commit with `message`.

    All of the folder is read and checked first. Only files that belong to the artifact are uploaded, and a README.md
    with the base's license, unless one that a user wrote is in the folder or in the repository. The repository is
    created, private unless `public`. `repo_revision` is a branch, created if need be. A `dry_run` sends no request at
    all, and so cannot tell the license of a base on the Hub, or what is in the repository.

    Raises `InputError` for a folder that is no such artifact, for a repository that is public without `public` or holds
    another kind, and for whatever the Hub refuses; `FormatError` for a damaged folder.
    """
    client.require_repository_name(repo)
    artifact = examine(folder, lambda done, total, what: progress(Step("check", done, total, what)))
    own = _own_card(folder)
    license = None if own is not None else _license(artifact, ask=not dry_run)
    found = None if dry_run else _prepare(repo, artifact.kind, public, repo_revision)
    kept_there = found is not None and own is None and _card_is_kept(repo, found)
    written = None if own is not None or kept_there else card(artifact, repo, license)
    files: dict[str, Path | bytes] = {name: folder / name for name in artifact.files}
    if own is not None:
        files[CARD] = folder / CARD
    elif written is not None:
        files[CARD] = written.encode()
    there = found.names if found is not None else frozenset()
    deleted = [name for name in files_of(artifact.kind, there)[0] if name not in files]
    commit = None
    if not dry_run:
        commit = client.upload(
            repo,
            files,
            deleted=deleted,
            parent=found.commit if found is not None else None,
            branch=repo_revision,
            message=message or f"Push {artifact.kind} with emloc-tools",
            done=lambda done, name: progress(Step("upload", done, len(files), name)),
        )
    return Pushed(
        repo=repo,
        kind=artifact.kind,
        public=public if found is None else not found.private,
        files=[PushedFile(name, _size(content)) for name, content in files.items()],
        left_out=list(artifact.others),
        deleted=deleted,
        card=written,
        license=license.id if license else None,
        warnings=list(_warnings(artifact, written, license, found, public, dry_run)),
        commit=commit,
    )


def _own_card(folder: Path) -> str | None:
    """The README.md in a folder, if a user wrote it."""
    path = folder / CARD
    text = read_bytes(path, "card", LARGEST_CARD).decode("utf-8", "replace") if path.is_file() else None
    return text if text is not None and is_of_a_user(text) else None


def _license(artifact: Artifact, *, ask: bool) -> License | None:
    base = base_of(artifact)
    return None if base is None or (is_on_hub(base) and not ask) else license_of(base)


def _prepare(repo: str, kind: Kind, public: bool, branch: str | None) -> State:
    """The state that the commit comes on top of; repository and branch are there then.

    Raises `InputError` where the push would publish what is meant to be private, or mix artifacts.
    """
    found = client.state_if_any(repo)
    if found is None:
        client.create_repository(repo, private=not public)
        found = client.state(repo)
        if not found.private and not public:
            raise InputError(f"the Hub made {repo} public all the same; nothing was uploaded, and it is empty there")
    elif not found.private and not public:
        raise InputError(
            f"{repo} exists and is public; pass --public to push to it all the same, or choose another --repo"
        )
    if branch is not None:
        there = client.state_if_any(repo, branch)
        if there is None:
            client.create_branch(repo, branch)
            there = client.state(repo, branch)
        found = there
    other = kind_of(found.names)
    if other is not None and other != kind:
        raise InputError(
            f"{repo} holds an artifact of another kind, {other}; push the {kind} to a repository of its own"
        )
    return found


def _card_is_kept(repo: str, found: State) -> bool:
    """Whether the repository has a card that a user wrote."""
    text = client.read_text(repo, CARD, found.commit, limit=LARGEST_CARD) if CARD in found.names else None
    return text is not None and is_of_a_user(text)


def _warnings(
    artifact: Artifact, written: str | None, license: License | None, found: State | None, public: bool, dry_run: bool
) -> Iterator[str]:
    base = base_of(artifact)
    paths = recorded_paths(artifact.folder / name for name in artifact.files)
    if paths:
        name, path = next(iter(paths.items()))
        yield (
            f"{', '.join(paths)} of the artifact itself record paths of this machine, such as {path} in {name}, which "
            "all who may see the repository can read; make it from relative paths if that matters"
        )
    if found is not None and found.private and public:
        yield "the repository exists and is private; --public does not change that, its settings on the Hub do"
    if written is not None and license is None:
        if dry_run and base is not None and is_on_hub(base):
            yield f"the license will be that of {base.id}, which a dry run does not ask the Hub for"
        else:
            yield "the card of the base names no license that could be read, so the card names none; add it"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
