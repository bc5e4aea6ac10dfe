"""trainer-config: write what an external trainer needs to train a LoRA on an emulator."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emloc_tools.data.jsonl import lines_of, read_records
from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.emulator import MANIFEST, Emulator
from emloc_tools.files.folders import write_text
from emloc_tools.files.json_files import read_json
from emloc_tools.models.layers import ROUTERS
from emloc_tools.stages.refusals import require_apart, require_artifact
from emloc_tools.trainers import axolotl, llama_factory, ms_swift, programs, trl
from emloc_tools.trainers.settings import DataKind, Settings

Trainer = Literal["trl", "transformers", "accelerate", "axolotl", "llamafactory", "ms-swift", "unsloth"]
WRITERS: dict[Trainer, Callable[[Settings, str], Mapping[str, str]]] = {
    "trl": trl.files,
    "transformers": programs.with_transformers,
    "accelerate": programs.with_accelerate,
    "axolotl": axolotl.files,
    "llamafactory": llama_factory.files,
    "ms-swift": ms_swift.files,
    "unsloth": programs.with_unsloth,
}
RUN: dict[Trainer, str] = {
    "trl": "trl sft --config {}",
    "transformers": "python {}",
    "accelerate": "accelerate launch {}",
    "axolotl": "axolotl train {}",
    "llamafactory": "llamafactory-cli train {}",
    "ms-swift": "swift sft {}",
    "unsloth": "python {}",
}
DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
LARGEST_RANK = 16  # by default; serving programs such as vLLM take it without a flag


@dataclass(frozen=True)
class TrainerConfig:
    """The written files, the training that they describe, and the command that starts it."""

    trainer: str
    files: list[Path]
    settings: Settings
    run: str


def trainer_config(
    *,
    trainer: Trainer,
    emulator: Path,
    data: Path,
    output: Path,
    lora: Path = Path("lora"),
    rank: int | None = None,
    learning_rate: float = 2e-4,
    batch_size: int = 1,
    accumulation: int = 8,
    epochs: int = 1,
    steps: int | None = None,
    max_length: int = 2048,
    four_bits: bool = False,
    overwrite: bool = False,
) -> TrainerConfig:
    """Write to `output` a configuration, or a program, by which `trainer` trains a plain LoRA on `emulator`.

    From the emulator come the dtype, the LoRA's targets (the names of its factored layers; where only experts are
    factored, of the linear layers of its blocks) and by default its rank: the largest power of two up to 16 that is not
    above the smallest rank of a factored layer. The scaling is alpha / rank = 2. What kind of data it is says the first
    line of `data`. `four_bits` has the trainer hold the emulator in 4 bits, which needs bitsandbytes there.

    Raises `UnsupportedError` for an emulator of something else than a causal language model of text, `InputError` for
    data without `text`, `messages`, or `prompt` and `completion`, and for an output that exists.
    """
    require_artifact(emulator, MANIFEST, "an emulator")
    require_apart(output, [emulator, data])
    bundle = Emulator(emulator)
    bundle.close()
    _require_causal(bundle)
    kind = _kind_of(data)
    if kind == "messages" and not _has_chat_template(emulator):
        raise InputError(f"{emulator} has a tokenizer without a chat template, which the messages in {data} need")
    rank = rank or _default_rank(bundle)
    base = bundle.manifest.base.id
    correct = ("correct", "--emulator", emulator, "--adapter", lora, "--base", base, "--output", "corrected")
    settings = Settings(
        emulator=str(emulator),
        data=str(data),
        kind=kind,
        adapter=str(lora),
        dtype=_dtype(bundle),
        targets=_targets(bundle),
        rank=rank,
        alpha=2 * rank,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        steps=steps,
        max_length=max_length,
        four_bits=four_bits,
        next_command=shlex.join(["emloc-tools", *map(str, correct)]),
    )
    texts = {Path(name): text for name, text in WRITERS[trainer](settings, str(output)).items()}
    _check_files(list(texts), overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        partial = path.with_name(f".{path.name}.partial")
        write_text(partial, text)
        partial.replace(path)
    return TrainerConfig(trainer, list(texts), settings, RUN[trainer].format(shlex.quote(str(output))))


def _check_files(paths: list[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; --output takes a file, such as train.yaml")
        if path.exists() and not overwrite:
            raise InputError(f"{path} already exists; choose another --output, or pass --overwrite to replace it")


def _require_causal(bundle: Emulator) -> None:
    auto_map = read_json(bundle.folder / "config.json", "E7").get("auto_map") or {}
    if bundle.library != "transformers" or "AutoModelForCausalLM" not in auto_map:
        raise UnsupportedError(
            f"the emulator in {bundle.folder} is of {bundle.manifest.base.architecture}, no causal language model of "
            "text; give your trainer the folder, trust_remote_code and a plain LoRA by hand"
        )


def _kind_of(data: Path) -> DataKind:
    if not data.is_file():
        found = "is a folder" if data.is_dir() else "does not exist"
        raise InputError(f"{data} {found}; --data takes a JSONL file")
    first = next(iter(lines_of(data)), None)
    if first is None:
        raise InputError(f"{data} is empty; --data takes JSONL with text, messages, or prompt and completion")
    _, record = next(read_records(data, [first]))
    if "label" in record or "images" in record or "image" in record:
        raise UnsupportedError(
            f"{data} holds labels or images, for which no trainer's configuration is written; give your trainer the "
            "emulator, trust_remote_code and a plain LoRA by hand"
        )
    if "messages" in record:
        return "messages"
    if "prompt" in record and "completion" in record:
        return "prompt"
    if "text" in record:
        return "text"
    raise InputError(f"{data}:1: found the keys {sorted(record)}, expected text, messages, or prompt and completion")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() and (folder / "chat_template.jinja").stat().st_size:
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def _records(bundle: Emulator) -> dict[str, Any]:
    return {**bundle.layers, **bundle.stacks}


def _default_rank(bundle: Emulator) -> int:
    smallest: int = min(record.rank for record in _records(bundle).values())
    return 1 << (min(LARGEST_RANK, smallest).bit_length() - 1)


def _dtype(bundle: Emulator) -> Any:
    name = next(iter(bundle.layers), None)
    factor = f"{name}.U" if name else f"{next(iter(bundle.stacks))}_U"
    return DTYPES[str(bundle.tensors.spec(factor).dtype)]


def _targets(bundle: Emulator) -> tuple[str, ...]:
    """The last parts of the names of layers, by which all trainers choose them."""
    names = list(bundle.layers)
    if not names:  # experts alone are factored; a LoRA goes on what is linear beside them
        weights = [name.removesuffix(".weight") for name in bundle.tensors.names() if name.endswith(".weight")]
        in_blocks = [name for name in weights if any(part.isdigit() for part in name.split("."))]
        names = [name for name in in_blocks if len(bundle.tensors.spec(f"{name}.weight").shape) == 2]
        names = [name for name in names if ROUTERS.isdisjoint(name.split("."))]
    return tuple(sorted({name.rpartition(".")[2] for name in names}))
