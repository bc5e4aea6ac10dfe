"""build-emulator by the loss gradient: against the definition in float64, from the files of the calibration alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools.errors import InputError
from emloc_tools.records import Weighting
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from tests import pico
from tests.stages.adapters import on_emulator, pairs
from tests.stages.conftest import MAX_LENGTH, Case
from tests.stages.gradients import with_gradients
from tests.stages.loss_reference import GradientMoments, gradient_moments, next_token_loss
from tests.stages.reference import (
    close_to,
    contents,
    linears,
    read_json,
    read_tensors,
    weight_of,
)

FAMILIES = ["llama", "qwen3", "gpt2", "gemma3", "qwen3-moe"]
RATIO, DAMPING = 0.4, 0.05
WEIGHTINGS: tuple[Weighting, ...] = ("none", "gradient")
DEMO = Path(__file__).parent.parent.parent / "emloc_tools" / "demo"


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """W_E of a layer, float64."""
    U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
    return (U * S) @ Vh


class Problem:
    """A layer's weighted problem, all (out, out) or (in, in) in float64: H, damped with mean diagonal 1, and XᵀX."""

    def __init__(self, W: torch.Tensor, inputs: torch.Tensor, tokens: int, gradient: GradientMoments) -> None:
        out = len(W)
        self.W, self.G = W, inputs / tokens
        self.H = gradient.outside * out / gradient.outside.trace() + DAMPING * torch.eye(out, dtype=torch.float64)
        self.H /= 1 + DAMPING
        self.sensitivity = float(gradient.outside.trace()) / (out * gradient.tokens) * tokens

    def error(self, W_E: torch.Tensor) -> float:
        """tr(H (W − W_E) XᵀX (W − W_E)ᵀ) per token."""
        difference = self.W - W_E
        return float((self.H @ difference @ self.G * difference).sum())

    def energies(self) -> torch.Tensor:
        """What the best directions carry, descending: the generalised eigenvalues of W XᵀX Wᵀ v = e H⁻¹ v."""
        values = torch.linalg.eigvals(self.H @ self.W @ self.G @ self.W.T).real
        return values.sort(descending=True).values.clamp(min=0)[: min(self.W.shape)]


def problems(case: Case) -> dict[str, Problem]:
    """The problem of every layer, from the model in memory and not from the package's files."""
    samples = pico.token_ids(case.data, case.base, MAX_LENGTH)
    gradients = gradient_moments(case.model, [next_token_loss((ids, 0)) for ids in samples])
    return {
        name: Problem(weight_of(module), case.moments[name].inputs, case.moments[name].tokens, gradients[name])
        for name, module in linears(case.model).items()
    }


def greedy(case: Case, energies: dict[str, torch.Tensor], ratio: float) -> dict[str, int]:
    """Ranks by hand: from 35% of the uniform rank, one direction at a time, the most loss energy per value first."""
    shapes = {name: weight_of(module).shape for name, module in linears(case.model).items()}
    cost = {name: sum(shape) + 1 for name, shape in shapes.items()}
    uniform = {name: int(ratio * shape.numel() / sum(shape)) for name, shape in shapes.items()}
    ranks = {name: max(1, int(0.35 * rank)) for name, rank in uniform.items()}
    left = sum((uniform[name] - ranks[name]) * cost[name] for name in ranks)
    while True:
        fitting = {
            name: float(energies[name][rank]) / cost[name]
            for name, rank in ranks.items()
            if rank < len(energies[name]) and cost[name] <= left and (rank + 1) * cost[name] < shapes[name].numel()
        }
        if not fitting:
            return ranks
        best = max(fitting, key=lambda name: fitting[name])
        ranks[best] += 1
        left -= cost[best]


