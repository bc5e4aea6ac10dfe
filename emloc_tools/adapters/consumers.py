"""What the programs that serve adapters read of them, and what they refuse or, without a word, leave out.

Each rule is one of the program's own source, at the release that `RELEASES` names; docs/serving.md says where.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emloc_tools.files.adapter import PREFIX, Adapter, LoraKeys
from emloc_tools.files.adapter_keys import EMBEDDING, parse_key
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_WEIGHTS
from emloc_tools.files.diffusers_lora import DiffusersLora
from emloc_tools.records import Library

RELEASES = {
    "peft": "PEFT 0.21.2",
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36",
    "diffusers": "diffusers 0.42.1",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank can be
VLLM_HEADS = ("classifier", "score")  # the modules_to_save of classifiers
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VLLM_REFUSES = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
ADDED_TOKENS = "added_tokens.json"
FOLD = "write one that has one alpha with --fold-scaling"


@dataclass(frozen=True)
class Serving:
    """Whether a program serves an adapter: what it refuses or gets wrong, else what it needs to be told.

    `problems` are whole lines; `options` are command-line options or calls to use, `notes` what else to know.
    """

    consumer: str
    release: str
    problems: list[str]
    options: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Served:
    """An adapter and what matters of the base that it is for."""

    adapter: Adapter
    library: Library
    tied_head: bool

    @property
    def config(self) -> dict[str, Any]:
        """The fields of the adapter's configuration."""
        return self.adapter.config

    @property
    def pairs(self) -> dict[str, LoraKeys]:
        """All pairs, those of embeddings as well."""
        return {**self.adapter.loras, **self.adapter.embeddings}

    @property
    def beside(self) -> list[str]:
        """Tensors that belong to no pair, without the prefix."""
        names = (name.removeprefix(self.adapter.prefix) for name in self.adapter.other_tensors)
        return [name for name in names if parse_key(name).part not in EMBEDDING]

    def ranks(self) -> list[int]:
        """The ranks of all pairs, each once, ascending."""
        return sorted({keys.rank for keys in self.pairs.values()})


Check = Callable[[Served], tuple[list[str], list[str], list[str]]]


def serving(consumer: str, served: Served) -> Serving:
    """Check an adapter that fits its base against what one of `RELEASES` reads."""
    problems, options, notes = _CHECKS[consumer](served)
    return Serving(consumer, RELEASES[consumer], problems, options, notes)


def _peft(served: Served) -> tuple[list[str], list[str], list[str]]:
    if isinstance(served.adapter, DiffusersLora):
        problem = f"PEFT reads no {DIFFUSERS_WEIGHTS}; load it by pipeline.load_lora_weights of diffusers"
        return [problem], [], []
    return [], [f'PeftModel.from_pretrained(model, "{served.adapter.folder}")'], []


def _vllm(served: Served) -> tuple[list[str], list[str], list[str]]:
    config = served.config
    if served.library == "diffusers":
        return ["serves language models, and this LoRA is for a model of diffusers"], [], []
    problems = [f"refuses {field}" for field in VLLM_REFUSES if config.get(field)]
    if config.get("bias", "none") != "none":
        problems.append(f'refuses bias="{config["bias"]}"')
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in VLLM_INITS:
        problems.append(f"refuses init_lora_weights={init!r}")
    saved = config.get("modules_to_save") or []
    whole = [str(name) for name in (saved if isinstance(saved, list) else [saved]) if name not in VLLM_HEADS]
    if whole:
        problems.append(f"refuses modules_to_save of other modules than {' and '.join(VLLM_HEADS)}: {', '.join(whole)}")
    unread = [name for name in served.beside if not _vllm_reads(name)]
    if unread and not problems:
        problems.append(f"raises an error at the tensor {unread[0]}")
    rank = max(served.ranks())
    if rank > VLLM_RANKS[-1]:
        problems.append(f"takes ranks up to {VLLM_RANKS[-1]}, and the largest here is {rank}")
        return problems, [], []
    enough = min(allowed for allowed in VLLM_RANKS if allowed >= rank)
    notes = []
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append(f"releases that read r and lora_alpha alone take them for every pair; for these {FOLD}")
    return problems, [f"--max-lora-rank {enough}"], notes


