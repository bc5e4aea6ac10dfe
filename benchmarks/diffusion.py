"""What a LoRA trained on the emulator of a diffusion transformer is worth on its base.

    python -m benchmarks.diffusion      # about six minutes on one core

A FluxTransformer2DModel of 1.2 million parameters learns, from random weights and by flow matching, to paint what is
asked for: a filled square of one of 6 colours at one of 9 places of a picture of 6 x 6 latents. Then a LoRA teaches it
one new word, for stripes that it has never seen. The LoRA is trained on the base itself, and on emulators of it at one
ratio, made in several ways from 64 training calls; each of these LoRAs is measured on the base as it was trained and
corrected. Losses are mean squared errors of the velocity on 256 fixed held-out calls of the new word; the first row
of the table is the base without any LoRA.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn import functional as F

from benchmarks import record
from emloc_tools import load_emulator, record_inputs
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.correct import correct

SIDE, CHANNELS, WORDS, WIDTH = 6, 4, 16, 48
COLOURS, PLACES, NEW = 6, 9, 15  # words 0 to 5 are colours, 6 to 14 places, and 15 is the new one
MODEL = {
    **{"patch_size": 1, "in_channels": CHANNELS, "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32},
    **{"num_attention_heads": 3, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH},
    "axes_dims_rope": [8, 12, 12],
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]
SAMPLES, HELD_OUT, BATCH = 64, 256, 24
WAYS = {
    "truncated SVD": "as in the code released with the paper",
    "calibrated": "on the training calls",
    "calibrated, gradients": "of the error of the velocity",
    "calibrated, gradients of a probe": "of the output plus noise, as record-inputs stores it",
}
Inputs = dict[str, torch.Tensor]


class Pictures:
    """Draws pictures and their words, and turns them into calls of the transformer with their target velocities."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._embeddings = torch.randn(WORDS, WIDTH, generator=generator)
        self._colours = torch.randn(COLOURS, CHANNELS, generator=generator)
        self._ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(SIDE)), torch.arange(float(SIDE)))

    def known(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Squares `(count, tokens, channels)` and their two words `(count, 2)`."""
        colour = torch.randint(COLOURS, (count,), generator=generator)
        place = torch.randint(PLACES, (count,), generator=generator)
        picture = torch.full((count, SIDE, SIDE, CHANNELS), -0.5)
        for row in range(count):
            top, left = divmod(int(place[row]), 3)
            picture[row, 2 * top : 2 * top + 2, 2 * left : 2 * left + 2] = self._colours[colour[row]]
        return picture.flatten(1, 2), torch.stack([colour, COLOURS + place], 1)

    def new(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Stripes of a colour, and as words the colour and the new one."""
        colour = torch.randint(COLOURS, (count,), generator=generator)
        picture = torch.full((count, SIDE, SIDE, CHANNELS), -0.5)
        picture[:, :, ::2] = self._colours[colour][:, None, None]
        return picture.flatten(1, 2), torch.stack([colour, torch.full((count,), NEW)], 1)

    def call(self, drawn: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> tuple[Inputs, torch.Tensor]:
        """The arguments of the transformer at random times, and the velocity that it is to give."""
        clean, words = drawn
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.rand(len(clean), generator=generator)
        text = self._embeddings[words]
        return {
            "hidden_states": (1 - t[:, None, None]) * clean + t[:, None, None] * noise,
            "timestep": t,
            "encoder_hidden_states": text,
            "pooled_projections": text.mean(1),
            "img_ids": self._ids,
            "txt_ids": torch.zeros(text.shape[1], 3),
        }, noise - clean


def train(model: Any, draw: Callable[[torch.Generator], tuple[Inputs, torch.Tensor]], steps: int, rate: float) -> None:
    """Flow matching with AdamW; the rate falls to zero."""
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        inputs, velocity = draw(generator)
        F.mse_loss(model(**inputs).sample, velocity).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss(model: Any, calls: list[tuple[Inputs, torch.Tensor]]) -> float:
    """Mean squared error of the velocity."""
    return float(torch.stack([F.mse_loss(model(**inputs).sample, velocity) for inputs, velocity in calls]).mean())


def emulators(root: Path, pictures: Pictures, model: Any, ratio: float) -> dict[str, Path]:
    """One emulator for each of `WAYS`."""
    base, found = str(root / "base"), {}
    for way in WAYS:
        options: dict[str, Any] = {}
        if way != "truncated SVD":
            gradients, generator = "gradients" in way, torch.Generator().manual_seed(2)
            data, calibration = root / f"{way}.safetensors", root / f"calibration {way}"
            with torch.no_grad(), record_inputs(model, data, probe="probe" in way) as recorder:
                for _ in range(SAMPLES):
                    inputs, velocity = pictures.call(pictures.new(1, generator), generator)
                    model(**inputs)
                    if "probe" not in way:
                        recorder.target(velocity)
            calibrate(base=base, data=data, gradients=gradients, output=calibration, device="cpu")
            options["calibration"] = calibration
        found[way] = build_emulator(base=base, ratio=ratio, output=root / f"emulator {way}", **options).folder
    return found


def adapt(model: Any, pictures: Pictures, steps: int, seed: int, folder: Path) -> None:
    """Train a LoRA on the new word and save it as pipelines do."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    train(model, lambda generator: pictures.call(pictures.new(BATCH, generator), generator), steps, 2e-3)
    layers = get_peft_model_state_dict(model)
    metadata = _collate_lora_metadata({"transformer": model})
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=700, help="of the base's training")
    parser.add_argument("--lora-steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, generator = Pictures(), torch.Generator().manual_seed(3)
    base = diffusers.FluxTransformer2DModel(**MODEL)
    train(base, lambda g: pictures.call(pictures.known(BATCH, g), g), arguments.steps, 1e-3)
    heldout = [pictures.call(pictures.new(32, generator), generator) for _ in range(HELD_OUT // 32)]
    known = [pictures.call(pictures.known(32, generator), generator) for _ in range(HELD_OUT // 32)]
    rows: dict[str, list[list[float]]] = {"base": [], **{way: [] for way in WAYS}}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base.save_pretrained(root / "base")
        made = emulators(root, pictures, base, arguments.ratio)
        for seed in range(arguments.seeds):
            for way in rows:
                lora, corrected = root / f"lora {way} {seed}", root / f"corrected {way} {seed}"
                light = load_emulator(made[way]) if way in made else copy.deepcopy(base)
                before = loss(light, heldout)
                adapt(light, pictures, arguments.lora_steps, seed, lora)
                figures = [before, loss(light, heldout)]
                if way in made:
                    correct(emulator=made[way], adapter=lora, base=str(root / "base"), output=corrected)
                    figures += [on_base(base, path, heldout) for path in (lora, corrected)]
                rows[way].append(figures)
                print(way, seed, figures, flush=True)
    circumstances = record.circumstances("diffusion")
    circumstances["versions"]["diffusers"] = diffusers.__version__
    result = {
        **circumstances,
        "known": loss(base, known),
        "rows": rows,
        "ratio": arguments.ratio,
    }
    record.write("diffusion", result, table(result))


def on_base(base: Any, folder: Path, calls: list[tuple[Inputs, torch.Tensor]]) -> float:
    """The loss of the base with a LoRA."""
    model = copy.deepcopy(base)
    model.load_lora_adapter(folder / "pytorch_lora_weights.safetensors", use_safetensors=True)
    return loss(model, calls)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, means over the seeds."""
    means = {way: torch.tensor(figures).mean(0).tolist() for way, figures in result["rows"].items()}
    seeds = len(result["rows"]["base"])
    before, upper = means.pop("base")
    lines = [
        "# LoRAs of a diffusion transformer\n",
        record.sentence(result),
        f"Ratio {result['ratio']:g}; means over {seeds} seeds. The base has a loss of {result['known']:.3f} on what it",
        f"knows and {before:.3f} on the new word; with a LoRA trained on the base itself it has {upper:.3f}.\n",
        "| emulator | | emulator alone | emulator + LoRA | base + LoRA | base + corrected LoRA |",
        "|---|---|---|---|---|---|",
    ]
    for way, figures in means.items():
        lines.append(f"| {way} | {WAYS[way]} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