def values(manifest: Any) -> int:
    """Stored values of the factors."""
    layers = manifest["layers"].values()
    return sum(layer["rank"] * (layer["out_features"] + layer["in_features"] + 1) for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_factors_have_the_least_weighted_error_and_ranks_follow_the_loss(
    weighted_case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = weighted_case_of(family)
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=RATIO, output=tmp_path / "emulator")
    build_emulator(
        base=str(case.base), calibration=case.calibration, ratio=RATIO, weighting="none", output=tmp_path / "plain"
    )
    tensors, manifest = read_tensors(tmp_path / "emulator"), read_json(tmp_path / "emulator" / "emulator.json")
    assert (manifest["format_version"], manifest["allocation"]) == (2, "adaptive")
    assert manifest["weighting"]["damping"] == DAMPING
    of_layer = problems(case)
    energies = {name: problem.energies() for name, problem in of_layer.items()}
    for name, record in manifest["layers"].items():
        problem, k = of_layer[name], record["rank"]
        total, tail = float(energies[name].sum()), float(energies[name][k:].sum())
        assert problem.error(product(tensors, name)) == pytest.approx(tail, rel=2e-3, abs=1e-6 * total)
        assert record["relative_error"] == pytest.approx((tail / total) ** 0.5, rel=1e-3, abs=1e-3)
        assert record["total_energy"] == pytest.approx(total, rel=1e-4)
        assert manifest["weighting"]["sensitivity"][name] == pytest.approx(problem.sensitivity, rel=1e-4)
    loss_energies = {name: energies[name] * of_layer[name].sensitivity for name in energies}
    expected = greedy(case, loss_energies, RATIO)
    assert {name: layer["rank"] for name, layer in manifest["layers"].items()} == expected
    plain = read_json(tmp_path / "plain" / "emulator.json")
    uniform = {name: layer["rank"] for name, layer in plain["layers"].items()}
    assert expected != uniform
    largest = max(sum(module.weight.shape) + 1 for module in linears(case.model).values())
    assert values(plain) - largest < values(manifest) <= values(plain)


def test_at_equal_ranks_the_weighted_error_is_below_that_of_unweighted_factors(weighted: Case, tmp_path: Path) -> None:
    errors = {}
    for weighting in WEIGHTINGS:
        build_emulator(
            base=str(weighted.base),
            calibration=weighted.calibration,
            ratio=RATIO,
            weighting=weighting,
            allocation="uniform",
            output=tmp_path / weighting,
        )
        tensors = read_tensors(tmp_path / weighting)
        errors[weighting] = {name: p.error(product(tensors, name)) for name, p in problems(weighted).items()}
    assert all(errors["gradient"][name] < 0.98 * errors["none"][name] for name in errors["none"])
    manifest = read_json(tmp_path / "gradient" / "emulator.json")
    uniform = read_json(tmp_path / "none" / "emulator.json")
    assert {n: layer["rank"] for n, layer in manifest["layers"].items()} == {
        n: layer["rank"] for n, layer in uniform["layers"].items()
    }
    assert (manifest["allocation"], uniform["format_version"]) == ("uniform", 1)


def test_a_given_damping_is_used_and_recorded(weighted: Case, tmp_path: Path) -> None:
    for damping in (0.05, 1e6):
        build_emulator(
            base=str(weighted.base),
            calibration=weighted.calibration,
            ratio=RATIO,
            damping=damping,
            allocation="uniform",
            output=tmp_path / str(damping),
        )
    build_emulator(base=str(weighted.base), calibration=weighted.calibration, ratio=RATIO, weighting="none",
                   output=tmp_path / "none")  # fmt: skip
    weak, strong, plain = (read_tensors(tmp_path / name) for name in ("0.05", "1000000.0", "none"))
    for name in linears(weighted.model):
        assert close_to(product(strong, name), product(plain, name)) < 1e-3, "damped away"
    assert max(close_to(product(weak, name), product(plain, name)) for name in linears(weighted.model)) > 0.05
    assert read_json(tmp_path / "1000000.0" / "emulator.json")["weighting"]["damping"] == 1e6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_weighting_gradients_leave_no_trace(
    case_of: Callable[[str], Case], weighted_case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    """All files are those of a calibration without gradients, but for that calibration's hash."""
    options: dict[str, Any] = {"base": str(case_of(family).base), "ratio": RATIO, "command": "build"}
    calibrations = {name: made(family).calibration for name, made in (("plain", case_of), ("with", weighted_case_of))}
    build_emulator(calibration=calibrations["plain"], output=tmp_path / "plain", **options)
    build_emulator(
        calibration=calibrations["with"], weighting="none", allocation="uniform", output=tmp_path / "with", **options
    )
    plain, found = contents(tmp_path / "plain"), contents(tmp_path / "with")
    assert found.keys() == plain.keys()
    assert {name for name in plain if plain[name] != found[name]} == {"emulator.json"}
    manifests = [read_json(tmp_path / name / "emulator.json") for name in ("plain", "with")]
    assert manifests[0]["calibration"].pop("hash") != manifests[1]["calibration"].pop("hash")
    assert manifests[0] == manifests[1]


def test_layers_without_gradients_keep_the_uniform_ranks_and_plain_factors(llama: Case, tmp_path: Path) -> None:
    some = {f"model.layers.{block}.self_attn.{part}_proj" for block in range(2) for part in "qo"}
    gradients = {name: (1 + 9 * ("1" in name)) * torch.randn(50, 32) for name in sorted(some)}
    folder = with_gradients(llama.calibration, tmp_path / "calibration", gradients)
    for name, calibration in (("mixed", folder), ("plain", llama.calibration)):
        build_emulator(base=str(llama.base), calibration=calibration, ratio=RATIO, output=tmp_path / name)
    mixed, plain = (read_json(tmp_path / name / "emulator.json") for name in ("mixed", "plain"))
    factors = [read_tensors(tmp_path / name) for name in ("mixed", "plain")]
    for name, layer in plain["layers"].items():
        if name not in some:
            assert mixed["layers"][name] == layer
            assert all(torch.equal(*(f[f"{name}.{part}"] for f in factors)) for part in ("U", "S", "Vh"))
    assert mixed["weighting"]["sensitivity"].keys() == some
    ranks = {name: mixed["layers"][name]["rank"] for name in some}
    assert max(ranks.values()) > plain["layers"][min(some)]["rank"] > min(ranks.values())
    assert sum(ranks.values()) == sum(plain["layers"][name]["rank"] for name in some)


def test_a_choice_of_layers_without_gradients_is_not_weighted(llama: Case, tmp_path: Path) -> None:
    folder = with_gradients(
        llama.calibration, tmp_path / "calibration", {"model.layers.0.mlp.up_proj": torch.randn(9, 48)}
    )
    options: dict[str, Any] = {"base": str(llama.base), "calibration": folder, "ratio": RATIO, "targets": "self_attn"}
    build_emulator(output=tmp_path / "emulator", **options)
    manifest = read_json(tmp_path / "emulator" / "emulator.json")
    assert (manifest["format_version"], manifest["allocation"]) == (1, "uniform")
    with pytest.raises(
        InputError, match=r"--weighting gradient needs gradients, and the calibration in .* has none of"
    ):
        build_emulator(output=tmp_path / "other", weighting="gradient", **options)


def test_a_layer_that_the_loss_does_not_mind_gets_the_least_rank(llama: Case, tmp_path: Path) -> None:
    dead, alive = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    gradients = {dead: torch.zeros(9, 32), alive: torch.randn(90, 32)}
    folder = with_gradients(llama.calibration, tmp_path / "calibration", gradients)
    build_emulator(base=str(llama.base), calibration=folder, ratio=RATIO, output=tmp_path / "emulator")
    layers = read_json(tmp_path / "emulator" / "emulator.json")["layers"]
    uniform = int(RATIO * 32 * 32 / 64)
    assert layers[dead]["rank"] == int(0.35 * uniform)
    assert layers[alive]["rank"] == min(2 * uniform - int(0.35 * uniform), 15)  # rank 16 would be larger than W
    low = read_tensors(tmp_path / "emulator")
    W, seen = weight_of(llama.model.get_submodule(dead)), llama.moments[dead]
    _, U = torch.linalg.eigh(seen.outputs)
    U = U[:, -layers[dead]["rank"] :]
    assert close_to(product(low, dead), U @ U.T @ W) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "gradient"}, r"--weighting gradient needs gradients, and the calibration in .* --gradients"),
        ({"weighting": "gradient", "calibration": None}, r"needs gradients, and there is no calibration"),
        ({"damping": 0.0}, r"--damping 0 must be above 0"),
        ({"damping": float("nan")}, r"--damping nan must be above 0"),
        ({"damping": 0.1}, r"--damping belongs to a weighting by gradients: the calibration in .* --gradients"),
        ({"damping": 0.1, "weighting": "none"}, r"--weighting none has no use for it"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 4}, "ratio": None, "allocation": "adaptive"}, "ranks= already sets"),
    ],
)
def test_options_that_contradict_are_refused(
    llama: Case, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"calibration": llama.calibration, "ratio": RATIO, **options}
    with pytest.raises(InputError, match=message):
        build_emulator(base=str(llama.base), output=tmp_path / "emulator", **given)
    assert list(tmp_path.iterdir()) == []


