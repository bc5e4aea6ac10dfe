"""Write every golden folder, with equal bytes on every machine: `python -m formats.make_golden` from the root."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from formats.bad_golden import BAD
from formats.golden_content import Grams, Layers, RankedLayers, adapter, calibration, diffusers_lora, emulator, refined
from formats.golden_experts import calibration_of_experts, emulator_of_experts

FORMATS = Path(__file__).parent


def make(root: Path) -> None:
    """Write `<format>/golden` of all formats under `root`, where nothing of that name may be."""
    folder = root / "calibration" / "golden"
    attention: Layers = {f"model.layers.0.self_attn.{name}_proj": (6, 4, "linear") for name in "qkv"}
    down: Layers = {"model.layers.0.mlp.down_proj": (3, 5, "linear")}
    calibration(folder / "ok-output-side", down, [(list(down), "output")])
    both: Layers = {**attention, **down}
    mixed: Grams = [(list(attention), "input"), (list(down), "output")]
    calibration(folder / "ok-shared-input", both, mixed)
    gpt2: Layers = {f"transformer.h.{block}.attn.c_attn": (6, 4, "conv1d") for block in range(3)}
    grams: Grams = [([name], "input") for name in gpt2]
    expert = ("transformer.h.3.attn.c_attn",)
    calibration(folder / "ok-merged-shards", gpt2, grams, max_shard_size=90, parts=2, unreached=expert)
    some = (next(iter(attention)), *down)  # of a wide layer, of a narrow one, and not of the others
    calibration(folder / "ok-gradients", both, mixed, gradients=some, loss="next-token")
    every = tuple(gpt2)
    calibration(folder / "ok-gradients-shards", gpt2, grams, max_shard_size=90, parts=2, gradients=every, loss="model")
    to_q: Layers = {"transformer_blocks.0.attn.to_q": (6, 4, "linear")}
    calibration(
        folder / "ok-squared-error",
        to_q,
        [(list(to_q), "input")],
        gradients=tuple(to_q),
        loss="squared-error",
        architecture="FluxTransformer2DModel",
    )
    calibration_of_experts(folder / "ok-experts", gradients=False)
    calibration_of_experts(folder / "ok-experts-gradients", gradients=True)

    folder = root / "emulator" / "golden"
    two: RankedLayers = {
        "model.layers.0.mlp.up_proj": (8, 4, "linear", 2),
        "model.layers.0.mlp.down_proj": (4, 8, "linear", 1),
    }
    one: RankedLayers = {"transformer.h.0.attn.c_attn": (12, 4, "conv1d", 3)}
    emulator(folder / "ok-linear-single-file", two, dtype=torch.float32, calibrated=True)
    emulator(folder / "ok-linear-shards", two, dtype=torch.float16, calibrated=True, max_shard_size=64)
    emulator(folder / "ok-conv1d-bfloat16", one, dtype=torch.bfloat16, calibrated=True)
    up: RankedLayers = dict(list(two.items())[:1])
    emulator(folder / "ok-plain-svd", up, dtype=torch.float32, calibrated=False)
    emulator(folder / "ok-weighted", up, dtype=torch.float32, calibrated=True, weighted=True)

    of_flux: RankedLayers = {
        "transformer_blocks.0.attn.to_q": (8, 4, "linear", 2),
        "transformer_blocks.0.ff.net.2": (4, 8, "linear", 1),
    }
    emulator(folder / "ok-diffusers", of_flux, dtype=torch.float32, calibrated=True, library="diffusers")
    emulator(
        folder / "ok-diffusers-weighted-shards",
        dict(list(of_flux.items())[:1]),
        dtype=torch.bfloat16,
        calibrated=True,
        weighted=True,
        library="diffusers",
        max_shard_size=64,
    )
    files = {"configuration_own.py": "# the base's own configuration\n", "modeling_own.py": "# its own class\n"}
    emulator(folder / "ok-own-code", up, dtype=torch.float32, calibrated=True, code=files)
    emulator_of_experts(folder / "ok-experts", linear=True, weighted=True)
    emulator_of_experts(folder / "ok-experts-alone", linear=False)

    folder = root / "adapter" / "golden"
    modules = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 2}
    patterns = {
        "use_rslora": True,
        "rank_pattern": {r"layers\.\d+\.mlp\..*_proj": 4},
        "alpha_pattern": {"^model.layers.0.mlp.up_proj": 16, "k_proj|q_proj": 1.5},
    }
    adapter(folder / "ok-trained", modules, {}, dtype=torch.bfloat16)
    adapter(folder / "ok-trained-rslora-patterns", {**modules, list(modules)[1]: 4}, patterns, dtype=torch.float32)
    adapter(folder / "ok-corrected", modules, {}, dtype=torch.float16, corrected=True)
    for name, place in (("ok-chosen-as-trained", 1), ("ok-chosen-scaled", 2)):
        adapter(folder / name, modules, {}, dtype=torch.bfloat16, corrected=True, chosen=place)

    described = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": False, "base_model_name_or_path": None}
    diffusers_lora(folder / "ok-diffusers", metadata=described)
    diffusers_lora(folder / "ok-diffusers-alpha", metadata=None, alpha=3.0)
    diffusers_lora(folder / "ok-diffusers-corrected", metadata=described, corrected=True)

    refined(folder / "ok-refined", folder / "ok-chosen-scaled", [2.5, 1.25])
    refined(folder / "ok-refined-again", folder / "ok-refined", [1.0])
    refined(folder / "ok-diffusers-refined", folder / "ok-diffusers-corrected", [0.5])

    for name in ("calibration", "emulator", "adapter"):
        golden, expected = root / name / "golden", {}
        for bad in BAD[name]:
            shutil.copytree(golden / bad.source, golden / bad.folder)
            bad.damage(golden / bad.folder)
            expected[bad.folder] = {"rule": bad.rule, "file": bad.file, "field": bad.field}
        (golden / "bad.json").write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Replace the golden folders of this repository."""
    for name in BAD:
        shutil.rmtree(FORMATS / name / "golden", ignore_errors=True)
    make(FORMATS)


if __name__ == "__main__":
    main()
