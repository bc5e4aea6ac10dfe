"""A DreamBooth script of diffusers, unchanged, on a pipeline whose transformer is an emulator."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from tests.external.pipelines import LAY_OUT, PROMPTS, SIDE, PipelineCase, make_pipeline_case
from tests.external.trainers import STEPS, Outcome, emloc_tools, run_beside

WEIGHTS = "pytorch_lora_weights.safetensors"
# Where nothing of emloc-tools is installed, the emulator's own file says how it is loaded.
STARTER = """import runpy
import sys

sys.path.insert(0, "light/transformer")
import modeling_emloc  # tells diffusers how an emulator is loaded

sys.path.pop(0)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OPTIONS = {
    **{"pretrained_model_name_or_path": "light", "instance_data_dir": "pictures", "instance_prompt": PROMPTS[0]},
    **{"resolution": SIDE, "max_sequence_length": 24, "train_batch_size": 2, "rank": 4, "learning_rate": "1e-2"},
    **{"lr_warmup_steps": 0, "max_train_steps": STEPS, "seed": 0, "output_dir": "lora"},
}
LOSS = re.compile(r"loss=(\d+\.?\d*)")


def dreambooth(folder: Path, script: Path, environment: Path) -> dict[str, Any]:
    """Train with the script in an environment without emloc-tools, and record the run."""
    case = make_pipeline_case(folder)
    shutil.copy(script, folder)
    (folder / "train.py").write_text(STARTER, encoding="utf-8")
    programs = environment / "bin"
    unaware = run(case, script, programs, starter=False)
    outcome = run(case, script, programs, starter=True)
    found: dict[str, Any] = {
        "page": "diffusers",
        "four_bits": False,
        "releases": releases(programs),
        "started": f"accelerate launch train.py {script.name}",
        "files": {"train.py": STARTER},
        "commands": [*LAY_OUT.splitlines(), command(script)],
        "log": [],
        "losses": [],
        "keys": None,
        "corrected": None,
        "untrusted": refusal(unaware),
    }
    losses = [float(loss) for loss in dict.fromkeys(LOSS.findall(outcome.log))]
    if outcome.status:
        return {**found, "log": outcome.log.strip().splitlines()[-3:]}
    files = ["--emulator", "emulator", "--adapter", "lora", "--base", "pipeline", "--output", "corrected"]
    found["commands"].append(emloc_tools(["correct", *files], folder))
    steps = re.findall(r"Steps: 100%[^\r\n]*loss=[^\r\n]*", outcome.log)
    return {
        **found,
        "log": steps[-1:],
        "losses": [losses[0], losses[-1]],
        "keys": keys_are_those_of_the_base(case, folder / "lora"),
        "corrected": fuses(case, folder / "corrected"),
    }


def command(script: Path) -> str:
    """What a user types."""
    options = " ".join(
        f"--{name} '{value}'" if " " in str(value) else f"--{name} {value}" for name, value in OPTIONS.items()
    )
    return f"accelerate launch train.py {script.name} {options}"


def run(case: PipelineCase, script: Path, programs: Path, *, starter: bool) -> Outcome:
    """Start it in the folder of the case."""
    files = ["train.py", script.name] if starter else [script.name]
    options = [str(part) for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    started = [str(programs / "accelerate"), "launch", *files, *options]
    return run_beside({"run": (started, case.light.parent)}, {"run": programs})["run"]


def refusal(outcome: Outcome) -> str:
    """How it ended where nobody said how an emulator is loaded."""
    found = re.search(r"Unknown quantization type, got emloc", outcome.log)
    if not outcome.status or LOSS.search(outcome.log):
        return "**trains**"
    return f"`{found[0]}`" if found else "another error"


def releases(programs: Path) -> str:
    """Of the environment."""
    names = ["diffusers", "accelerate", "peft"]
    program = f"import importlib.metadata as m; print(*(m.version(n) for n in {names}))"
    done = subprocess.run([str(programs / "python"), "-I", "-c", program], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {version}" for name, version in zip(names, done.stdout.split(), strict=True))


def keys_are_those_of_the_base(case: PipelineCase, lora: Path) -> bool:
    """Whether the base, with the same layers adapted, saves the same names and shapes."""
    pipeline = diffusers.FluxPipeline.from_pretrained(case.pipeline)
    pipeline.load_lora_weights(lora)
    state = get_peft_model_state_dict(pipeline.transformer, adapter_name=pipeline.get_active_adapters()[0])
    expected = {f"transformer.{name}": tensor.shape for name, tensor in state.items()}
    return expected == {name: tensor.shape for name, tensor in load_file(lora / WEIGHTS).items()}


def fuses(case: PipelineCase, corrected: Path) -> bool:
    """Whether the corrected LoRA loads into the base's pipeline, and changes weights once it is fused."""
    pipeline = diffusers.FluxPipeline.from_pretrained(case.pipeline)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(corrected)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.transformer.state_dict()
    changed = [name for name, weight in before.items() if not torch.equal(after[name], weight)]
    pairs = {name.split(".lora_")[0] for name in load_file(corrected / WEIGHTS)}
    return {f"transformer.{name.removesuffix('.weight')}" for name in changed} == pairs