def test_the_paper_s_settings_give_the_paper_s_algorithm(weighted: Case, tmp_path: Path) -> None:
    """Its algorithm: a root R of XᵀX, the SVD of W R, and the inverse of R behind the truncated product."""
    build_emulator(
        base=str(weighted.base),
        calibration=weighted.calibration,
        ratio=RATIO,
        weighting="none",
        allocation="uniform",
        output=tmp_path / "emulator",
    )
    tensors = read_tensors(tmp_path / "emulator")
    for name, module in linears(weighted.model).items():
        W = weight_of(module)
        energies, Q = torch.linalg.eigh(weighted.moments[name].inputs)
        R = Q * energies.clamp(min=1e-12 * float(energies[-1])).sqrt()
        P, sigma, Vh = torch.linalg.svd(W @ R, full_matrices=False)
        k = int(RATIO * W.numel() / sum(W.shape))
        W_E = (P[:, :k] * sigma[:k]) @ Vh[:k] @ torch.linalg.inv(R)
        assert close_to(product(tensors, name), W_E) < 1e-3


def test_a_lora_on_a_weighted_emulator_is_corrected_exactly(weighted: Case, tmp_path: Path) -> None:
    build_emulator(base=str(weighted.base), calibration=weighted.calibration, ratio=RATIO, output=tmp_path / "emulator")
    pico.save_lora(tmp_path / "lora", tmp_path / "emulator")
    correct(
        emulator=tmp_path / "emulator",
        adapter=tmp_path / "lora",
        base=str(weighted.base),
        clamp=None,
        output=tmp_path / "corrected",
    )
    tensors, trained, corrected = (
        read_tensors(tmp_path / "emulator"),
        *map(pairs, (tmp_path / "lora", tmp_path / "corrected")),
    )
    for name, (A, B) in trained.items():
        W, (A2, B2) = weight_of(weighted.model.get_submodule(name)), corrected[name]
        x = A.T  # its columns span the row space
        before, after = (product(tensors, name) + 1.5 * B @ A) @ x, (W + 1.5 * B2 @ A2) @ x
        assert close_to(after, before) < 1e-5
        assert close_to((W + 1.5 * B @ A) @ x, before) > 1e-3, "the control: uncorrected"
    ids = torch.tensor([pico.token_ids(weighted.data, weighted.base, 20)[0]])
    trainable = on_emulator(tmp_path / "emulator", tmp_path / "lora").train()
    for name, parameter in trainable.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trainable(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in trainable.named_parameters() if "lora_" in name}
    assert len(gradients) == 2 * len(trained)
    assert all(gradient.norm() > 0 for gradient in gradients.values())


def test_weighting_lowers_the_emulator_s_own_loss_on_the_shipped_model(tmp_path: Path) -> None:
    """At the same size, on text that calibrated it and that the shipped model was trained for: Python's own library."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    data = pico.write_jsonl(tmp_path / "python.jsonl", [{"text": source[n * 700 :][:700]} for n in range(2, 6)])
    base = str(DEMO / "base")
    options: dict[str, Any] = {"max_length": 128, "device": "cpu"}
    calibrate(base=base, data=data, gradients=True, output=tmp_path / "calibration", **options)
    losses, sizes = {}, {}
    for weighting in WEIGHTINGS:
        written = build_emulator(
            base=base,
            calibration=tmp_path / "calibration",
            ratio=0.1,
            weighting=weighting,
            output=tmp_path / weighting,
        )
        sizes[weighting] = written.nbytes
        (score,) = evaluate(emulator=tmp_path / weighting, data=data, **options)
        losses[weighting] = score.loss
    assert sizes["gradient"] <= sizes["none"]
    assert losses["gradient"] < losses["none"] - 0.3
