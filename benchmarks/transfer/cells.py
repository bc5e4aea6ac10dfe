"""One cell of the bench: a base, bed, seed and ratio; every way to get a LoRA for the base, scored on held-out text.

Emulators, corrections and scores come from the stages, adapters from the plain trainer that the demo ships.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.transfer import baselines
from benchmarks.transfer.beds import BEDS
from emloc_tools.demo import train_lora
from emloc_tools.files.emulator import Emulator
from emloc_tools.linalg.allocate import adaptive_ranks
from emloc_tools.stages import build_choices, refinement
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.merge import merge
from emloc_tools.stages.refine import SAMPLES as SAMPLES_PER_STEP
from emloc_tools.stages.refine import refine

LENGTH = 160  # tokens of a sample
BATCH = 8  # samples of a training step
# For batches of 64 samples, in units of the bed's own learning rate: on far 2, on near 8 were the best of 1, 2, 4 and 8
# on the shipped base (seed 0); the skill was not tuned.
LARGE_BATCH = {"far": 2, "near": 8, "skill": 4}
RATIOS = (0.1, 0.25, 0.5)
SAMPLES = 64  # for calibration
# What `build_emulator` is asked for. The first four are options of ours, the last two show each half of "gradient".
EMULATORS: dict[str, dict[str, Any]] = {
    "plain SVD": {"calibration": None},
    "paper": {"weighting": "none", "allocation": "uniform"},
    "adaptive": {"weighting": "none", "allocation": "adaptive"},
    "gradient": {"weighting": "gradient", "allocation": "adaptive"},
    "gradient weighting alone": {"weighting": "gradient", "allocation": "uniform"},
    "gradient ranks alone": {"weighting": "none", "ranks of": "gradient"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "gradient at damping 0.01": {"weighting": "gradient", "allocation": "adaptive", "damping": 0.01},
    "gradient at damping 0.2": {"weighting": "gradient", "allocation": "adaptive", "damping": 0.2},
    "gradient without floor": {"weighting": "gradient", "allocation": "adaptive", "floor": 0.0},
    "gradient at floor 0.7": {"weighting": "gradient", "allocation": "adaptive", "floor": 0.7},
}
# What can be done with the LoRA of an emulator, beside the correction with its usual clamp.
USES = {"uses of paper": "paper", "uses of gradient": "gradient"}
# Corrected LoRAs that are trained some more on the base itself.
REFINED = {"refined paper": "paper", "refined gradient": "gradient"}
REFINEMENTS = (4, 8)  # steps
STEP_SIZES = {"step sizes of gradient": "gradient"}  # other settings of the 4 steps
ALONE = "steps on the base alone"  # controls: what the base gives without an emulator
STAND_INS = ("layers dropped", "magnitudes pruned", "smaller model")
CLAMPS = {"clamp 1": 1.0, "no clamp": None}
INTERPOLATIONS = (0.25, 0.5)
KINDS = (*EMULATORS, *ABLATIONS, *USES, *REFINED, *STEP_SIZES, ALONE, *STAND_INS)


@dataclass(frozen=True)
class Cell:
    """What is trained and scored in one go; a stand-in of one kind at one ratio, or the base itself (ratio None)."""

    base: str
    bed: str
    seed: int
    kind: str
    ratio: float | None

    @property
    def name(self) -> str:
        """Unique, and fit for a folder."""
        size = "" if self.ratio is None else f"-{self.ratio:g}"
        return f"{self.base}-{self.bed}-{self.seed}-{self.kind.replace(' ', '_')}{size}"


def cells(base: str, bed: str, seed: int, kinds: tuple[str, ...], ratios: tuple[float, ...]) -> Iterator[Cell]:
    """All cells of a group, in an order in which later ones find what they need of earlier ones."""
    yield Cell(base, bed, seed, "base", None)
    if ALONE in kinds:
        yield Cell(base, bed, seed, ALONE, None)
    for ratio in ratios:
        for kind in (kind for kind in kinds if kind != ALONE):
            if kind != "smaller model" or base == "shipped":  # a quarter of an hour of training for each
                yield Cell(base, bed, seed, kind, ratio)


def falling(step: int, steps: int) -> float:
    """The usual schedule, from the full rate at the first step to almost none at the last."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


