"""A base whose class and configuration are code in its own folder goes through every stage, once that is trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from emloc_tools import load_emulator
from emloc_tools.errors import FormatError, InputError, UnsupportedError
from emloc_tools.files.emulator import Emulator
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.stages.merge import merge
from emloc_tools.stages.truncate import truncate
from tests import pico
from tests.stages.reference import bytes_hash, close_to, read_json, read_tensors

# A model of its own, in two files: its logits are a Llama's, doubled.
CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own-llama"
    factor = 2.0
"""
MODELING = """
from pathlib import Path

from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

Path({marker!r}).write_text("ran")

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = result.logits * self.config.factor
        return result
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
AUTO = transformers.AutoModelForCausalLM
TRUST: dict[str, Any] = {"trust_remote_code": True}


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def save_base(folder: Path) -> Path:
    """The model; its code leaves a file `ran` beside the folder when it is run."""
    pico.save_model(folder)
    edit(folder, model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(folder.parent / "ran")))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, data, a calibration, and emulators of full and of half size."""
    root = tmp_path_factory.mktemp("own")
    base, data = save_base(root / "base"), pico.save_texts(root / "data.jsonl", count=4)
    calibrate(base=str(base), data=data, output=root / "calibration", max_length=24, device="cpu", **TRUST)
    layers = read_json(root / "calibration" / "calibration.json")["layers"]
    full = {name: min(layer["out_features"], layer["in_features"]) for name, layer in layers.items()}
    options: dict[str, Any] = {"base": str(base), "calibration": root / "calibration", **TRUST}
    build_emulator(**options, ranks=full, output=root / "full")
    build_emulator(**options, ratio=0.5, output=root / "emulator")
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[5, 9, 40, 77, 13]])).logits
    return found


def test_the_emulator_runs_the_base_s_own_code_on_the_training_machine(root: Path) -> None:
    base, full = (AUTO.from_pretrained(root / name, **TRUST) for name in ("base", "full"))
    assert type(full).__name__ == "EmlocOwnForCausalLM"
    assert "OwnForCausalLM" in [cls.__name__ for cls in type(full).__mro__]
    assert close_to(logits(full), logits(base)) < 1e-4
    plain = transformers.LlamaForCausalLM.from_pretrained(root / "base", config=pico.config("llama"))
    assert close_to(logits(full) / 2, logits(plain)) < 1e-4  # control: the factor is the code's own
    with pytest.raises(ValueError, match="trust_remote_code"):
        AUTO.from_pretrained(root / "full", trust_remote_code=False)


def test_the_manifest_holds_the_hashes_of_the_code_that_was_taken_over(root: Path) -> None:
    manifest, config = read_json(root / "emulator" / "emulator.json"), read_json(root / "emulator" / "config.json")
    assert manifest["format_version"] == 5
    assert manifest["code"].keys() == {"configuration_own.py", "modeling_own.py"}
    for name, digest in manifest["code"].items():
        assert (root / "emulator" / name).read_bytes() == (root / "base" / name).read_bytes()
        assert digest == bytes_hash(root / "base" / name)
    assert config["auto_map"] == {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_emloc.EmlocOwnForCausalLM",
    }