def _vllm_reads(name: str) -> bool:
    """Whether vLLM takes a tensor that belongs to no pair, or skips it without harm."""
    return name.endswith((".embed_tokens.base_layer.weight", "lm_head.base_layer.weight")) or bool(
        re.fullmatch(r"(.+\.)?(score|classifier)\.(weight|bias)", name)
    )


def _sglang(served: Served) -> tuple[list[str], list[str], list[str]]:
    config = served.config
    if served.library == "diffusers":
        return ["this LoRA is for a model of diffusers, which is not what its LoRA server is for"], [], []
    problems = ["refuses use_dora"] if config.get("use_dora") else []
    problems += _one_scaling(served, "computes lora_alpha / r for every pair")
    if served.ranks() != [config.get("r")]:
        ranks = ", ".join(map(str, served.ranks()))
        problems.append(f"makes room for the rank r = {config.get('r')} alone, and the pairs have {ranks}")
    if served.beside:
        problems.append(f"applies pairs only, and leaves {_some(served.beside)} out without a word")
    added = (served.adapter.folder / ADDED_TOKENS).exists()
    notes = [f"refuses tokens in {ADDED_TOKENS} that the base does not have"] if added else []
    return problems, [f"--max-lora-rank {max(served.ranks())}"], notes


def _llama_cpp(served: Served) -> tuple[list[str], list[str], list[str]]:
    config = served.config
    if served.library == "diffusers":
        return ["runs language models, and this LoRA is for a model of diffusers"], [], []
    problems = _one_scaling(served, "computes lora_alpha / rank for every pair")
    unread = [name for name in served.beside if not name.endswith(".base_layer.weight") and "norm" not in name]
    if unread:
        problems.append(f"convert_lora_to_gguf.py ends at the tensor {unread[0]}")
    skipped = [name for name in served.beside if "norm" in name]
    if skipped:
        problems.append(f"loads no norms, and leaves {_some(skipped)} out without a word")
    if served.tied_head and "lm_head" in served.adapter.loras:
        problems.append("has no lm_head of its own where it is tied to the embeddings, and refuses a LoRA on it")
    if config.get("layer_replication"):
        problems.append("knows no layer_replication, and would give the first copies the LoRA of the last")
    command = f"convert_lora_to_gguf.py --base BASE {served.adapter.folder}"
    return problems, [command, "llama-server --model BASE.gguf --lora ADAPTER.gguf"], []


def _one_scaling(served: Served, how: str) -> list[str]:
    """A problem if what a program computes from lora_alpha is not the scaling of every pair."""
    alpha, r = served.config.get("lora_alpha"), served.config.get("r")
    if not isinstance(alpha, (int, float)) or not isinstance(r, int):
        return ["needs r and lora_alpha in adapter_config.json"]
    other = [name for name, keys in served.pairs.items() if abs(alpha / keys.rank / keys.scaling - 1) > 1e-6]
    if not other:
        return []
    name, keys = other[0], served.pairs[other[0]]
    why = "use_rslora" if served.config.get("use_rslora") else "alpha_pattern"
    return [
        f"{how} and does not read {why}: it would scale {name} by {alpha / keys.rank:.6g} instead of "
        f"{keys.scaling:.6g}, and so {len(other)} of {len(served.pairs)} pairs; {FOLD}"
    ]


def _diffusers(served: Served) -> tuple[list[str], list[str], list[str]]:
    adapter = served.adapter
    if served.library != "diffusers":
        return ["the base is no model of diffusers"], [], []
    if isinstance(adapter, DiffusersLora):
        return [], [f'pipeline.load_lora_weights("{adapter.folder}")'], []
    example = next(iter(adapter.loras.values())).A.removeprefix(PREFIX)
    return (
        [
            f"pipelines read {DIFFUSERS_WEIGHTS} with keys such as transformer.{example}, and take none from the file "
            "of PEFT but for a warning; load it by PeftModel.from_pretrained on that part of the pipeline"
        ],
        [],
        [],
    )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


_CHECKS: dict[str, Check] = {
    "peft": _peft,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "diffusers": _diffusers,
}
