"""The manifests of the three formats as strict models; `formats/*/schema.json` is generated from them.

Unknown fields are errors: a writer that needs a new one raises the format version, so an old reader says so
instead of reading half of it. Each version is a model of its own, and a later one is told by a field that it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field

import emloc_tools
from emloc_tools.records import Allocation, Library, Orientation, Side

LARGEST = 2**53 - 1  # the largest integer that every JSON reader holds exactly

Hash = Annotated[str, Field(pattern=r"^xxh3_128:[0-9a-f]{32}$")]
ShardName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors$")]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Amount = Annotated[int, Field(ge=0, le=LARGEST)]
Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """No unknown fields, no conversion between types, no change after reading."""

    # A schema of what is written requires every field, also those that a writer need not name.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_serialization_defaults_required=True
    )


class MadeBy(Strict):
    """The software and the command line that wrote the artifact. `libraries` maps a library to its version."""

    emloc_tools: Name
    libraries: dict[Name, Name]
    command: str


class BaseRecord(Strict):
    """The model that an artifact was made from: folder or Hub id as given, commit on the Hub, and model class."""

    id: Name
    revision: str | None
    architecture: Name


class DataRecord(Strict):
    """The calibration data: the file's name and hash, what was taken from it and how."""

    file: Name
    hash: Hash
    samples: Count
    tokens: Count
    max_length: Count | None
    seed: int


class CalibratedLayer(Strict):
    """Shape and identity of a linear layer that has statistics."""

    out_features: Count
    in_features: Count
    orientation: Orientation
    has_bias: bool
    weight_hash: Hash


class CalibratedStack(CalibratedLayer):
    """Shape and identity of one projection of a group of experts, whose weights are one tensor. Shapes are of each."""

    experts: Count


class StoredGram(Strict):
    """A stored matrix of second moments and the layers that it belongs to."""

    tensor: Name
    side: str
    features: Count
    tokens: Count
    layers: Annotated[list[Name], Field(min_length=1)]
    hash: Hash


class GramRecord(StoredGram):
    """Second moments of what layers read (side `input`) or of what one gives (side `output`)."""

    side: Side


class GradientRecord(StoredGram):
    """Second moments of the loss gradient g at the output of one layer, or of Wᵀg, the gradient at its input.

    `energy` is Σ‖g‖² on either side.
    """

    side: Literal["input_gradient", "output_gradient"]
    layers: Annotated[list[Name], Field(min_length=1, max_length=1)]
    energy: Magnitude


LossOfTokens = Literal["next-token", "model"]  # those that versions 2 and 3 know


class CalibrationManifest(Strict):
    """What the versions of `calibration.json` have in common."""

    format: Literal["emloc-calibration"] = "emloc-calibration"
    format_version: int
    made_by: MadeBy
    base: BaseRecord
    data: Annotated[list[DataRecord], Field(min_length=1)]
    layers: dict[Name, CalibratedLayer]
    unreached: list[Name]
    grams: Sequence[StoredGram]
    shards: Annotated[list[ShardName], Field(min_length=1)]


class CalibrationV1(CalibrationManifest):
    """`calibration.json` without gradients."""

    format_version: Literal[1] = 1
    grams: Annotated[list[GramRecord], Field(min_length=1)]


class CalibrationV2(CalibrationManifest):
    """`calibration.json` with gradients of a loss."""

    format_version: Literal[2] = 2
    grams: Annotated[
        list[Annotated[GramRecord | GradientRecord, Field(discriminator="side")]],
        Field(min_length=1),
    ]
    loss: LossOfTokens


class CalibrationV3(CalibrationManifest):
    """`calibration.json` with statistics of experts, one by one, and of gradients or not."""

    format_version: Literal[3] = 3
    experts: Annotated[dict[Name, CalibratedStack], Field(min_length=1)]
    grams: Annotated[
        list[Annotated[GramRecord | GradientRecord, Field(discriminator="side")]],
        Field(min_length=1),
    ]
    loss: LossOfTokens | None