class Group:
    """The cells of one base, bed and seed: they share a calibration."""

    def __init__(self, base: Path, bed: str, seed: int, data: Path, work: Path, steps: int) -> None:
        self._base, self._name, self._bed, self._seed, self._steps = base, bed, BEDS[bed], seed, steps
        self._data, self._train, self._held_out = data, data / "train.jsonl", data / "heldout.jsonl"
        self._work = work
        work.mkdir(parents=True, exist_ok=True)

    def run(self, cell: Cell) -> list[dict[str, Any]]:
        """The scores of a cell, one per model and adapter."""
        if cell.kind == "base":
            adapter = self._trained(self._base, "lora-on-base")
            return self._scores({"LoRA on the base": adapter}, zero=True)
        if cell.kind == ALONE:
            return self._alone()
        if cell.kind in {**REFINED, **STEP_SIZES}:
            return self._refined(cell)
        if cell.kind == "smaller model":
            return self._of_smaller_model(cell)
        if cell.kind in STAND_INS:
            return self._of_stand_in(cell)
        if cell.kind in USES:
            return self._uses(cell)
        return self._of_emulator(cell)

    def _of_emulator(self, cell: Cell) -> list[dict[str, Any]]:
        emulator, lora, corrected = (self._work / f"{cell.name}-{part}" for part in ("emulator", "lora", "corrected"))
        self._build(cell, emulator)
        self._trained(emulator, lora.name, trust=True)
        correct(emulator=emulator, adapter=lora, base=str(self._base), output=corrected, overwrite=True)
        scores = self._scores({"uncorrected": lora, "corrected": corrected})
        for result in evaluate(emulator=emulator, adapters=[lora], **self._evaluation()):
            variant = "emulator" if result.adapter is None else "emulator with LoRA"
            scores.append(self._score(variant, result))
        for folder in (lora, corrected):
            shutil.rmtree(folder)
        return scores

    def _uses(self, cell: Cell) -> list[dict[str, Any]]:
        """One emulator and LoRA, and what else can be made of them for the base."""
        emulator, lora, other = (self._work / f"{cell.name}-{part}" for part in ("emulator", "lora", "other"))
        self._build(cell, emulator)
        self._trained(emulator, lora.name, trust=True)
        pair: Any = {"emulator": emulator, "adapter": lora, "base": str(self._base), "output": other, "overwrite": True}
        scores = []
        for name, clamp in CLAMPS.items():
            correct(**pair, clamp=clamp)
            scores += self._scores({name: other})
        text = {**self._evaluation(), "data": self._data / "validation.jsonl"}
        result = correct(**pair, select=True, **text)
        assert result.heldout is not None
        assert result.heldout.winner is not None
        winner = result.heldout.winner
        chosen = self._scores({} if result.output is None else {"selected": other}, zero=result.output is None)
        scores.append({**chosen[0], "variant": "selected", "chosen": f"{winner.adapter} x {winner.scale:g}"})
        shutil.rmtree(other)
        for T in INTERPOLATIONS:
            merge(**pair, interpolate=T, dtype="float32")
            result_of_merged = evaluate(base=str(other), **self._evaluation())[0]
            scores.append(self._score(f"interpolated {T:g}", result_of_merged))
            shutil.rmtree(other)
        shutil.rmtree(lora)
        return scores

    def _refined(self, cell: Cell) -> list[dict[str, Any]]:
        """One emulator and LoRA, corrected, and refined by several numbers of steps."""
        emulator, lora, corrected = (self._work / f"{cell.name}-{part}" for part in ("emulator", "lora", "corrected"))
        self._build(cell, emulator)
        self._trained(emulator, lora.name, trust=True)
        correct(emulator=emulator, adapter=lora, base=str(self._base), output=corrected, overwrite=True)
        adapters = {}
        before: dict[str, Any] = {"base": str(self._base), "adapter": corrected, "data": self._train, "overwrite": True}
        reading: dict[str, Any] = {"max_length": LENGTH, "batch_size": BATCH, "seed": self._seed, "dtype": "float32"}
        for name, options in self._refinements(cell).items():
            adapters[name] = self._work / f"{cell.name}-{name.replace(' ', '_')}"
            # The schedule is no option of the stage: this bench is where it is shown to matter.
            schedule = options.pop("schedule", refinement.rate)
            with mock.patch.object(refinement, "rate", schedule):
                refine(output=adapters[name], **options, **before, **reading)
        scores = self._scores(adapters)
        for folder in (lora, corrected, *adapters.values()):
            shutil.rmtree(folder)
        return scores

    def _refinements(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """What `refine` is asked for, by the name of the variant."""
        if cell.kind in REFINED:
            at_full_length: dict[str, dict[str, Any]] = {"2 steps of 0.2": {"steps": 2, "step_size": 0.2}}
            return at_full_length | {f"{steps} steps": {"steps": steps} for steps in REFINEMENTS}
        sizes: dict[str, dict[str, Any]] = {f"4 steps of {n:g}": {"steps": 4, "step_size": n} for n in (0.1, 0.4)}
        few: dict[str, dict[str, Any]] = {"1 step": {"steps": 1}, "2 steps": {"steps": 2}}
        return {**few, **sizes, "4 steps, the first at full length": {"steps": 4, "schedule": falling}}

    def _alone(self) -> list[dict[str, Any]]:
        """LoRAs that saw the base alone: with as many samples as a refined one, and with its last steps only."""
        steps, samples = REFINEMENTS[-1], SAMPLES_PER_STEP
        small = {"--steps": self._steps + steps * samples // BATCH}
        large = {
            "--steps": steps,
            "--batch-size": samples,
            "--learning-rate": self._bed.learning_rate * LARGE_BATCH[self._name],
        }
        adapters = {
            "as many samples": self._trained(self._base, "many", options=small),
            f"{steps} large batches alone": self._trained(self._base, "large", options=large),
        }
        scores = self._scores(adapters)
        for folder in adapters.values():
            shutil.rmtree(folder)
        return scores

    def _of_smaller_model(self, cell: Cell) -> list[dict[str, Any]]:
        """A model of the stand-in's size, trained on the base's own text, is used as it is: nothing is moved over."""
        assert cell.ratio is not None
        folder = self._work.parent.parent / "bases" / f"smaller-{cell.ratio:g}"
        if not (folder / "README.md").exists():
            baselines.train_smaller(self._base, cell.ratio, folder)
        lora = self._trained(folder, f"{cell.name}-lora")
        result = evaluate(base=str(folder), adapters=[lora], **self._evaluation())[1]
        shutil.rmtree(lora)
        return [self._score("with LoRA", result)]

    def _of_stand_in(self, cell: Cell) -> list[dict[str, Any]]:
        model, lora = self._work / f"{cell.name}-model", self._work / f"{cell.name}-lora"
        shutil.rmtree(model, ignore_errors=True)
        assert cell.ratio is not None
        kept: list[int] | None = None
        if cell.kind == "layers dropped":
            kept = baselines.drop_layers(self._base, cell.ratio, model)
        else:
            baselines.prune(self._base, cell.ratio, model)
        self._trained(model, lora.name)
        adapter = lora
        if kept is not None:
            adapter = self._work / f"{cell.name}-renumbered"
            shutil.rmtree(adapter, ignore_errors=True)
            baselines.renumber_adapter(lora, kept, adapter)
        scores = self._scores({"uncorrected": adapter})
        for folder in {model, lora, adapter}:
            shutil.rmtree(folder)
        return scores

    def _build(self, cell: Cell, emulator: Path) -> None:
        options = dict({**EMULATORS, **ABLATIONS}[{**USES, **REFINED, **STEP_SIZES}.get(cell.kind, cell.kind)])
        floor = options.pop("floor", None)
        calibration = options.pop("calibration", self._calibration())
        other = options.pop("ranks of", None)
        size: Mapping[str, Any] = {"ratio": cell.ratio}
        if other is not None:
            of = Cell(cell.base, cell.bed, cell.seed, other, cell.ratio)
            weighted = self._work / f"{of.name}-ranks"
            if not weighted.exists():
                options_of = {**EMULATORS[other], "calibration": self._calibration()}
                build_emulator(base=str(self._base), ratio=cell.ratio, output=weighted, **options_of)
            with contextlib.closing(Emulator(weighted)) as opened:
                size = {"ranks": {name: layer.rank for name, layer in opened.layers.items()}}
        # The floor is no option of the stage: this bench is where it is shown not to matter.
        allocate = functools.partial(adaptive_ranks, floor=floor) if floor is not None else adaptive_ranks
        with mock.patch.object(build_choices, "adaptive_ranks", allocate):
            build_emulator(
                base=str(self._base), calibration=calibration, output=emulator, overwrite=True, **size, **options
            )

    def _calibration(self) -> Path:
        folder = self._work / "calibration"
        if not folder.exists():
            calibrate(
                base=str(self._base),
                data=self._train,
                samples=SAMPLES,
                max_length=LENGTH,
                seed=self._seed,
                gradients=True,
                dtype="float32",
                output=folder,
            )
        return folder

    def _trained(
        self, model: Path, name: str, *, trust: bool = False, options: Mapping[str, float] | None = None
    ) -> Path:
        output = self._work / name
        shutil.rmtree(output, ignore_errors=True)
        arguments = ["--model", model, "--data", self._train, "--output", output, "--max-length", LENGTH]
        own = {
            "--steps": self._steps,
            "--learning-rate": self._bed.learning_rate,
            "--batch-size": BATCH,
            **(options or {}),
        }
        arguments += ["--seed", self._seed, *(part for option in own.items() for part in option)]
        train_lora.main([*map(str, arguments), *(["--trust-remote-code"] if trust else [])])
        return output

    def _scores(self, adapters: Mapping[str, Path], *, zero: bool = False) -> list[dict[str, Any]]:
        """The base with each adapter on the held-out text, and without one if asked for."""
        names = {str(path): name for name, path in adapters.items()}
        results = evaluate(base=str(self._base), adapters=list(adapters.values()), **self._evaluation())
        scored = [result for result in results if zero or result.adapter is not None]
        return [self._score("zero-shot" if r.adapter is None else names[r.adapter], r) for r in scored]

    def _score(self, variant: str, result: Any) -> dict[str, Any]:
        exact = {"exact": result.exact} if self._bed.has_answers else {}
        return {"variant": variant, "loss": result.loss, "accuracy": result.accuracy, **exact}

    def _evaluation(self) -> dict[str, Any]:
        return {"data": self._held_out, "max_length": LENGTH, "batch_size": 8, "dtype": "float32"}
