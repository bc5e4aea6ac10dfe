"""Where a base model comes from: a local folder or a Hub id, of which only the needed files are fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


@dataclass(frozen=True)
class Source:
    """A model's files. `id` is what the user gave, `revision` the Hub commit (None for a local folder)."""

    id: str
    revision: str | None
    folder: Path

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
            return Path(hf_hub_download(self.id, name, revision=self.revision))
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

    Honours `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE`. Python files are fetched only with
    `trust_remote_code`. Raises `InputError` if the base is neither, or cannot be reached.
    """
    path = Path(os.path.expanduser(base))  # noqa: PTH111 - Path.expanduser raises where there is no such home
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{base} is a local folder, which has no --revision; leave it out")
        source = Source(base, None, path)
    elif path.exists():
        raise InputError(f"{base} is a file; --base takes a model's folder or a Hub id such as org/name")
    elif not HUB_ID.fullmatch(base):
        raise InputError(f"{base} does not exist; --base takes a model's folder or a Hub id such as org/name")
    else:
        source = _fetch(base, revision, trust_remote_code)
    if not (source.folder / "config.json").is_file():
        raise InputError(f"{base} has no config.json; --base takes a Hugging Face model folder or a Hub id")
    return source


def open_tensors(source: Source) -> TensorFolder:
    """The model's weights, fetched file by file as they are read; a model of one file is fetched here.

    Raises `UnsupportedError` if it has none in safetensors, `FormatError` if they are damaged.
    """
    if source.locate("model.safetensors.index.json") is None and source.locate("model.safetensors") is None:
        raise UnsupportedError(
            f"{source.id} holds no model.safetensors; weights are read only from safetensors, never unpickled"
        )
    return TensorFolder.of_model(source.locate)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _fetch(base: str, revision: str | None, trust_remote_code: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*COMPANIONS, "*.py"] if trust_remote_code else list(COMPANIONS)
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
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
    return Source(base, folder.name, folder)
