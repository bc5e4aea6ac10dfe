"""A tiny FLUX pipeline with the tokenizers that diffusers' training scripts ask for, and its emulator."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.record_inputs import record_inputs
from tests.diffusion.pico_flux import FLUX

SIDE = 16  # of a picture
PROMPTS = ("a photo of sks dog", "a photo of sks dog on a bed", "sks dog in the snow")
# The pipeline with the emulator in the transformer's place.
LAY_OUT = """mkdir light
ln -s "$PWD"/pipeline/* light/
rm light/transformer
ln -s "$PWD"/emulator light/transformer"""


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline, its transformer's emulator, and the same pipeline with the emulator in the transformer's place."""

    pipeline: Path
    emulator: Path
    light: Path
    pictures: Path


def make_pipeline_case(folder: Path) -> PipelineCase:
    """Make all of it by the stages, as docs/diffusion.md does."""
    case = PipelineCase(*(folder / name for name in ("pipeline", "emulator", "light", "pictures")))
    save_pipeline(case.pipeline)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    sizes = {"height": SIDE, "width": SIDE, "max_sequence_length": 24}
    recorded = record_inputs(
        base=str(case.pipeline), prompts=prompts, steps=4, keep=4, arguments=sizes, output=folder / "inputs"
    )
    calibrate(base=str(case.pipeline), data=recorded.file, output=folder / "calibration", device="cpu")
    build_emulator(base=str(case.pipeline), calibration=folder / "calibration", ratio=0.35, output=case.emulator)
    subprocess.run(["bash", "-ec", LAY_OUT], cwd=folder, check=True)
    case.pictures.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(case.pictures / f"{number}.png")
    return case


def save_pipeline(folder: Path) -> None:
    """Random weights; byte-level tokenizers of CLIP and T5."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    clip = transformers.CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[])
    clip.model_max_length = 77
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    t5 = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {"vocab_size": len(names), "max_position_embeddings": 77, "projection_dim": 32, "eos_token_id": 1}
    texts = {"vocab_size": len(pieces), "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    vae = {"in_channels": 3, "out_channels": 3, "block_out_channels": (4,), "layers_per_block": 1, "latent_channels": 1}
    quantisers = {"use_quant_conv": False, "use_post_quant_conv": False}
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **text)),
        tokenizer=clip,
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(**texts)),
        tokenizer_2=t5,
        transformer=diffusers.FluxTransformer2DModel(**FLUX),
        vae=diffusers.AutoencoderKL(
            **vae, **quantisers, norm_num_groups=1, sample_size=SIDE, shift_factor=0.06, scaling_factor=1.5
        ),
    ).save_pretrained(folder)
