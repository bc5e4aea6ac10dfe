"""What 4 bits cost: LoRAs trained on an emulator as it is, and on one whose factors bitsandbytes holds in 4 bits.

    python -m benchmarks.quantised      # about five minutes on one core

The demo's base, task and training; each LoRA is measured on the base as it was trained and corrected. `correct` reads
the factors of the emulator's files, while a LoRA in 4 bits was trained on what is left of them. The last column is the
correction by those instead, to see what that is worth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from benchmarks import record
from emloc_tools import demo as shipped
from emloc_tools.demo import train_lora
from emloc_tools.linalg.correction import correct_lora
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct
from emloc_tools.stages.evaluate import evaluate

HERE = Path(shipped.__file__).parent
BASE, DATA, HELD_OUT = HERE / "base", HERE / "data" / "train.jsonl", HERE / "data" / "heldout.jsonl"
RANK, ALPHA, LENGTH = 8, 16, 160
KINDS = {
    "float32": None,
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4, scales quantised too": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def load(emulator: Path, kind: str) -> Any:
    """The emulator in float32, or with its factors in 4 bits, ready for a LoRA."""
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    settings = KINDS[kind]
    if settings is None:
        return AutoModelForCausalLM.from_pretrained(emulator, **options)
    quantised = BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(emulator, quantization_config=quantised, **options)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def weights(model: Any) -> dict[str, float]:
    """Bytes of the factors and of the whole model, with all that packing adds; and bits for each number of U and Vh."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}  # a tied one once
    for name, parameter in model.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            parts = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
            sizes[name] += sum(part.nbytes for part in parts)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "four_bits")}
    factors = sum(sizes[f"{name}.{factor}"] for name in layers for factor in ("U", "Vh"))
    numbers = sum((layer.in_features + layer.out_features) * layer.rank for layer in layers.values())
    return {"factors": factors, "model": sum(sizes.values()), "bits": 8 * factors / numbers}


def train(model: Any, seed: int, steps: int, folder: Path) -> None:
    """The demo's training on a loaded model."""
    options = train_lora.parse_arguments(
        ["--model", "-", "--data", "-", "--output", str(folder), "--steps", str(steps), "--seed", str(seed)]
    )
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = DATA.read_text(encoding="utf-8").splitlines()
    samples = [train_lora.encode(json.loads(line), tokenizer, LENGTH) for line in lines]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    train_lora.train(adapted, tokenizer, samples, options)
    adapted.save_pretrained(folder)


def corrected_by_what_was_trained_on(model: Any, adapter: Path, corrected: Path, folder: Path) -> None:
    """The correction of `correct` again, by the factors that the loaded model computes with."""
    folder.mkdir()
    shutil.copy(corrected / "adapter_config.json", folder)
    W, pairs = load_file(BASE / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for key in [key for key in pairs if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        other = key.replace("lora_A", "lora_B")
        layer = modules[name]
        factors = (layer._factor("U"), layer.S, layer._factor("Vh"))
        new = correct_lora(pairs[key], pairs[other], ALPHA / RANK, W[f"{name}.weight"], *factors)
        pairs[key], pairs[other] = new.A, new.B
    save_file(pairs, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def one(emulator: Path, kind: str, seed: int, steps: int, root: Path) -> dict[str, Any]:
    """Train one LoRA; the losses on held-out text, and the size of the weights that it was trained on."""
    adapter, corrected, again = (root / f"{kind}-{seed}-{what}" for what in ("lora", "corrected", "again"))
    model = load(emulator, kind)
    sizes = weights(model)
    train(model, seed, steps, adapter)
    correct(emulator=emulator, adapter=adapter, base=str(BASE), output=corrected)
    corrected_by_what_was_trained_on(load(emulator, kind), adapter, corrected, again)
    scores = evaluate(
        base=str(BASE), adapters=[adapter, corrected, again], data=HELD_OUT, max_length=LENGTH, dtype="float32"
    )
    return {"kind": kind, "seed": seed, **sizes, "losses": [score.loss for score in scores]}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        calibrate(base=str(BASE), data=DATA, gradients=True, max_length=LENGTH, output=root / "calibration")
        build_emulator(
            base=str(BASE), calibration=root / "calibration", ratio=arguments.ratio, output=root / "emulator"
        )
        runs = []
        for seed in range(arguments.seeds):
            for kind in KINDS:
                runs.append(one(root / "emulator", kind, seed, arguments.steps, root))
                print(runs[-1], flush=True)
    figures = {**record.circumstances("quantised"), **vars(arguments), "runs": runs}
    figures["versions"]["bitsandbytes"] = __import__("bitsandbytes").__version__
    record.write("quantised", figures, table(figures))


def table(figures: dict[str, Any]) -> str:
    """Means over the seeds, in Markdown."""
    lines = [
        "# Emulators in 4 bits\n",
        record.sentence(figures),
        f"Ratio {figures['ratio']:g}, {figures['steps']} steps, means over {figures['seeds']} seeds; losses in nats",
        "per token of held-out text, on the base.\n",
        "| factors | bits for each number | factors, MB | all weights, MB | no LoRA | uncorrected | corrected "
        "| corrected by what it was trained on |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        runs = [run for run in figures["runs"] if run["kind"] == kind]
        losses = torch.tensor([run["losses"] for run in runs]).mean(0).tolist()
        sizes = f"{runs[0]['bits']:.2f} | {runs[0]['factors'] / 1e6:.2f} | {runs[0]['model'] / 1e6:.2f}"
        lines.append(f"| {kind} | {sizes} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
