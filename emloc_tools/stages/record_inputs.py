"""record-inputs: run a pipeline of diffusers on prompts, and keep what its denoiser is called with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.models.base import choose_device
from emloc_tools.models.diffusion import PIPELINE, import_diffusers, no_bars, stored_dtype
from emloc_tools.models.recording import record_inputs as recording
from emloc_tools.models.source import first_line, open_source, open_tensors
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.refusals import require_apart

FILE = "inputs.safetensors"
DRAWN = {"output_type": "latent"}  # pictures are not wanted

Offload = Literal["none", "model", "sequential"]


@dataclass(frozen=True)
class RecordedInputs:
    """What was recorded: `file` holds `calls` calls of the pipeline's `component`, of class `architecture`."""

    file: Path
    component: str
    architecture: str
    prompts: int
    calls: int
    nbytes: int


def record_inputs(
    *,
    base: str,
    prompts: Path,
    output: Path,
    revision: str | None = None,
    keep: int = 4,
    steps: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    offload: Offload = "none",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> RecordedInputs:
    """Run the pipeline `base` once for every prompt, and write `keep` calls of each run's denoiser to `output`.

    `prompts` holds one per line, or JSONL with `prompt`. The kept calls are spread evenly over a run, so over its
    timesteps; which of them, and the noise, follow from `seed`. Each has a target by which `calibrate --gradients` can
    weigh errors by what they do to the prediction; see `models.recording`. `steps` and `arguments` go to the pipeline.
    This is the one stage that needs the whole model in memory, in `dtype` (that of the stored weights by default);
    `offload` keeps the parts that do not run on the CPU: whole models, or their layers (`sequential`).

    Raises `InputError` for unusable paths, prompts, options or arguments, `UnsupportedError` without diffusers.
    """
    diffusers = import_diffusers("record-inputs runs a pipeline of diffusers")
    require_apart(output, [Path(base), prompts])
    check_output(output, overwrite=overwrite)
    device = choose_device(device)
    if offload != "none" and device == "cpu":
        raise InputError(
            f"--offload {offload} moves models between a GPU and the CPU, and --device is cpu; leave it out"
        )
    texts = read_prompts(prompts)
    source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
    folder = source.folder.parent
    if not (folder / PIPELINE).is_file():
        raise InputError(f"{base} is no pipeline of diffusers, which has a {PIPELINE}; give the whole pipeline")
    component = source.folder.name
    if dtype == "auto":
        with open_tensors(source, "diffusers") as tensors:
            chosen = stored_dtype(tensors)
    else:
        chosen = getattr(torch, dtype)
    where = source.repository if source.revision else folder
    pipeline = _load(diffusers, where, source.revision, chosen, trust_remote_code)
    module = getattr(pipeline, component)
    options = _options(pipeline, steps, arguments or {})
    _place(pipeline, device, offload)
    with new_folder(output, overwrite=overwrite) as written:
        with recording(module, written / FILE, per_run=keep, probe=True, seed=seed) as recorder:
            for number, prompt in enumerate(texts):
                generator = torch.Generator().manual_seed(seed + number)
                with recorder.run():
                    _run(pipeline, prompt, generator, options)
                progress(Step("record", number + 1, len(texts), prompt))
        nbytes = (written / FILE).stat().st_size
    return RecordedInputs(output / FILE, component, type(module).__name__, len(texts), recorder.calls, nbytes)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line, or of JSONL with `prompt`. Raises `InputError` naming the line."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a text file with a prompt per line, or JSONL with `prompt`")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompt; expected one per line")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise InputError(f"{where}: expected an object with `prompt`, a string")
    return prompt


def _load(diffusers: Any, where: Any, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        with no_bars():
            return diffusers.DiffusionPipeline.from_pretrained(
                where, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"{where}: the pipeline cannot be loaded: {first_line(error)}") from error


def _options(pipeline: Any, steps: int | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of every run. Raises `InputError` for one that the pipeline does not have."""
    accepted = inspect.signature(pipeline.__call__).parameters
    wanted = {**arguments, **({} if steps is None else {"num_inference_steps": steps})}
    for name in wanted:
        if name not in accepted:
            known = ", ".join(accepted)
            raise InputError(f"{type(pipeline).__name__} has no argument {name}; it has {known}")
    return {**{name: value for name, value in DRAWN.items() if name in accepted}, **wanted}


def _place(pipeline: Any, device: str, offload: Offload) -> None:
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _run(pipeline: Any, prompt: str, generator: torch.Generator, options: Mapping[str, Any]) -> None:
    try:
        pipeline(prompt=prompt, generator=generator, **options)
    except UnsupportedError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{type(pipeline).__name__} cannot run on {prompt!r}: {first_line(error)}") from error