class CalibrationV4(CalibrationManifest):
    """`calibration.json` with gradients of the squared error of outputs, of experts or not.

    `target` names the tensor of the ready inputs that the outputs are compared with.
    """

    format_version: Literal[4] = 4
    experts: dict[Name, CalibratedStack]
    grams: Annotated[
        list[Annotated[GramRecord | GradientRecord, Field(discriminator="side")]],
        Field(min_length=1),
    ]
    loss: Literal["squared-error"]
    target: Name


class CalibrationReference(Strict):
    """The calibration that an emulator was built with."""

    hash: Hash
    data: list[DataRecord]


class FactoredLayer(Strict):
    """A layer that the emulator holds as `U diag(S) Vh`, and how good that is on the calibration data.

    `relative_error` is ‖X Wᵀ − X W_Eᵀ‖ / ‖X Wᵀ‖ (without calibration ‖W − W_E‖ / ‖W‖), before rounding to the
    stored dtype. `total_energy` is ‖X Wᵀ‖² per token (without calibration ‖W‖²). Both are of weighted outputs where the
    emulator is weighted.
    """

    out_features: Count
    in_features: Count
    orientation: Orientation
    rank: Count
    weight_hash: Hash
    relative_error: Magnitude
    total_energy: Magnitude
    energetic: Amount
    floored: Amount


class FactoredExpert(Strict):
    """How good the factors of one expert are. `tokens` were routed to it in calibration; with none they are an SVD."""

    tokens: Amount
    relative_error: Magnitude
    total_energy: Magnitude
    energetic: Amount
    floored: Amount


class FactoredStack(Strict):
    """One projection of a group of experts, held as `U[e] diag(S[e]) Vh[e]` of one rank; shapes are of each expert."""

    out_features: Count
    in_features: Count
    orientation: Orientation
    rank: Count
    weight_hash: Hash
    experts: Annotated[list[FactoredExpert], Field(min_length=1)]


class WeightingRecord(Strict):
    """How the loss gradient weighted the error: `damping`, a share of its mean square, was added to every direction.

    `sensitivity` says, for every factored layer with gradients, what its weighted energy per token is worth to the
    loss: the mean squared entry of the gradient times the number of tokens.
    """

    damping: Positive
    sensitivity: dict[Name, Magnitude]


class EmulatorManifest(Strict):
    """What the versions of `emulator.json` have in common."""

    format: Literal["emloc-emulator"] = "emloc-emulator"
    format_version: int
    made_by: MadeBy
    base: BaseRecord
    calibration: CalibrationReference | None
    allocation: Allocation | Literal["given"]
    eigen_dtype: Literal["float32", "float64"]
    parameters: Count
    base_parameters: Count
    layers: dict[Name, FactoredLayer]
    tensors: dict[Name, Hash]
    ignored_tensors: list[str]


class EmulatorV1(EmulatorManifest):
    """`emulator.json` of an emulator whose error is that of the outputs as they are."""

    format_version: Literal[1] = 1
    layers: Annotated[dict[Name, FactoredLayer], Field(min_length=1)]


class EmulatorV2(EmulatorManifest):
    """`emulator.json` of an emulator whose error is weighted by the loss gradient."""

    format_version: Literal[2] = 2
    calibration: CalibrationReference
    layers: Annotated[dict[Name, FactoredLayer], Field(min_length=1)]
    weighting: WeightingRecord


class EmulatorV3(EmulatorManifest):
    """`emulator.json` of an emulator with factored experts, weighted or not."""

    format_version: Literal[3] = 3
    experts: Annotated[dict[Name, FactoredStack], Field(min_length=1)]
    weighting: WeightingRecord | None


class EmulatorV4(EmulatorManifest):
    """`emulator.json` of an emulator that another `library` than transformers loads, weighted or not."""

    format_version: Literal[4] = 4
    layers: Annotated[dict[Name, FactoredLayer], Field(min_length=1)]
    library: Literal["diffusers"]
    weighting: WeightingRecord | None


