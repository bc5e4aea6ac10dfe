"""Where a base model comes from: a local folder or a Hub id, of which only the needed files are fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.emulator import STEMS
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.diffusion import PIPELINE, denoiser_of
from emloc_tools.records import Library

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
HUB_ID = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*){0,2}")  # the third part is a sub-folder, as of a pipeline


@dataclass(frozen=True)
class Source:
    """A model's files. `id` is what the user gave, `revision` the Hub commit (None for a local folder).

    `subfolder` is the model's place in its repository on the Hub, empty for most.
    """

    id: str
    revision: str | None
    folder: Path
    subfolder: str = ""

    @property
    def repository(self) -> str:
        """The Hub id of the repository that holds the model."""
        return "/".join(self.id.split("/")[:2])

    def locate(self, name: str) -> Path | None:
        """The path of a file of the model, fetched from the Hub if need be; None if the model has no such file.

        Raises `InputError` if it cannot be fetched.
        """
        path = self.folder / name
        if path.is_file():
            return path
        if self.revision is None:
            return None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            place = self.subfolder or None
            return Path(hf_hub_download(self.repository, name, subfolder=place, revision=self.revision))
        except LocalEntryNotFoundError as error:
            if name.endswith(".index.json"):
                return None  # single-file models have none, and offline nobody can tell
            raise InputError(
                f"{self.id}: {name} is neither in the local cache nor can it be fetched: {first_line(error)}"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            raise InputError(f"{self.id}: {name} cannot be fetched: {first_line(error)}") from error


def open_source(base: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find a base model: an existing folder, else a Hub id of which all small files are fetched, and no weights.

    A model inside a repository is meant by `org/name/subfolder`. Of a pipeline of diffusers it is the only denoiser.
    Honours `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE`. Python files are fetched only with
    `trust_remote_code`. Raises `InputError` if the base is neither, or cannot be reached.
    """
    path = Path(os.path.expanduser(base))  # noqa: PTH111 - Path.expanduser raises where there is no such home
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{base} is a local folder, which has no --revision; leave it out")
        inside = denoiser_of(path, base) if _is_pipeline(path) else ""
        source = Source(base, None, path / inside)
    elif path.exists():
        raise InputError(f"{base} is a file; --base takes a model's folder or a Hub id such as org/name")
    elif not HUB_ID.fullmatch(base):
        raise InputError(f"{base} does not exist; --base takes a model's folder or a Hub id such as org/name")
    else:
        source = _fetch(base, "/".join(base.split("/")[2:]), revision, trust_remote_code)
        if _is_pipeline(source.folder):
            source = _fetch(base, denoiser_of(source.folder, base), source.revision, trust_remote_code)
    if not (source.folder / "config.json").is_file():
        raise InputError(f"{base} has no config.json; --base takes a Hugging Face model folder or a Hub id")
    return source


def open_tensors(source: Source, library: Library = "transformers") -> TensorFolder:
    """The model's weights, fetched file by file as they are read; a model of one file is fetched here.

    `library` is the one that wrote them. Raises `UnsupportedError` if there are none in safetensors, `FormatError` if
    they are damaged.
    """
    single = f"{STEMS[library]}.safetensors"
    if source.locate(f"{single}.index.json") is None and source.locate(single) is None:
        raise UnsupportedError(
            f"{source.id} holds no {single}; weights are read only from safetensors, never unpickled"
        )
    return TensorFolder.of_model(source.locate, STEMS[library])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_pipeline(folder: Path) -> bool:
    return (folder / PIPELINE).is_file() and not (folder / "config.json").is_file()


def _fetch(base: str, subfolder: str, revision: str | None, trust_remote_code: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*COMPANIONS, "*.py"] if trust_remote_code else list(COMPANIONS)
    place = f"{subfolder}/" if subfolder else ""
    source = Source(base, revision, Path(), subfolder)
    try:
        folder = Path(
            snapshot_download(
                source.repository,
                revision=revision,
                allow_patterns=[place + pattern for pattern in patterns],
                ignore_patterns=[f"{place}*/*"],
            )
        )
    except GatedRepoError as error:
        raise InputError(f"{base} is gated: accept its terms on the Hub, then log in or set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{base} is neither a local folder nor a model on the Hub; for a private model log in or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{base} has no revision {revision} on the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"{base} is no local folder, and the Hub does not give it: {first_line(error)}") from error
    return replace(source, revision=folder.name, folder=folder / subfolder)
