"""plan: the largest emulator whose training step fits into a given memory, and what every stage needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from emloc_tools.errors import InputError
from emloc_tools.files.manifest import BaseRecord, made_by
from emloc_tools.files.plan import Conditions, Model, Parts, PlanV1, Stage, read_plan, write_plan
from emloc_tools.files.single import check_file
from emloc_tools.linalg.allocate import stored_values, uniform_ranks
from emloc_tools.models.layers import all_layers, select_layers
from emloc_tools.planning.costs import inference_and_groups, sizes_of, stage_needs
from emloc_tools.planning.inputs import Shape, make_inputs
from emloc_tools.planning.ledger import Memory
from emloc_tools.planning.search import largest_fitting
from emloc_tools.planning.step import OPTIMIZERS, Training, training_memory, vocabulary_of
from emloc_tools.planning.subject import Subject, open_subject
from emloc_tools.records import Layer, Progress, Step, silent
from emloc_tools.stages.refusals import require_original

RESERVE = 0.05  # of the memory, for the context of CUDA, workspaces of its libraries and fragmentation
SAMPLES = 64  # of a calibration, as calibrate takes by default
TYPICAL_STEPS = 4  # that a search simulates


def plan(
    *,
    base: str,
    memory: int,
    reserve: int | None = None,
    revision: str | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    images: int = 0,
    image_size: tuple[int, int] = (448, 448),
    resolution: tuple[int, int] = (1024, 1024),
    data: Path | None = None,
    lora_rank: int = 16,
    lora_targets: Sequence[str] | None = None,
    lora_dtype: str = "float32",
    gradient_checkpointing: bool = True,
    optimizer: str = "adamw",
    dtype: str = "auto",
    targets: str | None = None,
    exclude: str | None = None,
    trust_remote_code: bool = False,
    save: Path | None = None,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.plan",
    progress: Progress = silent,
) -> PlanV1:
    """Foresee the peak memory of LoRA training on `base` and its emulators, without allocating a weight.

    `memory` are the bytes of the device, of which `reserve` (5% by default) are left for what is not foreseen. The
    step is of `batch_size` samples of `sequence_length` tokens, with `images` of `image_size` each, or of pictures of
    `resolution` for a denoiser; or of the largest batch of `data`. `lora_targets` are names of modules, as PEFT takes
    them; by default every layer that becomes factors, but experts. `dtype` is that of the frozen weights.

    The emulator is the largest of a uniform ratio, in thousandths; layers are chosen as by `build_emulator`. Of a Hub
    id no weights are fetched. Raises `InputError` where nothing fits, `UnsupportedError` for a model that cannot be
    run without values.
    """
    require_original(base)
    if optimizer not in OPTIMIZERS:
        raise InputError(f"--optimizer {optimizer} is not known; choose one of {', '.join(OPTIMIZERS)}")
    if save is not None:
        check_file(save, "--save", overwrite=overwrite)
    reserve = int(memory * RESERVE) if reserve is None else reserve
    if reserve >= memory:
        raise InputError(f"--reserve {reserve:,} leaves nothing of --memory {memory:,}; choose less")
    subject = open_subject(base, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    model, steps = subject.skeleton(), _Steps(progress)
    layers = select_layers(model, targets=targets, exclude=exclude)
    shape = Shape(batch_size, sequence_length, images, image_size, resolution, data)
    inputs = make_inputs(model, subject.config, subject.source, shape, trust_remote_code=trust_remote_code)
    training = Training(
        lora_rank,
        tuple(lora_targets) if lora_targets else tuple(layer.name for layer in layers if layer.experts is None),
        getattr(torch, lora_dtype),
        gradient_checkpointing,
        optimizer,
    )
    of_base = _model(subject.skeleton(), inputs, training)
    steps.done("training on the base")
    vocabulary, adapter = vocabulary_of(model), _adapter(model, training)
    inference, groups = inference_and_groups(model, layers, inputs)
    steps.done("inference with the base")
    ratio, found = None, None
    if of_base.training.total > memory - reserve:
        ratio, found = _largest_emulator(subject, layers, inputs, training, memory - reserve, of_base, steps)
    needs = stage_needs(
        sizes_of(subject.as_stored()),
        layers,
        groups,
        tokens=_tokens(inputs),
        samples=-(-SAMPLES // batch_size),
        hidden=_hidden(layers),
        vocabulary=vocabulary or 0,
        itemsize=subject.stored_dtype.itemsize,
        emulator=found.size if found else 0,
        adapter=adapter,
    )
    result = PlanV1(
        made_by=made_by(command, subject.library),
        base=BaseRecord(id=base, revision=subject.source.revision, architecture=subject.cls.__name__),
        targets=targets,
        exclude=exclude,
        memory=memory,
        reserve=reserve,
        ratio=ratio,
        factored_layers=len(uniform_ranks(layers, ratio)) if ratio is not None else 0,
        conditions=_conditions(shape, training, subject, lora_targets),
        emulator=found,
        base_model=of_base,
        inference=_parts(inference),
        stages=[Stage(**asdict(each)) for each in needs],
    )
    if save is not None:
        write_plan(save, result)
    return result


@dataclass(frozen=True)
class PlannedBuild:
    """What a plan says about the emulator to build."""

    base: str
    revision: str | None
    ratio: float
    targets: str | None
    exclude: str | None
    dtype: str


def planned_build(path: Path) -> PlannedBuild:
    """Read a plan for build-emulator. Raises `FormatError` for no plan, `InputError` for one without an emulator."""
    found = read_plan(path)
    if found.ratio is None:
        raise InputError(
            f"{path} plans no emulator, as training the base {found.base.id} itself fits into {found.memory:,} bytes; "
            "train on it, or leave --from-plan out and give --ratio"
        )
    dtype = found.conditions.dtype
    return PlannedBuild(found.base.id, found.base.revision, found.ratio, found.targets, found.exclude, dtype)


class _Steps:
    """Tells of every simulated step; how many there will be is not known before the search ends."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done = progress, 0

    def done(self, detail: str) -> None:
        """One more."""
        self._done += 1
        self._progress(Step("plan", self._done, max(self._done, TYPICAL_STEPS), detail))


