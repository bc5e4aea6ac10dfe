"""correct: on what the LoRA reads, base and corrected adapter compute what emulator and trained adapter did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import correct
from tests import pico
from tests.stages.adapters import changed, on, on_emulator, pairs
from tests.stages.conftest import Case
from tests.stages.reference import close_to, contents, linears, read_json, read_tensors, weight_of

ROUNDING = 1e-5  # of float32 factors and products

KINDS: dict[str, dict[str, Any]] = {
    "alpha not r": {"r": 4, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    "target list": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "target regex": {"r": 2, "target_modules": r".*layers\.[12]\.mlp\..*_proj"},
    "rank above the layer's": {"r": 20, "target_modules": ["k_proj"]},
}


BERT = {"task_type": None, "target_modules": r".*encoder\.layer\..*(query|key|value|dense)"}


@dataclass(frozen=True)
class Trained:
    """A case with an emulator and a LoRA on it."""

    case: Case
    emulator: Path
    adapter: Path

    def base(self) -> Any:
        """The base, loaded anew: PEFT changes the model that it wraps."""
        return type(self.case.model).from_pretrained(self.case.base).eval()


@pytest.fixture(scope="module")
def trained_on(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """A LoRA with the given options on the emulator of a family; emulators are built once."""
    emulators: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Trained:
        case = case_of(family)
        if family not in emulators:
            emulators[family] = tmp_path_factory.mktemp(family) / "emulator"
            build_emulator(base=str(case.base), calibration=case.calibration, ratio=0.5, output=emulators[family])
        adapter = tmp_path_factory.mktemp("lora") / "adapter"
        pico.save_lora(adapter, emulators[family], **options)
        return Trained(case, emulators[family], adapter)

    return make


@pytest.fixture(scope="module")
def trained(trained_on: Callable[..., Trained]) -> Trained:
    """A LoRA on every layer of the Llama."""
    return trained_on("llama")


def run(trained: Trained, output: Path, **options: Any) -> Any:
    """Correct a trained adapter."""
    return correct(
        emulator=trained.emulator, adapter=trained.adapter, base=str(trained.case.base), output=output, **options
    )


def emulated(trained: Trained, name: str) -> torch.Tensor:
    """W_E of a layer, float64."""
    tensors = read_tensors(trained.emulator)
    U, S, Vh = (tensors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
    return (U * S) @ Vh


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *[pytest.param("llama", options, id=kind) for kind, options in KINDS.items()],
        pytest.param("gpt2", {"fan_in_fan_out": True}, id="Conv1D"),
        pytest.param("bert", BERT, id="BERT without a task"),
        pytest.param("gemma3", {}, id="gemma3"),
        pytest.param("qwen3-moe", {"target_modules": ["q_proj", "o_proj"]}, id="MoE attention"),
    ],
)
def test_every_layer_computes_on_the_base_what_it_did_on_the_emulator(
    trained_on: Callable[..., Trained], family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trained = trained_on(family, **options)
    run(trained, tmp_path / "corrected", clamp=None)
    before = on_emulator(trained.emulator, trained.adapter).base_model.model
    after = on(trained.base(), tmp_path / "corrected").base_model.model
    uncorrected = on(trained.base(), trained.adapter).base_model.model
    for name, (A, _) in pairs(trained.adapter).items():
        x = (torch.randn(5, A.shape[0], dtype=torch.float64) @ A).float()  # in the row space of A
        with torch.no_grad():
            expected, found, without = (model.get_submodule(name)(x) for model in (before, after, uncorrected))
        assert close_to(found, expected) < 5 * ROUNDING, name
        assert close_to(without, expected) > 0.01, name


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *[pytest.param("llama", options, id=kind) for kind, options in KINDS.items()],
        pytest.param("gpt2", {"fan_in_fan_out": True}, id="Conv1D"),
        pytest.param("bert", BERT, id="BERT without a task"),
    ],
)
def test_the_merged_model_has_the_corrected_weights(
    trained_on: Callable[..., Trained], family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    trained = trained_on(family, **options)
    run(trained, tmp_path / "corrected", clamp=None)
    peft_model = on(trained.base(), tmp_path / "corrected")
    scalings = {
        name: peft_model.base_model.model.get_submodule(name).scaling["default"] for name in pairs(trained.adapter)
    }
    merged = linears(peft_model.merge_and_unload())
    for name, (A, B) in pairs(trained.adapter).items():
        W = weight_of(linears(trained.case.model)[name])
        projection = torch.linalg.pinv(A) @ A  # onto what A reads
        expected = W + scalings[name] * B @ A - (W - emulated(trained, name)) @ projection
        assert close_to(weight_of(merged[name]), expected) < ROUNDING
        assert close_to(W + scalings[name] * B @ A, expected) > 0.01


@pytest.mark.parametrize("clamp", [3.0, 0.5, 0.05])
def test_the_clamp_and_the_figures_are_those_of_the_paper(trained: Trained, tmp_path: Path, clamp: float) -> None:
    result = run(trained, tmp_path / "corrected", clamp=clamp)
    corrected = pairs(tmp_path / "corrected")
    total = 0
    for name, (A, B) in pairs(trained.adapter).items():
        W = weight_of(linears(trained.case.model)[name])
        Ua, sigma, rows = torch.linalg.svd(A, full_matrices=False)
        update = 1.5 * B @ Ua @ sigma.diag()  # s = alpha / r = 6 / 4
        D = (W - emulated(trained, name)) @ rows.T
        ratio = D.abs().mean(0) / update.abs().mean(0)
        D = D * torch.where(ratio > clamp, clamp / ratio, 1.0)
        new_A, new_B = corrected[name]
        assert close_to(new_B @ new_A, (update - D) @ rows / 1.5) < ROUNDING
        record = result.layers[name]
        assert (record.rank, record.scaling, record.directions) == (4, 1.5, 4)
        assert record.clamped == int((ratio > clamp).sum())
        assert record.delta_norm == pytest.approx(float(D.norm()), rel=1e-4)
        assert record.update_norm == pytest.approx(float(update.norm()), rel=1e-4)
        total += record.clamped
    assert (total > 0) == (clamp < 3)


def test_bfloat16_adapters_stay_bfloat16_and_are_corrected_in_float32(trained: Trained, tmp_path: Path) -> None:
    half = changed(trained.adapter, tmp_path / "half", tensor=lambda name, value: (name, value.bfloat16()))
    same = changed(half, tmp_path / "same", tensor=lambda name, value: (name, value.float()))
    for folder in (half, same):
        run(Trained(trained.case, trained.emulator, folder), tmp_path / f"corrected {folder.name}")
    rounded, exact = read_tensors(tmp_path / "corrected half"), read_tensors(tmp_path / "corrected same")
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], tensor.bfloat16())


def test_rank_names_and_configuration_stay_and_point_at_the_base(trained: Trained, tmp_path: Path) -> None:
    adapter = changed(trained.adapter, tmp_path / "adapter", made_in_the_future={"a": [1]}, revision="emulator")
    run(Trained(trained.case, trained.emulator, adapter), tmp_path / "corrected")
    expected = {
        **read_json(adapter / "adapter_config.json"),
        "base_model_name_or_path": str(trained.case.base),
        "revision": None,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    assert read_json(tmp_path / "corrected" / "adapter_config.json") == expected
    before, after = read_tensors(adapter), read_tensors(tmp_path / "corrected")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}


def test_without_a_task_type_peft_finds_the_base_by_itself(trained_on: Callable[..., Trained], tmp_path: Path) -> None:
    trained = trained_on("bert", task_type=None)
    assert "Emloc" in read_json(trained.adapter / "adapter_config.json")["auto_mapping"]["base_model_class"]
    run(trained, tmp_path / "corrected")
    mapping = read_json(tmp_path / "corrected" / "adapter_config.json")["auto_mapping"]
    assert mapping == {
        "base_model_class": "BertForMaskedLM",
        "parent_library": "transformers.models.bert.modeling_bert",
    }
    ids = torch.tensor([[5, 6, 7, 8]])
    by_itself = peft.AutoPeftModel.from_pretrained(tmp_path / "corrected").eval()
    expected = on(trained.base(), tmp_path / "corrected")
    assert torch.equal(by_itself(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_whole_modules_that_are_dense_pass_through(trained_on: Callable[..., Trained], tmp_path: Path) -> None:
    trained = trained_on("llama", modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.weight"
    adapter = changed(
        trained.adapter, tmp_path / "adapter", tensor=lambda name, value: (name, value + 1 if name == key else value)
    )
    result = run(Trained(trained.case, trained.emulator, adapter), tmp_path / "corrected")
    assert result.unchanged == [key]
    trained_head = read_tensors(adapter)[key]
    assert torch.equal(read_tensors(tmp_path / "corrected")[key], trained_head)
    merged = on(trained.base(), tmp_path / "corrected").merge_and_unload()
    assert torch.equal(merged.lm_head.weight, trained_head)


def test_pairs_on_dense_layers_pass_through(trained_on: Callable[..., Trained], tmp_path: Path) -> None:
    trained = trained_on("llama", target_modules=["q_proj", "lm_head", "embed_tokens"])
    result = run(trained, tmp_path / "corrected")
    before, after = read_tensors(trained.adapter), read_tensors(tmp_path / "corrected")
    expected = [name for name in before if "lm_head" in name or "embed_tokens" in name]
    assert sorted(expected) == result.unchanged
    assert len(expected) == 6  # two pairs, and the two whole weights that PEFT saves where embeddings are adapted
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in expected)


def test_provenance_is_recorded_beside_the_adapter(trained: Trained, tmp_path: Path) -> None:
    result = run(trained, tmp_path / "corrected", clamp=2.0, command="correct it")
    manifest = read_json(tmp_path / "corrected" / "emloc.json")
    emulator = read_json(trained.emulator / "emulator.json")
    assert manifest["base"] == emulator["base"]
    assert manifest["clamp"] == 2.0
    assert manifest["made_by"]["command"] == "correct it"
    assert manifest["layers"] == {name: layer.model_dump() for name, layer in result.layers.items()}
    assert manifest["layers"].keys() == pairs(trained.adapter).keys()


def test_a_dry_run_writes_nothing_and_reports_the_same(trained: Trained, tmp_path: Path) -> None:
    dry = run(trained, None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    wet = run(trained, tmp_path / "corrected")
    assert (dry.layers, dry.unchanged, dry.output) == (wet.layers, wet.unchanged, None)


def test_the_trained_adapter_and_the_emulator_are_left_as_they_are(trained: Trained, tmp_path: Path) -> None:
    before = contents(trained.adapter), contents(trained.emulator), contents(trained.case.base)
    run(trained, tmp_path / "corrected")
    assert (contents(trained.adapter), contents(trained.emulator), contents(trained.case.base)) == before


def test_correcting_gives_the_same_bytes_again(trained: Trained, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(trained, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_correction_leaves_nothing(trained: Trained, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(step: object) -> None:
        raise error("stop")

    with pytest.raises(error):
        run(trained, tmp_path / "corrected", progress=stop)
    assert list(tmp_path.iterdir()) == []
