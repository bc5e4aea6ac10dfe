"""calibrate keeps the second moments of every expert, of the tokens that were routed to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from emloc_tools.errors import InputError
from emloc_tools.files.calibration import Calibration
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.merge_calibration import merge_calibration
from tests import pico
from tests.experts.conftest import MAX_LENGTH, Case
from tests.experts.families import FAMILIES, UNREACHED
from tests.stages.reference import close_to, read_grams, read_json, tensor_hash

ROUNDING = 3e-5  # of a float32 forward against float64, relative to the Gram's norm


def data_grams(folder: Path) -> dict[str, tuple[str, int, torch.Tensor]]:
    """Side, tokens and Gram of everything in a calibration without gradients, by the tests' own reader."""
    return {name: (side, tokens, G) for name, (side, tokens, G, _) in read_grams(folder).items()}


@pytest.fixture(scope="module", params=list(FAMILIES))
def plain(request: pytest.FixtureRequest, case_of: Callable[[str], Case], tmp_path_factory: Any) -> tuple[Case, Path]:
    """A case, and a calibration of it without gradients, one sample at a time."""
    case, output = case_of(request.param), tmp_path_factory.mktemp("plain") / "calibration"
    calibrate(base=str(case.base), data=case.data, output=output, max_length=MAX_LENGTH, device="cpu")
    return case, output


def test_grams_are_those_of_the_tokens_that_were_routed_to_each_expert(plain: tuple[Case, Path]) -> None:
    case, folder = plain
    grams = data_grams(folder)
    experts = {name: found for name, found in grams.items() if ".experts." in name}
    assert experts.keys() == case.seen.keys()
    for name, (side, tokens, G) in experts.items():
        X, Y = case.seen[name].inputs, case.seen[name].outputs
        assert tokens == len(X)
        assert side == ("output" if Y.shape[1] < X.shape[1] else "input")
        rows = Y if side == "output" else X
        assert close_to(G, rows.T @ rows) < ROUNDING
    # Control: experts of one stack differ by more than that.
    stack = next(name for name in case.W if name.endswith("down_proj"))
    first, second = (experts[f"{stack}.{number}"][2] for number in (0, 1))
    assert close_to(first, second) > 100 * ROUNDING


def test_padding_and_gradients_change_no_gram_of_the_data(plain: tuple[Case, Path]) -> None:
    case, folder = plain
    alone, lengths = data_grams(folder), {len(i) for i in pico.token_ids(case.data, case.base, MAX_LENGTH)}
    assert len(lengths) > 1, "without different lengths nothing is padded"
    calibration = Calibration(case.calibration)
    assert set(calibration.reached) == set(alone)
    for name, (side, tokens, G) in alone.items():
        gram = calibration.gram(name)
        assert (gram.side, gram.tokens) == (side, tokens)
        assert close_to(gram.matrix, G) < ROUNDING
    calibration.close()


def test_every_weight_is_read_once_and_twice_with_gradients(plain: tuple[Case, Path], tmp_path: Path) -> None:
    case, _ = plain
    stored = sum(path.stat().st_size for path in case.base.glob("*.safetensors"))
    again = calibrate(base=str(case.base), data=case.data, output=tmp_path / "c", max_length=MAX_LENGTH, device="cpu")
    assert stored * 0.9 < again.bytes_read <= stored
    assert again.bytes_read < case.result.bytes_read <= 2 * again.bytes_read


def test_the_manifest_records_stacks_with_the_hash_of_the_whole_weight(plain: tuple[Case, Path]) -> None:
    case, folder = plain
    manifest = read_json(folder / "calibration.json")
    assert (manifest["format_version"], manifest["loss"]) == (3, None)
    assert manifest["experts"].keys() == case.W.keys()
    assert not [name for name in manifest["layers"] if ".experts." in name]
    for name, record in manifest["experts"].items():
        experts, out, into = case.W[name].shape
        assert (record["experts"], record["out_features"], record["in_features"]) == (experts, out, into)
        assert record["orientation"] == ("conv1d" if FAMILIES[case.family].transposed else "linear")
        assert record["weight_hash"] == tensor_hash(case.model.get_parameter(name).detach())


