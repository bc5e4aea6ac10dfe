"""merge: write the base with a LoRA in its weights as a plain dense model, tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_tools.errors import MismatchError, NumericalError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_ADAPTER
from emloc_tools.files.diffusers_lora import open_adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import BaseRecord, made_by, manifest_dict
from emloc_tools.files.merged import MergedWriter
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec, content_hash, read_json
from emloc_tools.linalg.merging import merge_weight
from emloc_tools.models.base import BaseModel, choose_device, open_base, oriented
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.source import Source
from emloc_tools.models.weights import ModelWeights, require_finite
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.merge_checks import (
    check_share,
    require_architecture,
    require_meant,
    require_unmerged,
    what_was_checked,
)
from emloc_tools.stages.merge_plan import Change, plan_changes
from emloc_tools.stages.refusals import require_apart, require_artifact, require_original, require_plain_lora


@dataclass(frozen=True)
class MergedModel:
    """A finished model folder.

    `merged` are the checkpoint tensors with a LoRA or a share of the emulator in them, `replaced` those taken from the
    adapter as a whole (modules_to_save); `copied` counts all others. `nbytes` are those of all tensors. `checked` says
    what shows that the adapter belongs to this base.
    """

    folder: Path
    base: BaseRecord
    merged: list[str]
    replaced: list[str]
    copied: int
    nbytes: int
    interpolate: float | None
    checked: str


def merge(
    *,
    base: str,
    adapter: Path,
    output: Path,
    emulator: Path | None = None,
    interpolate: float | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    max_shard_size: int = MAX_SHARD_SIZE,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.merge",
    progress: Progress = silent,
) -> MergedModel:
    """Write to `output` the base with `W + s B A` for every layer that the adapter adapts: an ordinary dense model.

    The checkpoint keeps the base's own tensor names, and what is not adapted its bytes. Each tensor is read once;
    memory holds one of them and its LoRA pair. Products are taken in float32 and rounded once, to the tensor's dtype or
    to `dtype`.

    With `emulator` and `interpolate` (T, 0 to 1), `adapter` is the *uncorrected* LoRA that was trained on that emulator
    and the weights become `W − T (W − W_E) + s B A`, in all layers that the emulator factors. T = 0 is the LoRA on the
    base as it is, T = 1 the emulator with its LoRA; no LoRA of that rank computes what is between.

    Raises `MismatchError` for an adapter of an emulator that is not corrected, or of another model;
    `UnsupportedError` for what cannot be merged, `NumericalError` for NaN and for values beyond the dtype.
    """
    require_original(base)
    if not (adapter / DIFFUSERS_ADAPTER).is_file():
        require_artifact(adapter, ADAPTER, "a PEFT adapter")
    if emulator is not None:
        require_artifact(emulator, EMULATOR, "an emulator")
    require_apart(output, [adapter, Path(base), *([emulator] if emulator else [])])
    check_output(output, overwrite=overwrite)
    check_share(emulator, interpolate)
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        trained = stack.enter_context(contextlib.closing(open_adapter(adapter)))
        require_plain_lora(trained)
        bundle = None if emulator is None else stack.enter_context(contextlib.closing(Emulator(emulator)))
        require_meant(trained, bundle)
        opened = open_base(base, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        stack.enter_context(opened.tensors)
        require_architecture(opened, trained, bundle)
        require_unmerged(opened, trained)
        weights = opened.weights()
        changes = plan_changes(opened, weights, trained, bundle)
        for key in trained.tensors.names():
            trained.read(key)  # refuses NaN before anything is written
        merger = _Merger(opened, weights, trained, bundle, changes, interpolate or 0.0, dtype, device)
        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        # The order of the base's files, so that it is read from front to back, and fetched file by file.
        keys = sorted(opened.tensors.weight_map, key=opened.tensors.weight_map.__getitem__)
        specs = [TensorSpec(key, merger.dtype_of(key), opened.tensors.spec(key).shape) for key in keys]
        writer = MergedWriter(folder, specs, max_shard_size=max_shard_size, library=opened.library)
        stack.enter_context(contextlib.closing(writer))
        for number, key in enumerate(keys, 1):
            writer.write(key, merger.tensor(key))
            progress(Step("merge", number, len(keys), key))
        _copy_files(opened.source, folder, code=trust_remote_code)
        result = MergedModel(
            folder=output,
            base=BaseRecord(id=base, revision=opened.source.revision, architecture=opened.architecture),
            merged=sorted(key for key, change in changes.items() if change.layer is not None),
            replaced=sorted(key for key, change in changes.items() if change.layer is None),
            copied=len(keys) - len(changes),
            nbytes=writer.tensors.total_size,
            interpolate=interpolate,
            checked=what_was_checked(trained, bundle, merger.compared),
        )
        note = {
            "made_by": manifest_dict(made_by(command, opened.library)),
            "base": manifest_dict(result.base),
            "adapter": {"hash": trained.hash, "corrected": trained.corrected},
            "emulator": bundle and bundle.hash,
            "interpolate": interpolate,
            "merged": result.merged,
            "replaced": result.replaced,
            "checked": result.checked,
        }
        writer.finish(config=_config(opened, dtype), note=note, what=_what(interpolate), changed=len(changes))
    return result


class _Merger:
    """Makes the tensors of the merged checkpoint, one at a time."""

    def __init__(
        self,
        opened: BaseModel,
        weights: ModelWeights,
        trained: Adapter,
        bundle: Emulator | None,
        changes: Mapping[str, Change],
        share: float,
        dtype: str,
        device: str,
    ) -> None:
        self._opened, self._trained, self._bundle, self._changes = opened, trained, bundle, changes
        self._share, self._device = share, device
        self._ignored = frozenset(weights.ignored)
        self._stored = {weights.copied_from(name): name for name in weights.stored_names()}
        self._dtype: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
        self._model_dtypes = {name: tensor.dtype for name, tensor in opened.model.state_dict().items()}
        self.compared = 0

    def dtype_of(self, key: str) -> torch.dtype:
        """The dtype that a tensor gets: a requested one, but for what the model class keeps in float32."""
        stored = self._opened.tensors.spec(key).dtype
        if self._dtype is None or not stored.is_floating_point:
            return stored
        wanted = self._model_dtypes.get(self._stored.get(key, ""), self._dtype)
        return wanted if wanted.is_floating_point else self._dtype

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor `key` of the merged checkpoint."""
        tensor = self._opened.tensors.read(key)
        if key not in self._ignored:
            require_finite(key, tensor)
        self._compare(key, tensor)
        change = self._changes.get(key, Change())
        if change.saved is not None:
            tensor = self._trained.read(change.saved)
        dtype = self.dtype_of(key)
        if change.layer is None:
            return tensor if tensor.dtype == dtype else _rounded(key, tensor, dtype)
        try:
            W = merge_weight(
                oriented(change.layer, tensor),
                lora=self._lora(change),
                factors=self._bundle.factors(change.layer.name) if self._bundle and change.factored else None,
                share=self._share,
                dtype=dtype,
                device=self._device,
            )
        except NumericalError as error:
            raise NumericalError(f"{key}: {error}") from error
        return oriented(change.layer, W)

    def _lora(self, change: Change) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A, B and the scaling of what is added to a weight."""
        if change.embedding is not None:
            keys = self._trained.embeddings[change.embedding]
            return self._trained.read(keys.B).T, self._trained.read(keys.A).T, keys.scaling
        if change.lora is not None:
            return *self._trained.pair(change.lora), self._trained.loras[change.lora].scaling
        return None

    def _compare(self, key: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor that is not the one which the emulator was made from."""
        name = self._stored.get(key)
        if self._bundle is None or name is None:
            return
        record = self._bundle.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = record.weight_hash if record else self._bundle.manifest.tensors.get(name)
        if expected is None:
            return
        if content_hash(tensor) != expected:
            raise MismatchError(
                f"{key} of {self._opened.source.id} is not the weight that the emulator in {self._bundle.folder} was "
                f"made from ({self._bundle.manifest.base.id}); pass that very model as --base"
            )
        self.compared += 1


def _rounded(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rounded = tensor.to(dtype)
    if not torch.isfinite(rounded).all():
        raise NumericalError(f"{key}: its values are beyond what {dtype} holds; choose a wider --dtype")
    return rounded


def _what(interpolate: float | None) -> str:
    if interpolate is None:
        return "a LoRA merged into its weights"
    return f"its weights moved by {interpolate:g} towards those of an emulator, and the LoRA trained there merged"


def _copy_files(source: Source, folder: Path, *, code: bool) -> None:
    """Tokenizer and the like; the base's own code only where it was trusted."""
    copy_companions(source, folder)
    for path in sorted(source.folder.glob("*.py")) if code else ():
        shutil.copyfile(path, folder / path.name)


def _config(opened: BaseModel, dtype: str) -> str:
    """The base's config.json to the letter, but for a dtype that the user chose, and FP8 that is none any more."""
    path = opened.source.folder / "config.json"
    if dtype == "auto" and not opened.dequantised:
        return path.read_text(encoding="utf-8")
    config = read_json(path, "base config")
    if opened.dequantised:
        del config["quantization_config"]
    if dtype != "auto" and opened.library == "transformers":  # diffusers takes it from whoever loads the model
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
