"""Bases as they lie on a model hub, emulators of them, and runs of plain scripts in the trainers' environments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import pico
from tests.external.environments import HERE, ROOT, Environment

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "bert")
TARGETS = {"gpt2": ["c_attn", "c_fc"], "bert": ["query", "intermediate.dense"]}
ROPE_THETA = 500.0  # not the default of any version, so that a version which does not read it computes otherwise
RATIO = 0.5
INPUT_IDS = [[1, 40, 9, 77, 200, 31, 150, 8, 99, 64, 3, 250]]
# emloc-tools, and what it needs beside torch and what transformers and PEFT bring.
FOREIGN = ("emloc_tools", "greenlet", "xxhash", "pytest")


@dataclass(frozen=True)
class Case:
    """A base of one family and the emulators made of it: in one file, in shards, and without the guard."""

    name: str
    base: Path
    emulator: Path
    sharded: Path
    unguarded: Path
    data: Path

    @property
    def masked(self) -> bool:
        """Whether the model fills in masked tokens instead of predicting the next."""
        return self.name == "bert"

    def job(self) -> dict[str, Any]:
        """What the scripts need to know."""
        folders = ("base", "emulator", "sharded", "unguarded", "data")
        return {
            "name": self.name,
            "auto": "AutoModelForMaskedLM" if self.masked else "AutoModelForCausalLM",
            "auto_peft": "AutoPeftModel" if self.masked else "AutoPeftModelForCausalLM",
            "stock": pico.CLASSES[self.name],
            "targets": TARGETS.get(self.name, ["q_proj", "up_proj"]),
            "input_ids": INPUT_IDS,
            **{folder: str(getattr(self, folder)) for folder in folders},
        }

    def reference_logits(self, *, dense_emulator: bool) -> torch.Tensor:
        """What a stock class computes in float64: the base, or the base with every factored weight U diag(S) Vh."""
        model = getattr(transformers, pico.CLASSES[self.name]).from_pretrained(self.base, dtype=torch.float64)
        stored = load_file(self.emulator / "model.safetensors")
        for name in factored_layers(self.emulator) if dense_emulator else ():
            U, S, Vh = (stored[f"{name}.{factor}"].double() for factor in ("U", "S", "Vh"))
            model.get_submodule(name).weight.data = oriented(self.name, U @ torch.diag(S) @ Vh)
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=torch.tensor(INPUT_IDS)).logits
        return logits


def make_case(family: str, folder: Path) -> Case:
    """Make a base and its emulators by the stages. Folders of different families have the same last name."""
    from emloc_tools.stages.build_emulator import build_emulator
    from emloc_tools.stages.calibrate import calibrate

    case = Case(family, *(folder / name for name in ("base", "emulator", "sharded", "unguarded", "train.jsonl")))
    saved = folder / "saved"
    pico.save_model(saved, family)
    shutil.copytree(saved, case.base)
    as_on_the_hub(case.base)
    as_transformers_5_saves(saved)
    pico.save_texts(case.data)
    calibration = folder / "calibration"
    calibrate(base=str(case.base), data=case.data, output=calibration, device="cpu", max_length=32, batch_size=2)
    common: dict[str, Any] = {"calibration": calibration, "ratio": RATIO}
    build_emulator(**common, base=str(case.base), output=case.emulator)
    # The same base in other words: the emulator must say what both versions understand.
    build_emulator(**common, base=str(saved), output=case.sharded, max_shard_size=20_000)
    shutil.copytree(case.emulator, case.unguarded)
    tensors = load_file(case.unguarded / "model.safetensors")
    guards = [name for name in tensors if name.removesuffix(".weight") in factored_layers(case.emulator)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in guards}
    save_file(kept, case.unguarded / "model.safetensors", metadata={"format": "pt"})
    return case


def as_on_the_hub(base: Path) -> None:
    """Name things as transformers 4 does, and so nearly every published model. Both versions read these names."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    if config.pop("rope_parameters", None):
        config["rope_theta"] = ROPE_THETA
    tokenizer = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (base / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def as_transformers_5_saves(base: Path) -> None:
    """The same rotary settings as the hub's, under the name that only transformers 5 reads."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = ROPE_THETA
        assert "rope_theta" not in config
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def factored_layers(emulator: Path) -> Collection[str]:
    """The layers that config.json says are low-rank."""
    config = json.loads((emulator / "config.json").read_text(encoding="utf-8"))
    return config["emloc"]["ranks"]  # type: ignore[no-any-return]


def oriented(family: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight `(out, in)` as the model stores it: GPT-2's Conv1D stores `(in, out)`. And back."""
    return weight.T.contiguous() if family == "gpt2" else weight


def without_one_tensor(adapter: Path, copy: Path) -> Path:
    """A copy of an adapter that lacks one tensor."""
    shutil.copytree(adapter, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    return copy


def train_script(folder: Path) -> Path:
    """A copy of the demo's training script, away from the package."""
    return Path(shutil.copy(ROOT / "emloc_tools" / "demo" / "train_lora.py", folder))


def run_in_both(script: str, jobs: dict[str, dict[str, Any]]) -> None:
    """Run a script in the old and the new environment at the same time; the tests' environment variables stay out.

    Raises RuntimeError with the end of its output if it fails, and leaves no process behind.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    logs = {name: Path(job["output"]) / f"{script}.log" for name, job in jobs.items()}
    try:
        for name, job in jobs.items():
            path = logs[name].with_suffix(".json")
            path.write_text(json.dumps(job), encoding="utf-8")
            command = [str(Environment(name).python), "-I", str(HERE / "scripts" / f"{script}.py"), str(path)]
            variables = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            variables["HF_HOME"] = str(path.parent / "hf")
            with logs[name].open("wb") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=path.parent, env=variables)
        for name, process in running.items():
            if process.wait():
                tail = logs[name].read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{script}.py failed in the {name} environment:\n{tail}")
    finally:
        for process in running.values():
            process.kill()
            process.wait()
