"""inspect: what it says of a folder is what the folder's own files say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from emloc_tools.errors import FormatError, InputError
from emloc_tools.files.adapter import Adapter
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.export import export
from emloc_tools.stages.inspect import inspect
from emloc_tools.stages.merge import merge
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import pairs
from tests.stages.gradients import with_gradients
from tests.stages.reference import bytes_hash, read_grams, read_json, read_tensors

GOLDEN = Path(__file__).parent.parent.parent / "formats" / "adapter" / "golden"


def test_a_calibration(run: Run) -> None:
    found, manifest = inspect(run.calibration), read_json(run.calibration / "calibration.json")
    assert found.kind == "calibration"
    assert found.facts == {
        "base": str(run.base),
        "architecture": "LlamaForCausalLM",
        "data": manifest["data"],
        "layers": 21,
        "grams": len(read_tensors(run.calibration)),
        "gram_bytes": sum(tensor.nbytes for tensor in read_tensors(run.calibration).values()),
        "unreached_layers": 0,
        "made_by": manifest["made_by"]["command"],
    }
    grams, weights = read_grams(run.calibration), run.model.state_dict()
    assert {row["layer"]: (row["statistics"], row["tokens"]) for row in found.layers} == {
        name: gram[:2] for name, gram in grams.items()
    }
    for row in found.layers:
        assert [row["out"], row["in"]] == list(weights[f"{row['layer']}.weight"].shape)


def test_a_calibration_with_gradients(run: Run, tmp_path: Path) -> None:
    gradients = {f"model.layers.{n}.mlp.up_proj": torch.randn(9, 48) for n in (0, 2)}
    with_gradients(run.calibration, tmp_path / "calibration", gradients)
    plain, found = inspect(run.calibration), inspect(tmp_path / "calibration")
    assert (found.facts["layers_with_gradients"], found.facts["loss"]) == (2, "next-token")
    assert found.facts["grams"] == plain.facts["grams"] + 2
    assert found.facts["gram_bytes"] == plain.facts["gram_bytes"] + 2 * 4 * 48 * 49 // 2
    for row, before in zip(found.layers, plain.layers, strict=True):
        assert row.pop("gradients", None) == ("output" if row["layer"] in gradients else None)
        assert row == before


def test_an_emulator(run: Run) -> None:
    found, manifest = inspect(run.emulator), read_json(run.emulator / "emulator.json")
    tensors = read_tensors(run.emulator)
    assert found.kind == "emulator"
    assert found.facts == {
        "base": str(run.base),
        "architecture": "LlamaForCausalLM",
        "parameters": sum(tensor.numel() for tensor in tensors.values()) - 1,
        "base_parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "allocation": "uniform",
        "calibration": bytes_hash(run.calibration / "calibration.json"),
        "data": read_json(run.calibration / "calibration.json")["data"],
        "factored_layers": 21,
        "dense_parameters": 2 * 260 * 32 + 7 * 32,
        "dense_by_reason": {"embedding": 260 * 32, "norm": 7 * 32, "output head": 260 * 32},
        "made_by": manifest["made_by"]["command"],
    }
    for row in found.layers:
        U, Vh = tensors[f"{row['layer']}.U"], tensors[f"{row['layer']}.Vh"]
        assert (row["out"], row["in"], row["rank"]) == (U.shape[0], Vh.shape[1], U.shape[1])
        assert row["relative_error"] == manifest["layers"][row["layer"]]["relative_error"]


def test_an_emulator_without_calibration(run: Run, tmp_path: Path) -> None:
    build_emulator(base=str(run.base), ratio=0.5, output=tmp_path / "emulator")
    facts = inspect(tmp_path / "emulator").facts
    assert (facts["calibration"], facts["data"]) == (None, [])


def test_a_trained_adapter(run: Run) -> None:
    found = inspect(run.adapter)
    assert found.kind == "adapter"
    parameters = sum(tensor.numel() for tensor in read_tensors(run.adapter).values())
    facts = {"base": str(run.emulator), "lora_pairs": 21, "other_tensors": 0, "parameters": parameters}
    assert found.facts == {"corrected": False, **facts}
    ranks = {name: A.shape[0] for name, (A, _) in pairs(run.adapter).items()}
    assert {row["layer"]: row["rank"] for row in found.layers} == ranks
    assert all(row.keys() == {"layer", "rank", "scaling"} and row["scaling"] == 1.5 for row in found.layers)


def test_a_corrected_adapter(run: Run) -> None:
    found, manifest = inspect(run.corrected), read_json(run.corrected / "emloc.json")
    assert found.kind == "adapter"
    assert found.facts == {
        "corrected": True,
        "base": str(run.base),
        "lora_pairs": 21,
        "other_tensors": 0,
        "parameters": sum(tensor.numel() for tensor in read_tensors(run.corrected).values()),
        "architecture": "LlamaForCausalLM",
        "clamp": 3.0,
        "made_by": manifest["made_by"]["command"],
    }
    for row in found.layers:
        record = manifest["layers"][row["layer"]]
        assert row["correction"] == record["delta_norm"] / record["update_norm"]
        assert (row["clamped"], row["directions"]) == (record["clamped"], record["directions"])
    assert found.made_from == {"emulator": manifest["emulator"], "trained adapter": manifest["trained_adapter"]}
    assert inspect(run.adapter).hash == manifest["trained_adapter"]
    assert inspect(run.emulator).hash == manifest["emulator"]
    assert inspect(run.emulator).made_from == {"calibration": inspect(run.calibration).hash}


def test_a_merged_model(run: Run, tmp_path: Path) -> None:
    merge(base=str(run.base), adapter=run.corrected, output=tmp_path / "merged")
    found, note = inspect(tmp_path / "merged"), read_json(tmp_path / "merged" / "emloc-merge.json")
    assert found.kind == "merged model"
    assert found.facts == {
        "base": str(run.base),
        "architecture": "LlamaForCausalLM",
        "adapter": Adapter(run.corrected).hash,
        "corrected": True,
        "interpolated": None,
        "merged_tensors": 21,
        "replaced_tensors": 0,
        "checked": note["checked"],
        "made_by": note["made_by"]["command"],
    }
    (tmp_path / "merged" / "emloc-merge.json").write_text("{}")
    with pytest.raises(InputError, match="is not what merge writes"):
        inspect(tmp_path / "merged")


def test_a_dense_export(run: Run, tmp_path: Path) -> None:
    export(emulator=run.emulator, output=tmp_path / "dense")
    found, note = inspect(tmp_path / "dense"), read_json(tmp_path / "dense" / "emloc-export.json")
    assert found.kind == "dense emulator"
    assert found.facts == {
        "base": str(run.base),
        "architecture": "LlamaForCausalLM",
        "emulator": bytes_hash(run.emulator / "emulator.json"),
        "multiplied_tensors": 21,
        "made_by": note["made_by"]["command"],
    }
    (tmp_path / "dense" / "emloc-export.json").write_text("{}")
    with pytest.raises(InputError, match="is not what export writes"):
        inspect(tmp_path / "dense")


def test_an_adapter_that_was_chosen_says_which_candidate_it_is(run: Run, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    shutil.copytree(GOLDEN / "ok-chosen-scaled", chosen)
    selection = read_json(chosen / "emloc.json")["selection"]
    candidate = selection["candidates"][selection["chosen"]]
    facts = inspect(chosen).facts
    assert facts["chosen"] == f"{candidate['adapter']} at scale {candidate['scale']:g}"
    assert facts["held_out_loss"] == candidate["loss"]


def test_an_adapter_that_was_refined_says_how_far() -> None:
    """Two steps and then one more; `ok-chosen-scaled`, from which it comes, had none."""
    facts = inspect(GOLDEN / "ok-refined-again").facts
    assert (facts["refinement_steps"], facts["loss_before_steps"]) == (3, "2.5000, 1.2500, 1.0000")
    assert "refinement_steps" not in inspect(GOLDEN / "ok-chosen-scaled").facts


def test_other_tensors_of_an_adapter_are_counted(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, modules_to_save=["lm_head"])
    assert inspect(tmp_path / "adapter").facts["other_tensors"] == 1


def test_anything_else_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r" holds none of calibration\.json, emulator\.json, adapter_config\.json"):
        inspect(run.base.parent)
    with pytest.raises(InputError, match="does not exist; inspect takes a base"):
        inspect(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"train\.jsonl is a file; inspect takes a base"):
        inspect(run.data)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "emulator.json").write_text("{}")
    with pytest.raises(FormatError, match="emulator"):
        inspect(tmp_path)