class EmulatorV5(EmulatorManifest):
    """`emulator.json` of an emulator whose base's class is code of its own; with factored experts, weighted, or not.

    `code` are the base's Python files, with the hashes of the files.
    """

    format_version: Literal[5] = 5
    code: Annotated[dict[Name, Hash], Field(min_length=1)]
    experts: dict[Name, FactoredStack]
    weighting: WeightingRecord | None


class CorrectedLayer(Strict):
    """What the correction D did to one LoRA pair.

    `directions` is the rank of the trained A; `clamped` columns of D were scaled down; `delta_norm` is ‖D‖ and
    `update_norm` the size ‖s B'‖ of what was trained.
    """

    rank: Count
    scaling: Positive
    directions: Amount
    clamped: Amount
    delta_norm: Magnitude
    update_norm: Magnitude


class Candidate(Strict):
    """What the base lost per token of the held-out samples with one LoRA: `adapter` with every B times `scale`.

    `trained` is the LoRA as it was trained, `none` the base by itself. `standard_error` is that of `loss`; the other
    two are those of its difference from the loss with no LoRA and with the corrected one at scale 1, over the same
    samples.
    """

    adapter: Literal["none", "trained", "corrected"]
    scale: Magnitude
    loss: Magnitude
    standard_error: Magnitude
    standard_error_to_none: Magnitude
    standard_error_to_corrected: Magnitude


class Selection(Strict):
    """How a LoRA was chosen by held-out loss. `chosen` is the place of the stored one in `candidates`.

    `data` counts the tokens that were predicted, and the samples that hold any.
    """

    data: DataRecord
    candidates: Annotated[list[Candidate], Field(min_length=1)]
    chosen: Amount


class AdapterManifest(Strict):
    """What the versions of `emloc.json` have in common."""

    format: Literal["emloc-adapter"] = "emloc-adapter"
    format_version: int
    made_by: MadeBy
    base: BaseRecord
    emulator: Hash
    trained_adapter: Hash
    clamp: Positive | None
    layers: dict[Name, CorrectedLayer]
    unchanged: list[str]
    tensors: dict[Name, Hash]


class AdapterV1(AdapterManifest):
    """`emloc.json` of a corrected adapter."""

    format_version: Literal[1] = 1


class AdapterV2(AdapterManifest):
    """`emloc.json` of an adapter that was chosen by held-out loss, corrected or not."""

    format_version: Literal[2] = 2
    selection: Selection


class AdapterV3(AdapterManifest):
    """`emloc.json` of a corrected LoRA in the file of diffusers; `component` is the part of the pipeline it is for."""

    format_version: Literal[3] = 3
    component: Name


class Refinement(Strict):
    """Steps that a corrected LoRA was trained on the base itself.

    `adapter` is the hash of the LoRA before. `data` counts the samples that were used. `losses` has one entry for each
    step: the mean loss of the step's samples before it.
    """

    adapter: Hash
    data: DataRecord
    samples_per_step: Count
    step_size: Positive
    losses: Annotated[list[Magnitude], Field(min_length=1)]


class AdapterV4(AdapterManifest):
    """`emloc.json` of a corrected LoRA that was refined on the base, in the files of PEFT or of diffusers.

    All but `made_by`, `base`, `tensors` and `refinements` is that of the LoRA before.
    """

    format_version: Literal[4] = 4
    selection: Selection | None
    component: Name | None
    refinements: Annotated[list[Refinement], Field(min_length=1)]


def made_by(command: str, library: Library = "transformers") -> MadeBy:
    """The versions at work and the command line, for a manifest. No time: equal inputs give equal files.

    `library` is the one that the base is a model of.
    """
    return MadeBy(
        emloc_tools=emloc_tools.__version__,
        libraries={name: version(name) for name in dict.fromkeys(("torch", "transformers", library))},
        command=command,
    )


def manifest_dict(manifest: BaseModel) -> dict[str, Any]:
    """The JSON object of a manifest, fields in their declared order."""
    return manifest.model_dump(mode="json")


def file_hash(path: Path) -> str:
    """`xxh3_128:` and 32 hex digits over a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"xxh3_128:{digest.hexdigest()}"
