"""calibrate: the Grams in the folder are those that hooks on the model in memory see, and its manifest is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from emloc_tools.errors import InputError, NumericalError, UnsupportedError
from emloc_tools.stages.calibrate import calibrate
from tests import pico
from tests.stages.conftest import EXCLUDED, MAX_LENGTH, Case
from tests.stages.reference import bytes_hash, close_to, moments, read_grams, read_json, tensor_hash

FAMILIES = ["llama", "gpt2", "bert", "gemma3", "qwen3-moe"]
ROUNDING = 2e-5  # of a float32 forward and float32 sums over some hundred tokens, relative to the Gram's norm


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_are_those_of_the_model_in_memory(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    grams = read_grams(case.calibration)
    assert grams.keys() == case.moments.keys()
    for name, (side, tokens, G, _) in grams.items():
        expected = case.moments[name]
        assert tokens == expected.tokens
        assert close_to(G, expected.inputs if side == "input" else expected.outputs) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_no_trace_in_larger_batches(case_of: Callable[[str], Case], family: str, tmp_path: Path) -> None:
    case = case_of(family)
    calibrate(
        base=str(case.base),
        data=case.data,
        output=tmp_path / "batched",
        max_length=MAX_LENGTH,
        exclude=EXCLUDED.get(family),
        batch_size=3,
        device="cpu",
    )
    lengths = {len(ids) for ids in pico.token_ids(case.data, case.base, MAX_LENGTH)}
    assert len(lengths) > 1, "without different lengths nothing is padded"
    alone, batched = read_grams(case.calibration), read_grams(tmp_path / "batched")
    for name, (side, tokens, G, tensor) in batched.items():
        assert (side, tokens, tensor) == (alone[name][0], alone[name][1], alone[name][3])
        assert close_to(G, alone[name][2]) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_read_one_tensor_share_a_gram_and_the_smaller_side_is_kept(
    case_of: Callable[[str], Case], family: str
) -> None:
    case = case_of(family)
    readers: dict[int, list[str]] = {}
    for name, seen in case.moments.items():
        readers.setdefault(seen.reads, []).append(name)
    expected = {}
    for names in readers.values():
        outputs = sum(case.moments[name].outputs.numel() for name in names)
        if outputs < case.moments[names[0]].inputs.numel():
            expected |= {name: ("output", frozenset([name])) for name in names}
        else:
            expected |= {name: ("input", frozenset(names)) for name in names}
    records = read_json(case.calibration / "calibration.json")["grams"]
    found = {layer: (r["side"], frozenset(r["layers"])) for r in records for layer in r["layers"]}
    assert found == expected
    assert len(records) == case.result.grams


def test_both_sides_and_shared_inputs_occur_in_these_families(case_of: Callable[[str], Case]) -> None:
    for family in ("llama", "gpt2", "bert"):
        records = read_json(case_of(family).calibration / "calibration.json")["grams"]
        assert {record["side"] for record in records} == {"input", "output"}
    shared = {len(record["layers"]) for record in read_json(case_of("llama").calibration / "calibration.json")["grams"]}
    assert shared == {1, 2, 3}  # down and o; gate and up; q, k and v


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_read_exactly_once(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    stored = 0
    for path in case.base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a dict
    assert case.result.bytes_read == stored


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_manifest_tells_what_the_calibration_was_made_from(case_of: Callable[[str], Case], family: str) -> None:
    case = case_of(family)
    manifest = read_json(case.calibration / "calibration.json")
    ids = pico.token_ids(case.data, case.base, MAX_LENGTH)
    assert manifest["base"] == {
        "id": str(case.base),
        "revision": None,
        "architecture": type(case.model).__name__,
    }
    assert manifest["data"] == [
        {
            "file": "train.jsonl",
            "hash": bytes_hash(case.data),
            "samples": len(ids),
            "tokens": sum(map(len, ids)),
            "max_length": MAX_LENGTH,
            "seed": 0,
        }
    ]
    assert manifest["made_by"]["command"] == "make the case"
    weights = case.model.state_dict()
    for name, layer in manifest["layers"].items():
        W = weights[f"{name}.weight"]
        assert layer["weight_hash"] == tensor_hash(W)
        shape = [layer["out_features"], layer["in_features"]]
        assert shape == list(W.shape if layer["orientation"] == "linear" else W.T.shape)
    assert case.result.tokens == manifest["data"][0]["tokens"]


def test_samples_are_chosen_by_the_seed(llama: Case, tmp_path: Path) -> None:
    hashes = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        calibrate(
            base=str(llama.base),
            data=llama.data,
            output=tmp_path / name,
            samples=3,
            seed=seed,
            max_length=MAX_LENGTH,
            device="cpu",
        )
        hashes[name] = bytes_hash(tmp_path / name / "calibration.json")
    assert hashes["a"] == hashes["b"]
    assert hashes["a"] != hashes["c"]


def test_ready_inputs_give_the_same_grams_as_their_texts(llama: Case, tmp_path: Path) -> None:
    ids = pico.token_ids(llama.data, llama.base, MAX_LENGTH)
    save_file({f"{n}/input_ids": torch.tensor([sample]) for n, sample in enumerate(ids)}, tmp_path / "in.safetensors")
    calibrate(base=str(llama.base), data=tmp_path / "in.safetensors", output=tmp_path / "ready", device="cpu")
    expected = read_grams(llama.calibration)
    for name, (_, tokens, G, _) in read_grams(tmp_path / "ready").items():
        assert tokens == expected[name][1]
        assert torch.equal(G, expected[name][2])


def test_targets_and_exclude_choose_the_layers(llama: Case, tmp_path: Path) -> None:
    calibrate(
        base=str(llama.base),
        data=llama.data,
        output=tmp_path / "some",
        samples=1,
        targets=r"mlp",
        exclude=r"layers\.1\.",
        device="cpu",
    )
    expected = {name for name in llama.moments if "mlp" in name and "layers.1." not in name}
    assert read_grams(tmp_path / "some").keys() == expected


@pytest.mark.parametrize(("family", "head"), [("llama", "lm_head"), ("bert", "cls.predictions.transform.dense")])
def test_a_head_that_is_asked_for_sees_every_token_and_no_padding(
    case_of: Callable[[str], Case], family: str, head: str, tmp_path: Path
) -> None:
    case = case_of(family)
    calibrate(
        base=str(case.base),
        data=case.data,
        output=tmp_path / "head",
        targets=f"^{head}$",
        max_length=MAX_LENGTH,
        batch_size=3,
        device="cpu",
    )
    expected = moments(case.model, pico.token_ids(case.data, case.base, MAX_LENGTH), head)[head]
    ((side, tokens, G, _),) = read_grams(tmp_path / "head").values()
    assert tokens == expected.tokens
    assert close_to(G, expected.inputs if side == "input" else expected.outputs) < ROUNDING


def test_nan_in_activations_is_refused_and_names_the_layer(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path / "base")
    weights = model.state_dict()
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38  # finite, but products with it are not
    model.save_pretrained(tmp_path / "base")
    data = pico.save_texts(tmp_path / "train.jsonl", count=1)
    with pytest.raises(NumericalError, match=r"layer model\.layers\.1\.mlp\.down_proj .*NaN or infinity"):
        calibrate(base=str(tmp_path / "base"), data=data, output=tmp_path / "calibration", device="cpu")
    assert not (tmp_path / "calibration").exists()


def test_a_layer_that_shares_its_weight_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "llama-tied")
    data = pico.save_texts(tmp_path / "train.jsonl", count=1)
    with pytest.raises(UnsupportedError, match=r"lm_head shares its weight .*--exclude"):
        calibrate(base=str(tmp_path / "base"), data=data, output=tmp_path / "c", targets="lm_head|q_proj", device="cpu")


def test_an_output_in_the_place_of_an_input_is_refused(llama: Case, tmp_path: Path) -> None:
    data = pico.save_texts(tmp_path / "train.jsonl", count=1)
    folder = tmp_path / "calibration.json"  # a marker of ours, so that only the input can save the folder
    folder.write_text("{}")
    with pytest.raises(InputError, match=r"would replace the input .*train\.jsonl"):
        calibrate(base=str(llama.base), data=data, output=tmp_path, overwrite=True, device="cpu")
    assert data.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(llama: Case, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(step: object) -> None:
        raise error("stop")

    with pytest.raises(error):
        calibrate(base=str(llama.base), data=llama.data, output=tmp_path / "calibration", device="cpu", progress=stop)
    assert list(tmp_path.iterdir()) == []