def test_a_lora_is_corrected_and_merged_for_the_base(root: Path, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(AUTO.from_pretrained(root / "emulator", **TRUST), peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "lora")
    options: dict[str, Any] = {"base": str(root / "base"), **TRUST}
    correct(**options, emulator=root / "emulator", adapter=tmp_path / "lora", clamp=None, output=tmp_path / "corrected")
    corrected, factors = read_tensors(tmp_path / "corrected"), read_tensors(root / "emulator")
    trained, dense = read_tensors(tmp_path / "lora"), load_file(root / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    pair = {side: f"base_model.model.{name}.lora_{side}.weight" for side in "AB"}
    A, B = (trained[pair[side]].double() for side in "AB")
    x = torch.randn(5, 3, dtype=torch.float64) @ A
    U, S, Vh = (factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh"))
    wanted = x @ ((U * S) @ Vh + 2 * B @ A).T
    new = dense[f"{name}.weight"].double() + 2 * corrected[pair["B"]].double() @ corrected[pair["A"]].double()
    assert close_to(x @ new.T, wanted) < 1e-4

    merge(**options, adapter=tmp_path / "corrected", output=tmp_path / "merged")
    merged = AUTO.from_pretrained(tmp_path / "merged", **TRUST)
    on_base = peft.PeftModel.from_pretrained(AUTO.from_pretrained(root / "base", **TRUST), tmp_path / "corrected")
    assert close_to(logits(merged), logits(on_base)) < 1e-4


def test_a_truncated_emulator_keeps_the_code(root: Path, tmp_path: Path) -> None:
    truncate(emulator=root / "emulator", ratio=0.25, output=tmp_path / "small")
    small, larger = (AUTO.from_pretrained(folder, **TRUST) for folder in (tmp_path / "small", root / "emulator"))
    rank = small.model.layers[0].mlp.up_proj.rank
    assert rank < larger.model.layers[0].mlp.up_proj.rank
    assert torch.equal(small.model.layers[0].mlp.up_proj.U, larger.model.layers[0].mlp.up_proj.U[:, :rank])


def test_texts_give_a_loss_where_the_base_names_its_class_a_causal_language_model(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": root / "data.jsonl", "max_length": 24, "device": "cpu", **TRUST}
    result = calibrate(base=str(root / "base"), gradients=True, output=tmp_path / "calibration", **options)
    assert result.gradients == result.layers > 0
    (measured,) = evaluate(base=str(root / "base"), **options)
    model, total, count = AUTO.from_pretrained(root / "base", **TRUST).eval(), 0.0, 0
    for ids in pico.token_ids(root / "data.jsonl", root / "base", 24):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum())
        count += len(ids) - 1
    assert measured.loss == pytest.approx(total / count, rel=1e-5)
    named = save_base(tmp_path / "base")
    edit(named, auto_map={"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": AUTO_MAP["AutoModelForCausalLM"]})
    with pytest.raises(UnsupportedError, match="OwnForCausalLM does not predict the next token"):
        evaluate(base=str(named), **options)


@pytest.mark.parametrize(
    "command", [load_emulator, lambda path: evaluate(data=path.parent / "data.jsonl", emulator=path)]
)
def test_our_commands_never_run_the_code_of_an_emulator(root: Path, command: Callable[[Path], Any]) -> None:
    (root / "ran").unlink(missing_ok=True)
    with pytest.raises(UnsupportedError, match="model with code of its own, which is never run"):
        command(root / "emulator")
    assert not (root / "ran").exists()


def test_changed_code_is_refused_and_trust_is_needed_for_the_base(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass --trust-remote-code to run it"):
        build_emulator(base=str(root / "base"), ratio=0.5, output=tmp_path / "a")
    build_emulator(base=str(root / "base"), ratio=0.5, output=tmp_path / "emulator", **TRUST)
    with (tmp_path / "emulator" / "modeling_own.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(FormatError, match=r"code\.modeling_own\.py: is not in the folder as it was written.*rule E20"):
        Emulator(tmp_path / "emulator")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AutoModelForCausalLM": "someone/else--modeling_own.OwnForCausalLM"}, "not in the model's own folder"),
        (
            {"AutoConfig": "gone.OwnConfig"},
            "AutoConfig is 'gone.OwnConfig', code that is not in the model's own folder",
        ),
    ],
)
def test_code_that_is_elsewhere_is_refused(
    changes: dict[str, str], message: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emloc_tools.models.own_code import own_code
    from emloc_tools.models.source import Source

    base = save_base(tmp_path / "base")
    edit(base, auto_map={**AUTO_MAP, **changes})
    with pytest.raises(UnsupportedError, match=message):
        own_code(Source(str(base), None, base), "OwnForCausalLM")
    edit(base, auto_map={"AutoConfig": AUTO_MAP["AutoConfig"]})
    with pytest.raises(UnsupportedError, match="no Auto class in its auto_map gives OwnForCausalLM"):
        own_code(Source(str(base), None, base), "OwnForCausalLM")
