"""build-emulator: factors are the PCA of the layers' outputs, everything else is the base's, and results are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emloc_tools import load_emulator
from emloc_tools.errors import InputError, MismatchError, NumericalError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from tests import pico
from tests.stages.conftest import EXCLUDED, Case
from tests.stages.reference import (
    bytes_hash,
    close_to,
    contents,
    linears,
    principal,
    read_json,
    read_tensors,
    tensor_hash,
    weight_of,
)

FAMILIES = ["llama", "gpt2", "bert", "gemma3", "qwen3-moe"]
ROUNDING = 1e-4  # float32 Grams and factors; an eigenvector moves by the Gram's rounding over the gap of eigenvalues


def product(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """W_E of a layer, float64."""
    U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
    return (U * S) @ Vh


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_the_principal_components_of_the_outputs(
    case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = case_of(family)
    build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.5, output=tmp_path / "emulator")
    tensors, records = read_tensors(tmp_path / "emulator"), read_json(tmp_path / "emulator" / "emulator.json")["layers"]
    assert records.keys() == case.moments.keys()
    for name, module in linears(case.model).items():
        W, seen, record = weight_of(module), case.moments[name], records[name]
        rank = int(0.5 * W.numel() / sum(W.shape))
        W_E, energies = principal(W, seen.outputs, rank)
        assert record["rank"] == rank
        U, S = tensors[f"{name}.U"].double(), tensors[f"{name}.S"].double()
        assert close_to(product(tensors, name), W_E) < ROUNDING
        assert close_to(S, (energies[:rank] / seen.tokens).sqrt()) < ROUNDING
        assert close_to(U.T @ U, torch.eye(rank)) < 1e-5
        error = float((energies[rank:].sum() / energies.sum()).sqrt())
        assert record["relative_error"] == pytest.approx(error, rel=1e-4)
        assert record["total_energy"] == pytest.approx(float(energies.sum()) / seen.tokens, rel=1e-5)


def test_the_reported_error_is_that_of_the_outputs(llama: Case, tmp_path: Path) -> None:
    build_emulator(base=str(llama.base), calibration=llama.calibration, ratio=0.4, output=tmp_path / "emulator")
    tensors, records = read_tensors(tmp_path / "emulator"), read_json(tmp_path / "emulator" / "emulator.json")["layers"]
    for name, module in linears(llama.model).items():
        W = weight_of(module)
        difference, inputs = W - product(tensors, name), llama.moments[name].inputs
        squared = (difference @ inputs * difference).sum() / (W @ inputs * W).sum()
        assert records[name]["relative_error"] == pytest.approx(float(squared.sqrt()), rel=1e-3)


def test_without_calibration_every_layer_is_its_truncated_svd_and_is_marked_so(llama: Case, tmp_path: Path) -> None:
    build_emulator(base=str(llama.base), ratio=0.5, output=tmp_path / "plain")
    build_emulator(base=str(llama.base), calibration=llama.calibration, ratio=0.5, output=tmp_path / "calibrated")
    tensors, manifest = read_tensors(tmp_path / "plain"), read_json(tmp_path / "plain" / "emulator.json")
    assert manifest["calibration"] is None
    calibrated = read_tensors(tmp_path / "calibrated")
    for name, module in linears(llama.model).items():
        W, rank = weight_of(module), manifest["layers"][name]["rank"]
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W_E = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert close_to(product(tensors, name), W_E) < ROUNDING
        assert close_to(product(calibrated, name), W_E) > 0.01
        assert manifest["layers"][name]["relative_error"] == pytest.approx(close_to(W_E, W), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_rank_the_emulator_computes_what_the_base_does(
    case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = case_of(family)
    ids = torch.tensor([pico.token_ids(case.data, case.base, 20)[0]])
    logits = case.model(ids).logits
    full = {name: min(module.weight.shape) for name, module in linears(case.model).items()}
    half = {name: rank // 2 for name, rank in full.items()}
    errors = {}
    for name, ranks in (("full", full), ("half", half)):
        build_emulator(base=str(case.base), calibration=case.calibration, ranks=ranks, output=tmp_path / name)
        errors[name] = close_to(load_emulator(tmp_path / name).eval()(ids).logits.detach(), logits.detach())
    assert errors["full"] < 1e-4
    assert errors["half"] > 1e-2
    assert read_json(tmp_path / "full" / "emulator.json")["allocation"] == "given"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_all_other_tensors_are_the_base_s_byte_for_byte(
    case_of: Callable[[str], Case], family: str, tmp_path: Path
) -> None:
    case = case_of(family)
    build_emulator(base=str(case.base), ratio=0.5, exclude=EXCLUDED.get(family), output=tmp_path / "emulator")
    tensors, manifest = read_tensors(tmp_path / "emulator"), read_json(tmp_path / "emulator" / "emulator.json")
    assert {name: tensor_hash(tensor) for name, tensor in tensors.items()} == manifest["tensors"]
    parts = {f"{name}.{part}" for name in manifest["layers"] for part in ("U", "S", "Vh")}
    guard = {name for name in tensors if name.endswith(".weight") and tensors[name].shape == (1,)}
    assert len(guard) == 1
    dense = case.model.state_dict()
    dense = {name: dense[name] for name in dense if name.removesuffix(".weight") not in manifest["layers"]}
    tied = set(case.model.all_tied_weights_keys)
    assert tensors.keys() - parts - guard == dense.keys() - tied
    for name in dense.keys() - tied:
        assert tensor_hash(tensors[name]) == tensor_hash(dense[name])


def test_the_manifest_tells_what_the_emulator_was_made_from(llama: Case, tmp_path: Path) -> None:
    written = build_emulator(
        base=str(llama.base),
        calibration=llama.calibration,
        ratio=0.5,
        output=tmp_path / "emulator",
        command="build it",
    )
    manifest = read_json(tmp_path / "emulator" / "emulator.json")
    calibrated = read_json(llama.calibration / "calibration.json")
    assert manifest["made_by"]["command"] == "build it"
    assert manifest["base"] == calibrated["base"]
    hash_of_file = bytes_hash(llama.calibration / "calibration.json")
    assert manifest["calibration"] == {"hash": hash_of_file, "data": calibrated["data"]}
    for name, module in linears(llama.model).items():
        assert manifest["layers"][name]["weight_hash"] == tensor_hash(module.weight)
    assert manifest["base_parameters"] == sum(parameter.numel() for parameter in llama.model.parameters())
    values = sum(tensor.numel() for tensor in read_tensors(tmp_path / "emulator").values())
    assert manifest["parameters"] == values - 1  # the guard is no parameter
    assert written.nbytes == sum(tensor.nbytes for tensor in read_tensors(tmp_path / "emulator").values())


def test_targets_and_exclude_choose_the_layers(llama: Case, tmp_path: Path) -> None:
    build_emulator(
        base=str(llama.base),
        calibration=llama.calibration,
        ratio=0.5,
        targets="mlp",
        exclude=r"layers\.0",
        output=tmp_path / "emulator",
    )
    expected = {name for name in llama.moments if "mlp" in name and "layers.0" not in name}
    assert read_json(tmp_path / "emulator" / "emulator.json")["layers"].keys() == expected


def test_dtype_is_that_of_the_factors_and_of_the_configuration(llama: Case, tmp_path: Path) -> None:
    build_emulator(base=str(llama.base), ratio=0.5, dtype="bfloat16", output=tmp_path / "emulator")
    manifest, tensors = read_json(tmp_path / "emulator" / "emulator.json"), read_tensors(tmp_path / "emulator")
    for name in manifest["layers"]:
        assert {tensors[f"{name}.{part}"].dtype for part in ("U", "S", "Vh")} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert load_emulator(tmp_path / "emulator", dtype="auto").dtype == torch.bfloat16


def test_a_sharded_emulator_holds_the_same_tensors(llama: Case, tmp_path: Path) -> None:
    for name, limit in (("whole", 10**9), ("sharded", 20_000)):
        build_emulator(base=str(llama.base), ratio=0.5, max_shard_size=limit, output=tmp_path / name)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    whole, sharded = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    index = read_json(tmp_path / "sharded" / "model.safetensors.index.json")
    assert index["weight_map"].keys() == whole.keys()
    largest = max(tensor.nbytes for tensor in whole.values())
    for shard in shards:
        names = [name for name, file in index["weight_map"].items() if file == shard.name]
        assert sum(whole[name].nbytes for name in names) <= max(20_000, largest)
    ids = torch.tensor([[5, 6, 7]])
    logits = [load_emulator(tmp_path / name).eval()(ids).logits for name in ("whole", "sharded")]
    assert torch.equal(*logits)


def test_building_gives_the_same_bytes_again(llama: Case, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_emulator(base=str(llama.base), calibration=llama.calibration, ratio=0.5, output=tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_only_the_command_differs_between_runs_with_different_commands(llama: Case, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_emulator(base=str(llama.base), ratio=0.5, output=tmp_path / name, command=name)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["emulator.json"]
    manifests = [read_json(tmp_path / name / "emulator.json") for name in ("a", "b")]
    assert [manifest["made_by"].pop("command") for manifest in manifests] == ["a", "b"]
    assert manifests[0] == manifests[1]


def test_a_calibration_of_other_weights_is_refused(llama: Case, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", seed=1)
    with pytest.raises(MismatchError, match=r"model\.layers\.0\..* is not the weight that was calibrated"):
        build_emulator(
            base=str(tmp_path / "base"), calibration=llama.calibration, ratio=0.5, output=tmp_path / "emulator"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_calibration_of_another_architecture_is_refused(
    llama: Case, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"calibration in .* was made from .*; its layer .* is not in"):
        build_emulator(
            base=str(case_of("gpt2").base), calibration=llama.calibration, ratio=0.5, output=tmp_path / "emulator"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ranks": {"model.layers.9.mlp.up_proj": 4}},
            r"names model\.layers\.9\.mlp\.up_proj, which is none of the 21",
        ),
        ({"ranks": {"model.layers.0.mlp.up_proj": 33}}, r"rank 33, which is outside 1 to 32"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 0}}, r"rank 0, which is outside 1 to 32"),
        ({"ranks": {"model.layers.0.mlp.up_proj": 4}, "ratio": 0.5}, r"ranks= already sets the size"),
        ({"ranks": {}}, r"ranks= is empty"),
        ({"ratio": 0.9999, "targets": "mlp"}, r"no layer would become smaller"),
        ({"ratio": 0.9999, "targets": "mlp", "allocation": "adaptive"}, r"no layer would become smaller"),
    ],
)
def test_sizes_that_make_no_emulator_are_refused(
    llama: Case, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_emulator(base=str(llama.base), output=tmp_path / "emulator", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_shares_its_weight_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "llama-tied")
    with pytest.raises(UnsupportedError, match=r"lm_head shares its weight .*--exclude"):
        build_emulator(base=str(tmp_path / "base"), ratio=0.5, targets=".", output=tmp_path / "emulator")


def test_factors_beyond_float16_are_refused_and_name_the_layer(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path / "base")
    model.state_dict()["model.layers.1.mlp.up_proj.weight"].mul_(1e6)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: .*--dtype float32"):
        build_emulator(base=str(tmp_path / "base"), ratio=0.5, dtype="float16", output=tmp_path / "emulator")
    assert not (tmp_path / "emulator").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_an_interrupted_build_leaves_nothing(
    llama: Case, tmp_path: Path, error: type[BaseException], allocation: Any
) -> None:
    seen = []

    def stop(step: object) -> None:
        seen.append(step)
        if len(seen) == 5:
            raise error("stop")

    with pytest.raises(error):
        build_emulator(
            base=str(llama.base), ratio=0.5, allocation=allocation, output=tmp_path / "emulator", progress=stop
        )
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_keeps_what_it_was_to_replace(llama: Case, tmp_path: Path) -> None:
    build_emulator(base=str(llama.base), ratio=0.5, output=tmp_path / "emulator")
    before = contents(tmp_path)

    def stop(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_emulator(base=str(llama.base), ratio=0.2, output=tmp_path / "emulator", overwrite=True, progress=stop)
    assert contents(tmp_path) == before
