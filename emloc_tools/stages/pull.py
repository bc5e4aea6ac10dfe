"""pull: an artifact from a repository of the Hub, whole and checked, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emloc_tools.errors import InputError
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.hub import client
from emloc_tools.hub.artifact import CARD, MARKERS, Kind, examine, files_of, kind_of
from emloc_tools.records import Progress, Step, silent


@dataclass(frozen=True)
class Pulled:
    """What `pull` fetched. `revision` is the commit; `left_out` are files of the repository that are no part of it."""

    output: Path
    repo: str
    revision: str
    kind: Kind
    files: list[str]
    left_out: list[str]
    nbytes: int


def pull(
    repo: str, *, output: Path, repo_revision: str | None = None, overwrite: bool = False, progress: Progress = silent
) -> Pulled:
    """Download the calibration, emulator or adapter in `repo` at `repo_revision` (a branch, tag or commit).

    Only the files that belong to such an artifact are fetched; a card stays there, but for that of an emulator, whose
    folder has one. Code of an emulator is fetched and not run. `output` appears once all values are read and right.

    Raises `InputError` for whatever the Hub refuses and for a repository without an artifact, `FormatError` for one
    that is damaged.
    """
    client.require_repository_name(repo)
    check_output(output, overwrite=overwrite)
    found = client.state(repo, repo_revision)
    kind = kind_of(found.names)
    if kind is None:
        raise InputError(
            f"{repo} holds none of {', '.join(MARKERS)}; pull takes repositories with a calibration, an emulator or an "
            "adapter"
        )
    names, others = files_of(kind, found.names)
    if kind == "emulator" and CARD in others:
        names.append(CARD)
        others.remove(CARD)
    with new_folder(output, overwrite=overwrite) as folder:
        client.download(
            repo,
            names,
            found.commit,
            folder,
            done=lambda done, name: progress(Step("download", done, len(names), name)),
        )
        examine(folder, lambda done, total, what: progress(Step("check", done, total, what)))
        nbytes = sum((folder / name).stat().st_size for name in names)
    return Pulled(output, repo, found.commit, kind, names, others, nbytes)
