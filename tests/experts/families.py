"""Small models with fused experts of every layout, and what they do, written out a token at a time in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import pico

SIZES = {**pico.LLAMA, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNREACHED = 3  # the expert of GPT-OSS that no token is routed to
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """The halves of the rows are gate and up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def clamped_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """GPT-OSS: gate and up by turns, clamped at 7, and a sigmoid of slope 1.702."""
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@dataclass(frozen=True)
class Family:
    """A configuration, its class, and how its experts compute. `shared` other experts see every token."""

    config: Callable[[], Any]
    cls: str
    gate: Callable[[torch.Tensor], torch.Tensor]
    transposed: bool = False
    fused_on_disk: bool = False


def _mixtral() -> Any:
    return transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return transformers.Qwen3MoeConfig(**SIZES, head_dim=8, decoder_sparse_step=1, **experts)


def _gpt_oss() -> Any:
    layers = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=5, num_experts_per_tok=2, rope_parameters=rope, **layers
    )


def _deepseek() -> Any:
    return transformers.DeepseekV3Config(**{**SIZES, **DEEPSEEK})


FAMILIES = {
    "mixtral": Family(_mixtral, "MixtralForCausalLM", silu_gate),
    "qwen3-moe": Family(_qwen3_moe, "Qwen3MoeForCausalLM", silu_gate),
    "gpt-oss": Family(_gpt_oss, "GptOssForCausalLM", clamped_gate, transposed=True, fused_on_disk=True),
    "deepseek-v3": Family(_deepseek, "DeepseekV3ForCausalLM", silu_gate),
}


def save(folder: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Save a random model of a family with its tokenizer, and return it in evaluation mode."""
    torch.manual_seed(0)
    known = FAMILIES[family]
    model = getattr(transformers, known.cls)(known.config())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name.endswith("_bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data *= 6  # the default initialisation makes attention and routing nearly uniform
        if family == "gpt-oss" and name.endswith("router.bias"):
            parameter.data[UNREACHED] = -1e4
    model = model.to(dtype).eval()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    pico.save_tokenizer(folder)
    return model


@dataclass
class Seen:
    """What one expert's matrix read and wrote without bias, all tokens after one another, float64."""

    inputs: torch.Tensor
    outputs: torch.Tensor


def stacks(model: Any, family: str) -> dict[str, torch.Tensor]:
    """The weights W (experts, out, in) of all stacks by name, float64."""
    known = FAMILIES[family]
    found = {name: weight.detach().double() for name, weight in model.named_parameters() if weight.dim() == 3}
    return {name: weight.mT if known.transposed else weight for name, weight in found.items()}


def seen_by_experts(model: Any, family: str, samples: list[list[int]]) -> dict[str, Seen]:
    """Every expert's inputs and outputs, by `<stack>.<number>`; experts without tokens are left out.

    What each token is routed to is taken from a hook on a float64 copy; the experts are computed here, row by row.
    """
    import copy

    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    W, known = stacks(model, family), FAMILIES[family]
    rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def hook(name: str) -> Any:
        def see(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            hidden, index = args[0], args[1]
            up, down = W[f"{name}.gate_up_proj"], W[f"{name}.down_proj"]
            for x, chosen in zip(hidden.reshape(-1, hidden.shape[-1]), index.reshape(-1, index.shape[-1]), strict=True):
                for e in chosen.tolist():
                    y = up[e] @ x
                    biased = y + module.gate_up_proj_bias[e] if family == "gpt-oss" else y
                    z = known.gate(biased)
                    rows.setdefault(f"{name}.gate_up_proj.{e}", []).append((x, y))
                    rows.setdefault(f"{name}.down_proj.{e}", []).append((z, down[e] @ z))

        return see

    for name, module in model.named_modules():
        if f"{name}.gate_up_proj" in W:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample]))
    return {
        name: Seen(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]))
        for name, pairs in rows.items()
    }
