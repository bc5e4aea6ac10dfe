"""What llama.cpp's own converter makes of LoRAs, before and after `verify --fold-scaling`.

    python -m benchmarks.llama_cpp --llama-cpp FOLDER [--release TEXT]

FOLDER is a source tree of llama.cpp, with `convert_lora_to_gguf.py` and `gguf-py`; llama-cpp-python's source package
carries one. For LoRAs of random values on the shipped base the converter is run, and what a weight gains is computed
from the file that it wrote as llama.cpp does it, `alpha / rank · B A`, and compared with what PEFT adds on the base.
Figures are the largest relative differences in the Frobenius norm over all pairs; nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

from benchmarks import record
from emloc_tools.stages.verify import verify

BASE = Path(__file__).parent.parent / "emloc_tools" / "demo" / "base"
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {r"layers\.1\..*": 9}},
    "rank_pattern": {"rank_pattern": {"down_proj": 2}},
    "all three": {"use_rslora": True, "alpha_pattern": {"q_proj": 9}, "rank_pattern": {"down_proj": 2}},
}
BESIDE: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save: lm_head": {"modules_to_save": ["lm_head"]},
    "modules_to_save: norm": {"modules_to_save": ["norm"]},
    "trainable_token_indices": {"trainable_token_indices": [5]},
    "a head that is tied to the embedding": {"target_modules": ["q_proj", "lm_head"]},
}
MODULES = {"attn_q": "self_attn.q_proj", "attn_v": "self_attn.v_proj", "ffn_down": "mlp.down_proj"}
PERMUTED = {"attn_q": "num_attention_heads"}  # llama.cpp rotates other pairs of rows than transformers


def train(folder: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save a LoRA of random values; returns what PEFT adds to each weight, float64."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().double()
        for name, layer in layers.items()
    }


def convert(llama_cpp: Path, adapter: Path, file: Path) -> subprocess.CompletedProcess[bytes]:
    """Run the converter."""
    program = llama_cpp / "convert_lora_to_gguf.py"
    command = [sys.executable, program, "--base", BASE, "--outtype", "f32", "--outfile", file, adapter]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, env=environment)


def beside(llama_cpp: Path, kind: str, adapter: Path) -> dict[str, Any]:
    """Whether the converter writes a file for a LoRA with other tensors than pairs, and what `verify` says of it."""
    options = {"target_modules": ["q_proj", "down_proj"], **BESIDE[kind]}
    train(adapter, options)
    refusal = verify(adapter=adapter, base=str(BASE), consumers=["llama.cpp"]).refusal
    done = convert(llama_cpp, adapter, adapter / "lora.gguf")
    return {"kind": kind, "converted": done.returncode == 0, "refused": refusal is not None}


def converted(llama_cpp: Path, adapter: Path, file: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each weight, by the names of transformers, from the file that its converter writes."""
    convert(llama_cpp, adapter, file).check_returncode()
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    reader = importlib.import_module("gguf").GGUFReader(file)
    alpha = float(reader.get_field("adapter.lora.alpha").parts[-1][0])
    tensors = {each.name: torch.tensor(np.array(each.data)).double() for each in reader.tensors}
    found = {}
    for name in (name.removesuffix(".lora_b") for name in tensors if name.endswith(".lora_b")):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / B.shape[1]
        if name.startswith("token_embd"):
            found["model.embed_tokens"] = scale * A @ B.T
            continue
        _, number, kind, _ = name.split(".")
        found[f"model.layers.{number}.{MODULES[kind]}"] = unpermuted(scale * B @ A, kind)
    return found


def unpermuted(W: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight with its rows in the order of transformers."""
    if kind not in PERMUTED:
        return W
    heads = getattr(AutoModelForCausalLM.from_pretrained(BASE).config, PERMUTED[kind])
    return W.reshape(heads, -1, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of the same modules."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(float((found[name] - W).norm() / W.norm()) for name, W in expected.items())


def main() -> None:
    """Convert, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--release", default="", help="What the source tree is, for the record.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, options) in enumerate(KINDS.items()):
            adapter, folded = Path(folder) / f"{number}", Path(folder) / f"{number}-folded"
            expected = train(adapter, options)
            result = verify(adapter=adapter, base=str(BASE), consumers=["llama.cpp"], fold_scaling=True, output=folded)
            differences = [
                furthest(converted(arguments.llama_cpp, each, each / "lora.gguf"), expected)
                for each in (adapter, folded)
            ]
            warned = verify(adapter=adapter, base=str(BASE), consumers=["llama.cpp"]).refusal is not None
            rows.append(
                {"kind": kind, "pairs": len(expected), "before": differences[0], "after": differences[1],
                 "verify refuses it before": warned, "multiplied": len(result.folded)}
            )  # fmt: skip
            print(rows[-1], flush=True)
        others = [beside(arguments.llama_cpp, kind, Path(folder) / f"beside-{kind[-8:]}") for kind in BESIDE]
    figures = {**record.circumstances("llama_cpp"), "release": arguments.release, "rows": rows, "beside": others}
    figures["command"] = "python -m benchmarks.llama_cpp --llama-cpp FOLDER"  # wherever the tree was
    record.write("llama_cpp", figures, table(figures))


def table(figures: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "# LoRAs in llama.cpp's own files\n",
        record.sentence(figures),
        f"llama.cpp: {figures['release'] or 'unknown release'}. Largest relative difference of what a weight gains",
        "from what PEFT adds.\n",
        "| LoRA | pairs | as trained | `verify --for llama.cpp` | after `--fold-scaling` | pairs multiplied |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for row in figures["rows"]:
        verdict = "refuses it" if row["verify refuses it before"] else "takes it"
        lines.append(
            f"| {row['kind']} | {row['pairs']} | {row['before']:.1e} | {verdict} | {row['after']:.1e} "
            f"| {row['multiplied']} |"
        )
    lines += ["\n| LoRA with tensors beside its pairs | the converter | `verify --for llama.cpp` |", "|---|---|---|"]
    for row in figures["beside"]:
        lines.append(
            f"| {row['kind']} | {'writes a file' if row['converted'] else 'fails'} "
            f"| {'refuses it' if row['refused'] else 'takes it'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