def gradients_in_memory(case: Case) -> dict[str, tuple[int, float, torch.Tensor]]:
    """Of every matrix of an expert: tokens, Σ‖g‖² and Σ g gᵀ of the gradient of the summed next-token loss, float64.

    The gradient of a bias that is zero and belongs to one token alone is g itself.
    """
    model = copy.deepcopy(case.model).double()
    model.set_experts_implementation("eager")
    gate = FAMILIES[case.family].gate
    found: dict[str, list[torch.Tensor]] = {}

    def replace(name: str, module: Any) -> None:
        up, down = case.W[f"{name}.gate_up_proj"], case.W[f"{name}.down_proj"]

        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(hidden)
            for t, e, k in ((t, int(index[t, k]), k) for t in range(len(hidden)) for k in range(index.shape[1])):
                probes = [torch.zeros(W.shape[1], dtype=torch.float64, requires_grad=True) for W in (up, down)]
                y = up[e] @ hidden[t] + probes[0]
                z = gate(y + module.gate_up_proj_bias[e] if case.family == "gpt-oss" else y)
                out = down[e] @ z + probes[1]
                out = out + module.down_proj_bias[e] if case.family == "gpt-oss" else out
                total = total.index_add(0, torch.tensor([t]), (weights[t, k] * out)[None])
                for key, probe in zip(("gate_up_proj", "down_proj"), probes, strict=True):
                    found.setdefault(f"{name}.{key}.{e}", []).append(probe)
            return total

        module.forward = forward

    for name, module in model.named_modules():
        if f"{name}.gate_up_proj" in case.W:
            replace(name, module)
    for sample in pico.token_ids(case.data, case.base, MAX_LENGTH):
        ids = torch.tensor([sample])
        logits = model(input_ids=ids).logits[0, :-1]
        F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    moments = {}
    for name, probes in found.items():
        g = torch.stack([probe.grad if probe.grad is not None else torch.zeros_like(probe) for probe in probes])
        moments[name] = (len(g), float((g**2).sum()), g.T @ g)
    return moments


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_gradients_are_those_at_the_output_of_each_expert(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    expected = gradients_in_memory(case)
    calibration = Calibration(case.calibration)
    found = {name for name in calibration.gradient_layers if ".experts." in name}
    assert found == expected.keys()
    for name in found:
        gradient = calibration.gradient(name)
        assert gradient is not None
        tokens, energy, G = expected[name]
        assert gradient.tokens == tokens
        assert gradient.energy == pytest.approx(energy, rel=1e-3)
        stack, _, number = name.rpartition(".")
        W = case.W[stack][int(number)]
        assert gradient.side == ("input" if W.shape[0] > W.shape[1] else "output")
        assert close_to(gradient.matrix, W.T @ G @ W if gradient.side == "input" else G) < 1e-3
    calibration.close()


def test_an_expert_that_no_token_is_routed_to_is_named(case_of: Callable[[str], Case]) -> None:
    case = case_of("gpt-oss")
    expected = [f"{stack}.{UNREACHED}" for stack in case.W]
    assert case.result.unreached == expected
    assert read_json(case.calibration / "calibration.json")["unreached"] == expected
    assert case_of("mixtral").result.unreached == []  # control


def test_calibrations_of_experts_add_up(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("gpt-oss")
    lines = case.data.read_text().splitlines(keepends=True)
    parts = []
    for number, half in enumerate((lines[:1], lines[1:])):
        (tmp_path / f"{number}.jsonl").write_text("".join(half))
        parts.append(tmp_path / f"part-{number}")
        calibrate(
            base=str(case.base),
            data=tmp_path / f"{number}.jsonl",
            output=parts[-1],
            max_length=MAX_LENGTH,
            device="cpu",
        )
    merge_calibration(parts=parts, output=tmp_path / "merged")
    merged, (first, second) = data_grams(tmp_path / "merged"), (data_grams(part) for part in parts)
    assert merged.keys() == first.keys() | second.keys()
    for name, (_, tokens, G) in merged.items():
        found = [part[name] for part in (first, second) if name in part]
        assert tokens == sum(one[1] for one in found)
        assert close_to(G, sum(one[2] for one in found)) < 1e-6  # type: ignore[arg-type]
    assert read_json(tmp_path / "merged" / "calibration.json")["unreached"] == case.result.unreached


def test_experts_are_left_out_and_chosen_by_name(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("mixtral")
    options: dict[str, Any] = {"base": str(case.base), "data": case.data, "max_length": 8, "device": "cpu"}
    calibrate(**options, exclude="experts", output=tmp_path / "dense")
    calibrate(**options, targets=r"1\.mlp\.experts\.down_proj", output=tmp_path / "one")
    assert read_json(tmp_path / "dense" / "calibration.json")["format_version"] == 1
    one = read_json(tmp_path / "one" / "calibration.json")
    assert (list(one["experts"]), one["layers"]) == (["model.layers.1.mlp.experts.down_proj"], {})
    with pytest.raises(InputError, match="matches no linear layer"):
        calibrate(**options, targets=r"experts\.w1", output=tmp_path / "none")