def _largest_emulator(
    subject: Subject,
    layers: Sequence[Layer],
    inputs: Mapping[str, Any],
    training: Training,
    usable: int,
    of_base: Model,
    steps: _Steps,
) -> tuple[float, Model]:
    """The largest ratio that fits, and its emulator. Raises `InputError` where none does."""
    measured: dict[float, Model] = {}

    def weigh(ratio: float) -> int:
        ranks = uniform_ranks(layers, ratio) if ratio < 1 else {}
        return stored_values(layers, ranks) * subject.dtype.itemsize

    def measure(ratio: float) -> int:
        measured[ratio] = _model(subject.skeleton(uniform_ranks(layers, ratio)), inputs, training)
        steps.done(f"training at ratio {ratio:g}")
        return measured[ratio].training.total

    ratio = largest_fitting(measure, weigh, usable, of_base.training.total)
    if ratio is None:
        least = measured[min(measured)].training
        raise InputError(
            f"no emulator of this base can be trained so in {usable:,} bytes: of rank 1 everywhere it would need "
            f"{least.total:,} ({least.weights:,} for weights, {least.training_state:,} for the LoRA and its optimizer, "
            f"{least.activations:,} for activations, {least.logits:,} for logits); choose a smaller --batch-size, "
            "--sequence-length or --lora-rank, or more --memory"
        )
    return ratio, measured[ratio]


def _parts(memory: Memory) -> Parts:
    return Parts(**memory.split())


def _model(model: nn.Module, inputs: Mapping[str, Any], training: Training) -> Model:
    """What a model on meta is, and what its training takes; the model is used up."""
    held = {id(parameter): parameter for parameter in model.parameters()}.values()
    parameters, size = sum(each.numel() for each in held), sum(each.nbytes for each in held)
    return Model(parameters=parameters, size=size, training=_parts(training_memory(model, inputs, training)))


def _conditions(shape: Shape, training: Training, subject: Subject, lora_targets: Sequence[str] | None) -> Conditions:
    return Conditions(
        batch_size=shape.batch_size,
        sequence_length=shape.length,
        images=shape.images,
        image_size=list(shape.image_size),
        resolution=list(shape.resolution),
        data=str(shape.data) if shape.data is not None else None,
        dtype=str(subject.dtype).removeprefix("torch."),
        lora_rank=training.lora_rank,
        lora_targets=list(lora_targets) if lora_targets else None,
        lora_dtype=str(training.lora_dtype).removeprefix("torch."),
        gradient_checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
    )


def _adapter(model: nn.Module, training: Training) -> int:
    """Bytes of A and B of all layers that get a LoRA."""
    ends = tuple(f".{target}" for target in training.lora_targets)
    adapted = [layer for layer in all_layers(model).values() if layer.experts is None]
    sizes = [layer.out_features + layer.in_features for layer in adapted if f".{layer.name}".endswith(ends)]
    return sum(sizes) * training.lora_rank * training.lora_dtype.itemsize


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch, of denoisers those of the picture and of the text; about, for models without any."""
    names = ("input_ids", "hidden_states", "encoder_hidden_states")
    given = [inputs[name] for name in names if name in inputs] or [tree_leaves(inputs)[0]]
    return sum(tensor.shape[:2].numel() for tensor in given)


def _hidden(layers: Sequence[Layer]) -> int:
    """The width of what passes between blocks: the input that most layers have."""
    return Counter(layer.in_features for layer in layers).most_common(1)[0][0]
