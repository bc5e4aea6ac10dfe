"""export: write the weights of an emulator as a plain dense model, for trainers that read a layer's weight."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from emloc_tools.errors import NumericalError, UnsupportedError
from emloc_tools.files.emulator import MANIFEST, Emulator, factor_names
from emloc_tools.files.exported import ExportWriter
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.json_files import read_json
from emloc_tools.files.manifest import BaseRecord, FactoredStack, made_by, manifest_dict
from emloc_tools.files.tensors import MAX_SHARD_SIZE, TensorSpec
from emloc_tools.linalg.merging import merge_weight
from emloc_tools.models.base import choose_device
from emloc_tools.models.checkpoint_form import checkpoint_form, plan_checkpoint
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config
from emloc_tools.models.source import Source
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.refusals import require_apart, require_artifact

# What config.json says of an emulator and of no other model, by the library that loads it.
OWN_KEYS = {"transformers": ("emloc", "auto_map"), "diffusers": ("quantization_config", "auto_map")}


@dataclass(frozen=True)
class ExportedModel:
    """A finished folder. `multiplied` are the weights that were factors, by their names in the model; `copied` counts
    the other tensors of the emulator. `nbytes` are those of all tensors; `emulator` is the hash of the emulator."""

    folder: Path
    base: BaseRecord
    emulator: str
    multiplied: list[str]
    copied: int
    nbytes: int


def export(
    *,
    emulator: Path,
    output: Path,
    to: Literal["dense"] = "dense",
    device: str = "cpu",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.export",
    progress: Progress = silent,
) -> ExportedModel:
    """Write to `output` a model of the base's own class whose weights are `W_E = U diag(S) Vh`.

    Products are taken in float32 and rounded once to the dtype of the factors; all other tensors keep their bytes. The
    checkpoint has the names and the layout that the base's class saves, so that any version of the library, and tools
    that read checkpoints themselves, load it. Memory holds one tensor, of experts one stack.

    A LoRA trained on it is one for the emulator: `correct` takes it with that emulator. Both compute the same up to the
    rounding of the products, which is that of float32 where the factors are.

    Raises `UnsupportedError` for a base whose class is code of its own or unknown to transformers, `NumericalError` for
    a product beyond the factors' dtype.
    """
    require_artifact(emulator, MANIFEST, "an emulator")
    require_apart(output, [emulator])
    check_output(output, overwrite=overwrite)
    device = choose_device(device)
    with contextlib.ExitStack() as stack:
        bundle = stack.enter_context(contextlib.closing(Emulator(emulator)))
        plan = _plan(bundle)
        model = _stock_model(bundle)
        parts = list(plan) if model is None else plan_checkpoint(model, plan)
        folder = stack.enter_context(new_folder(output, overwrite=overwrite))
        writer = ExportWriter(folder, parts, max_shard_size=max_shard_size, library=bundle.library)
        stack.enter_context(contextlib.closing(writer))
        for number, (spec, layer) in enumerate(plan.items(), 1):
            tensor = bundle.read(spec.name) if layer is None else _weight(bundle, layer, spec, device)
            stored = {spec.name: tensor} if model is None else checkpoint_form(model, {spec.name: tensor})
            for name, part in stored.items():
                writer.write(name, part)
            progress(Step("export", number, len(plan), spec.name))
        copy_companions(Source(str(emulator), None, emulator), folder)
        multiplied = sorted(spec.name for spec, layer in plan.items() if layer is not None)
        note = {
            "made_by": manifest_dict(made_by(command, bundle.library)),
            "base": manifest_dict(bundle.manifest.base),
            "emulator": bundle.hash,
            "to": to,
            "multiplied": multiplied,
        }
        writer.finish(config=_config(bundle), note=note)
    base, copied = bundle.manifest.base, len(plan) - len(multiplied)
    return ExportedModel(output, base, bundle.hash, multiplied, copied, writer.tensors.total_size)


def _plan(bundle: Emulator) -> dict[TensorSpec, str | None]:
    """The tensors of the dense model in the order of the emulator's files, a weight where its U is.

    Each with the layer or stack whose factors give it; None for a tensor that is the emulator's own.
    """
    first = {factor_names(name, stack=name in bundle.stacks)[0]: name for name in [*bundle.layers, *bundle.stacks]}
    gone = {f"{name}.weight" for name in bundle.layers} | set(bundle.stacks)  # the guard is one of them
    gone |= {factor for name in first.values() for factor in factor_names(name, stack=name in bundle.stacks)[1:]}
    found: dict[TensorSpec, str | None] = {}
    for stored in sorted(bundle.tensors.weight_map, key=bundle.tensors.weight_map.__getitem__):
        if stored in first:
            found[_weight_spec(bundle, first[stored], bundle.tensors.spec(stored).dtype)] = first[stored]
        elif stored not in gone:
            found[bundle.tensors.spec(stored)] = None
    return found


def _weight_spec(bundle: Emulator, name: str, dtype: torch.dtype) -> TensorSpec:
    """The weight of a layer or stack as the base's class holds it."""
    record = bundle.layers.get(name) or bundle.stacks[name]
    shape: tuple[int, ...] = (record.out_features, record.in_features)
    shape = shape[::-1] if record.orientation == "conv1d" else shape
    if isinstance(record, FactoredStack):
        return TensorSpec(name, dtype, (len(record.experts), *shape))
    return TensorSpec(f"{name}.weight", dtype, shape)


def _weight(bundle: Emulator, name: str, spec: TensorSpec, device: str) -> torch.Tensor:
    """`W_E` of a layer, or of every expert of a stack, as the base's class holds it."""
    U, S, Vh = bundle.factors(name)
    W_E = torch.zeros(spec.shape, dtype=spec.dtype)
    record = bundle.layers.get(name) or bundle.stacks[name]
    oriented = W_E.mT if record.orientation == "conv1d" else W_E
    try:
        if isinstance(record, FactoredStack):
            for number in range(len(record.experts)):
                merge_weight(oriented[number], factors=(U[number], S[number], Vh[number]), share=1.0, device=device)
        else:
            merge_weight(oriented, factors=(U, S, Vh), share=1.0, device=device)
    except NumericalError as error:
        raise NumericalError(
            f"{spec.name}: the product of its factors is beyond what {spec.dtype} holds; build the emulator with "
            "--dtype float32 or bfloat16"
        ) from error
    return W_E


def _stock_model(bundle: Emulator) -> nn.Module | None:
    """A skeleton of the base's own class, which knows its checkpoint; None where names in both are the same."""
    import transformers

    if bundle.library == "diffusers":
        return None
    architecture = bundle.manifest.base.architecture
    if bundle.code:
        raise UnsupportedError(
            f"the emulator in {bundle.folder} is of {architecture}, code of the base's own, which a dense export does "
            "not hold; train on the emulator as it is"
        )
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise UnsupportedError(f"transformers {transformers.__version__} does not know {architecture}")
    config = load_config(Source(str(bundle.folder), None, bundle.folder))
    return build_skeleton(cls, config, dtype=compute_dtype(config))


def _config(bundle: Emulator) -> dict[str, Any]:
    """The emulator's config.json, which is the base's, without what makes it one of an emulator."""
    config = read_json(bundle.folder / "config.json", "E7")
    config = {key: value for key, value in config.items() if key not in OWN_KEYS[bundle.library]}
    if bundle.library == "transformers":
        config["architectures"] = [bundle.manifest.base.architecture]
    return config
