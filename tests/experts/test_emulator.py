"""An emulator with factored experts: what it computes, how it is loaded, and what its manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools import load_emulator
from emloc_tools.errors import MismatchError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.inspect import inspect
from emloc_tools.stages.truncate import truncate
from tests import pico
from tests.experts.conftest import MAX_LENGTH, RATIO, Case
from tests.experts.emulators import densify, logits, product
from tests.experts.families import UNREACHED
from tests.stages.reference import close_to, principal, read_json, read_tensors, tensor_hash


def test_factors_are_the_principal_components_of_each_expert_s_outputs(built: tuple[Case, Path]) -> None:
    case, folder = built
    tensors, manifest = read_tensors(folder), read_json(folder / "emulator.json")
    assert manifest["format_version"] == 3
    assert manifest["experts"].keys() == case.W.keys()
    for stack, record in manifest["experts"].items():
        experts, out, into = case.W[stack].shape
        rank = int(RATIO * out * into / (out + into))
        assert (record["rank"], len(record["experts"])) == (rank, experts)
        assert record["weight_hash"] == tensor_hash(case.model.get_parameter(stack).detach())
        W_E = product(tensors, stack)
        for number, expert in enumerate(record["experts"]):
            seen = case.seen.get(f"{stack}.{number}")
            W, tokens = case.W[stack][number], 0 if seen is None else len(seen.inputs)
            assert expert["tokens"] == tokens
            if seen is None:  # the truncated SVD
                U, S, Vh = torch.linalg.svd(W)
                best, energies = (U[:, :rank] * S[:rank]) @ Vh[:rank], S**2
                assert close_to(W_E[number], best) < 1e-4
            else:
                best, energies = principal(W, seen.outputs.T @ seen.outputs, rank)
                assert close_to(seen.inputs @ W_E[number].T, seen.inputs @ best.T) < 2e-3
            error = float((energies[rank:].sum() / energies.sum()).sqrt())
            assert expert["relative_error"] == pytest.approx(
                error, rel=1e-3, abs=1e-3
            )  # √ of float32's epsilon, as below
            assert expert["total_energy"] == pytest.approx(float(energies.sum()) / max(1, tokens), rel=1e-3)


def test_the_emulator_computes_what_the_base_with_the_products_would(built: tuple[Case, Path]) -> None:
    case, folder = built
    expected = logits(densify(case, folder), case)
    assert close_to(logits(load_emulator(folder), case), expected) < 1e-5
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder, trust_remote_code=True)
    assert close_to(logits(theirs, case), expected) < 1e-5
    assert close_to(logits(case.model, case), expected) > 0.01  # control
    saved = {name for name in theirs.state_dict() if "experts" in name}
    stored = {name for name in read_tensors(folder) if "experts" in name and name not in case.W}
    assert {name for name in stored if ".experts." in name} <= saved


def test_at_full_rank_it_computes_what_the_base_does(built: tuple[Case, Path], tmp_path: Path) -> None:
    case, folder = built
    manifest = read_json(folder / "emulator.json")
    shapes = {**manifest["layers"], **manifest["experts"]}
    ranks = {name: min(record["out_features"], record["in_features"]) for name, record in shapes.items()}
    build_emulator(base=str(case.base), calibration=case.calibration, ranks=ranks, output=tmp_path / "full")
    assert close_to(logits(load_emulator(tmp_path / "full"), case), logits(case.model, case)) < 1e-4


def test_training_reaches_what_comes_before_the_experts(built: tuple[Case, Path]) -> None:
    case, folder = built
    ids = torch.tensor([pico.token_ids(case.data, case.base, MAX_LENGTH)[2]])
    grads = []
    for model in (densify(case, folder), load_emulator(folder)):
        model.train().requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert close_to(grads[1], grads[0]) < 1e-4
    assert float(grads[0].norm()) > 0


def test_a_truncated_emulator_is_a_prefix_with_errors_to_match(built: tuple[Case, Path], tmp_path: Path) -> None:
    case, folder = built
    truncate(emulator=folder, ratio=0.25, output=tmp_path / "small")
    options: dict[str, Any] = {"weighting": "none", "allocation": "uniform"}
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.25, output=tmp_path / "direct", **options)
    small, direct = (read_json(tmp_path / name / "emulator.json") for name in ("small", "direct"))
    larger, tensors = read_tensors(folder), read_tensors(tmp_path / "small")
    for stack, record in small["experts"].items():
        k = record["rank"]
        assert k == direct["experts"][stack]["rank"]
        assert torch.equal(tensors[f"{stack}_U"], larger[f"{stack}_U"][:, :, :k])
        assert torch.equal(tensors[f"{stack}_Vh"], larger[f"{stack}_Vh"][:, :k])
        for mine, theirs in zip(record["experts"], direct["experts"][stack]["experts"], strict=True):
            assert mine["relative_error"] == pytest.approx(theirs["relative_error"], rel=1e-3, abs=1e-3)
            assert mine["tokens"] == theirs["tokens"]
    assert (
        close_to(logits(load_emulator(tmp_path / "small"), case), logits(densify(case, tmp_path / "small"), case))
        < 1e-5
    )


def test_another_base_s_calibration_is_refused(case_of: Callable[[str], Case], tmp_path: Path) -> None:
    case = case_of("mixtral")
    other = shutil.copytree(case.base, tmp_path / "other")
    tensors = read_tensors(other)
    name = next(name for name in tensors if ".experts.1." in name)
    tensors[name][0] += 1
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"experts\.gate_up_proj is not the weight that was calibrated|down_proj"):
        build_emulator(base=str(other), calibration=case.calibration, ratio=RATIO, output=tmp_path / "emulator")


def test_inspect_shows_each_stack_and_how_many_experts_saw_no_token(
    case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of("gpt-oss")
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=RATIO, output=tmp_path / "emulator")
    rows = {row["layer"]: row for row in inspect(tmp_path / "emulator").layers}
    manifest = read_json(tmp_path / "emulator" / "emulator.json")
    for stack, record in manifest["experts"].items():
        errors = [expert["relative_error"] for expert in record["experts"]]
        assert rows[stack]["experts"] == len(errors)
        assert rows[stack]["relative_error"] == pytest.approx(max(errors))
        assert rows[stack]["without_tokens"] == 1
        assert record["experts"][UNREACHED]["tokens"] == 0
    shown = {row["layer"]: row for row in inspect(case.calibration).layers}
    assert shown[stack]["tokens"] == sum(len(seen.inputs) for name, seen in case.seen.items() if stack in name)
    assert (shown[stack]["experts"], shown[stack]["without_tokens"]) == (len(errors), 1)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("weighting", ["gradient", "none"])
def test_truncation_spends_ranks_across_stacks_as_a_build_does(
    case_of: Callable[[str], Case], family: str, weighting: Any, tmp_path: Path
) -> None:
    case = case_of(family)
    options: dict[str, Any] = {"base": str(case.base), "calibration": case.calibration, "allocation": "adaptive"}
    for name, ratio in (("large", 0.7), ("direct", 0.3)):
        build_emulator(**options, weighting=weighting, ratio=ratio, dtype="float32", output=tmp_path / name)
    truncate(emulator=tmp_path / "large", ratio=0.3, output=tmp_path / "small")
    ranks = {
        name: read_json(tmp_path / name / "config.json")["emloc"]["ranks"] for name in ("small", "direct", "large")
    }
    # The larger emulator caps what a layer can have, and rounding decides between directions of nearly equal worth.
    for name, rank in ranks["direct"].items():
        assert abs(ranks["small"][name] - rank) <= 1 or ranks["small"][name] == ranks["large"][name], name
    assert len({ranks["direct"][stack] for stack in case.W}) > 1  # control: not one rank for all
