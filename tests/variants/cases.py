"""Every kind of LoRA that PEFT trains, and what becomes of it: the table in docs/serving.md is made from this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig

Q = {"target_modules": ["q_proj"]}


@dataclass(frozen=True)
class Variant:
    """A kind of LoRA: its name in the table, and how it is made. `options` go to `LoraConfig`."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Passed(Variant):
    """One that has tensors beside the corrected pairs, which are passed on; `what` says so in the table."""

    tensors: frozenset[str]  # the ends of their names
    what: str


@dataclass(frozen=True)
class Refused(Variant):
    """One that `correct` refuses with `message`, a regular expression; `why` is the reason in the table."""

    message: str
    why: str


CORRECTED = [
    Variant("`target_modules`: a list", {"target_modules": ["q_proj", "down_proj"]}),
    Variant("`target_modules`: a pattern", {"target_modules": r".*layers\.[01]\..*(v_proj|up_proj)"}),
    Variant("`target_modules`: `all-linear`", {"target_modules": "all-linear"}),
    Variant("`exclude_modules`", {"exclude_modules": ["down_proj", "q_proj"]}),
    Variant(
        "`layers_to_transform`, `layers_pattern`", {**Q, "layers_to_transform": [0, 2], "layers_pattern": "layers"}
    ),
    Variant(
        "`rank_pattern`, `alpha_pattern`: names", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}}
    ),
    Variant(
        "`rank_pattern`, `alpha_pattern`: patterns",
        {
            "rank_pattern": {r"layers\.[01]\..*q_proj": 2, "^model.layers.2.mlp.(up|gate)_proj": 5},
            "alpha_pattern": {r".*\.1\.mlp\..*": 9},
        },
    ),
    Variant("`use_rslora`", {"use_rslora": True}),
    Variant(
        "`use_rslora` with patterns", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.*": 3}}
    ),
    Variant("`lora_dropout`", {"lora_dropout": 0.3}),
    Variant("`init_lora_weights`: true, false, gaussian, orthogonal, eva, mica", {"init_lora_weights": "gaussian"}),
]
PASSED = [
    Passed(
        "`modules_to_save` of modules that the emulator keeps dense",
        {**Q, "modules_to_save": ["lm_head", "norm"]},
        frozenset({"lm_head.weight", "norm.weight"}),
        "whole tensors",
    ),
    Passed(
        "LoRA on an embedding",
        {"target_modules": ["q_proj", "embed_tokens"]},
        frozenset({"lora_embedding_A", "lora_embedding_B", "embed_tokens.base_layer.weight"}),
        "its pair, and PEFT's copy of the weight",
    ),
    Passed(
        "LoRA on a dense head",
        {"target_modules": ["q_proj", "lm_head"]},
        frozenset({"lm_head.lora_A.weight", "lm_head.lora_B.weight", "lm_head.base_layer.weight"}),
        "its pair, and PEFT's copy of the weight",
    ),
    Passed(
        "`trainable_token_indices`",
        {**Q, "trainable_token_indices": [3, 7]},
        frozenset({"token_adapter.trainable_tokens_delta"}),
        "the trained rows",
    ),
    Passed(
        "`velora_config`",
        {**Q, "velora_config": VeloraConfig(num_groups=4)},
        frozenset({"lora_velora_embed"}),
        "what its backward pass needs",
    ),
    Passed(
        "`monteclora_config`",
        {**Q, "monteclora_config": MontecloraConfig()},
        frozenset({"expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior"}),
        "the sampler, which only training uses",
    ),
]
REFUSED = [
    Refused(
        "`modules_to_save` of a factored layer",
        {**Q, "modules_to_save": ["v_proj"]},
        r"saves model\.layers\.0\.self_attn\.v_proj as a whole \(modules_to_save\), but the emulator holds it as "
        "factors; leave it out of modules_to_save, or keep it dense with --exclude when building the emulator",
        "what is saved are the emulator's factors",
    ),
    Refused(
        "`use_dora`",
        {"use_dora": True},
        "was trained with use_dora: DoRA's magnitudes belong to the weights that it was trained on; use plain LoRA",
        "its magnitudes are of the emulator's weights",
    ),
    Refused(
        "`lora_bias`",
        {"lora_bias": True},
        "was trained with lora_bias: a LoRA bias cannot be merged into layers without bias; use plain LoRA or rsLoRA",
        "layers without bias have no place for it",
    ),
    Refused(
        "`bias`: all, lora_only",
        {"bias": "lora_only"},
        'was trained with bias="lora_only", which changes the biases of the base; use bias="none"',
        "it changes the biases of the base",
    ),
    Refused(
        "`target_parameters`",
        {**Q, "target_parameters": ["down_proj.weight"]},
        r"adapter_config\.json: target_parameters names parameters that are no linear layers",
        "its pairs are of no linear layer",
    ),
    Refused(
        "`layer_replication`",
        {**Q, "layer_replication": [[0, 2], [1, 3]]},
        "was trained with layer_replication: replicated layers have no counterpart in the base",
        "replicated layers have no counterpart in the base",
    ),
    Refused(
        "`alora_invocation_tokens`",
        {**Q, "alora_invocation_tokens": [5, 6]},
        "was trained with alora_invocation_tokens: an activated LoRA acts on some tokens only",
        "it acts on some tokens only",
    ),
    Refused(
        "`use_qalora`",
        {**Q, "use_qalora": True},
        "was trained with use_qalora: QA-LoRA pools its inputs",
        "it pools its inputs",
    ),
    Refused(
        "`use_bdlora`",
        {
            "target_modules": ["q_proj", "o_proj"],
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2),
        },
        r"adapter_config\.json: use_bdlora stores the blocks of block-diagonal factors; train a plain LoRA",
        "its factors are block-diagonal",
    ),
]
# These write into the weights of the model that they train on, which the factors of an emulator do not allow.
REWRITING: dict[str, Mapping[str, Any]] = {
    "pissa": {**Q, "init_lora_weights": "pissa"},
    "pissa_niter_2": {**Q, "init_lora_weights": "pissa_niter_2"},
    "olora": {**Q, "init_lora_weights": "olora"},
    "kasa": {**Q, "kasa_config": peft.KasaConfig()},
}
OTHER_METHODS: dict[str, Callable[[], Any]] = {
    "LoHa": lambda: peft.LoHaConfig(r=2, **Q),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, **Q),
    "IA³": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}
