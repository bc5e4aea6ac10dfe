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
from tests.experts.conftest import MAX_LENGTH, Case
from tests.experts.families import FAMILIES, UNREACHED
from tests.stages.reference import close_to, principal, read_json, read_tensors, tensor_hash

RATIO = 0.5


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request: pytest.FixtureRequest, case_of: Callable[[str], Case], tmp_path_factory: Any) -> tuple[Case, Path]:
    """A case and its emulator, unweighted, all layers at one ratio."""
    case, output = case_of(request.param), tmp_path_factory.mktemp("built") / "emulator"
    options: dict[str, Any] = {"weighting": "none", "allocation": "uniform"}
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=RATIO, output=output, **options)
    return case, output


def product(tensors: dict[str, torch.Tensor], stack: str) -> torch.Tensor:
    """W_E (experts, out, in) of a stack, float64."""
    U, S, Vh = (tensors[f"{stack}_{part}"].double() for part in ("U", "S", "Vh"))
    return torch.einsum("eok,ek,eki->eoi", U, S, Vh)


def logits(model: Any, case: Case) -> torch.Tensor:
    """Of one sample."""
    ids = torch.tensor([pico.token_ids(case.data, case.base, MAX_LENGTH)[2]])
    with torch.no_grad():
        result: torch.Tensor = model.eval()(ids).logits
    return result


def densify(case: Case, folder: Path, **options: Any) -> Any:
    """The base in memory with W_E of every stack and layer in its weights: an independent reference."""
    model = getattr(transformers, FAMILIES[case.family].cls).from_pretrained(case.base, **options)
    tensors, ranks = read_tensors(folder), read_json(folder / "config.json")["emloc"]["ranks"]
    with torch.no_grad():
        for name in ranks:
            if name in case.W:
                W = product(tensors, name)
                model.get_parameter(name).copy_(W.mT if FAMILIES[case.family].transposed else W)
            else:
                U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
                model.get_parameter(f"{name}.weight").copy_((U * S) @ Vh)
    return model


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
            assert expert["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-3)  # √ of float32's epsilon
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


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_it_follows_the_installed_experts_implementations(
    built: tuple[Case, Path], implementation: str, tmp_path: Path
) -> None:
    case, folder = built
    auto = transformers.AutoModelForCausalLM
    options = {"dtype": torch.bfloat16, "experts_implementation": implementation}
    model = auto.from_pretrained(folder, trust_remote_code=True, **options)
    assert model.config._experts_implementation == implementation
    expected = densify(case, folder)
    assert close_to(logits(model, case), logits(expected, case)) < 0.1  # bfloat16, and a token routed otherwise


@pytest.mark.parametrize(("rank", "grouped"), [(8, True), (9, False)])
def test_grouped_products_run_where_their_shapes_allow_it(
    case_of: Callable[[str], Case], rank: int, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls = case_of("mixtral"), []
    product_of = torch.nn.functional.grouped_mm

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return product_of(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counting)
    ranks = {stack: rank for stack in case.W if ".1." in stack}  # the first block's experts stay dense
    build_emulator(base=str(case.base), ranks=ranks, output=tmp_path / "emulator", dtype="bfloat16")
    auto, options = transformers.AutoModelForCausalLM, {"dtype": torch.bfloat16, "trust_remote_code": True}
    found = {}
    for implementation in ("grouped_mm", "eager"):
        model = auto.from_pretrained(tmp_path / "emulator", experts_implementation=implementation, **options)
        experts = model.model.layers[1].mlp.experts
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_(True)
        routed = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [2, 1], [1, 0]])  # expert 3 has no token
        calls.clear()
        y = experts(x, routed, torch.full((6, 2), 0.5))
        assert len(calls) == (4 if grouped and implementation == "grouped_mm" else 0)
        y.float().square().sum().backward()
        found[implementation] = y.detach(), x.grad
    for one, other in zip(*found.values(), strict=True):
        assert close_to(one, other) < 0.02  # of bfloat16
    assert float(found["eager"][1].norm()) > 0


def test_a_stock_class_does_not_load_it(built: tuple[Case, Path], tmp_path: Path) -> None:
    case, _ = built
    build_emulator(base=str(case.base), ratio=RATIO, targets=r"mlp\.experts", output=tmp_path / "experts")
    assert read_json(tmp_path / "experts" / "emulator.json")["layers"] == {}
    for folder in (built[1], tmp_path / "experts"):
        with pytest.raises(RuntimeError, match="mismatch"):
            getattr(transformers, FAMILIES[case.family].cls).from_pretrained(folder)


def test_transformers_4_is_refused_with_a_line_that_says_so(
    built: tuple[Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = built
    build_emulator(base=str(case.base), ratio=RATIO, targets="q_proj|q_b_proj", output=tmp_path / "dense")
    dense = shutil.copytree(tmp_path / "dense", tmp_path / "copy")  # another name, so that its code is loaded anew
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, trust_remote_code=True)
    module = __import__("sys").modules[type(loaded).__module__]
    monkeypatch.setattr(module.transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"as transformers 5 does, and this is transformers 4\.57\.6"):
        type(loaded)(loaded.config)
    # Dense experts have the names of transformers 5 too, unless the checkpoint holds them fused.
    text = (dense / "modeling_emloc.py").read_text()
    assert ("        require_transformers_5()\n" in text) == (not FAMILIES[case.family].fused_on_disk)


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
            assert mine["relative_error"] == pytest.approx(theirs["relative_error"], rel=1e-3)
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
