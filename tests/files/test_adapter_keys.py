"""Names of tensors in adapters are taken apart into what wrappers added, the module's path, and PEFT's own part."""

from __future__ import annotations

import pytest

from emloc_tools.files.adapter_keys import Key, parse_key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model.model.a.q.lora_A.weight", Key("base_model.model.a.q", "lora_A.weight")),
        ("a.q.lora_B.task.weight", Key("a.q", "lora_B.weight", "task")),
        ("a.q.lora_B.bias", Key("a.q", "lora_B.bias")),
        ("a.e.lora_embedding_A", Key("a.e", "lora_embedding_A")),
        ("a.e.lora_embedding_B.default", Key("a.e", "lora_embedding_B", "default")),
        ("a.q.lora_magnitude_vector.default.weight", Key("a.q", "lora_magnitude_vector", "default")),
        ("a.q.lora_magnitude_vector", Key("a.q", "lora_magnitude_vector")),
        ("head.modules_to_save.task.weight", Key("head", "weight", "task")),
        ("a.e.token_adapter.trainable_tokens_delta", Key("a.e", "token_adapter.trainable_tokens_delta")),
        ("a.e.token_adapter.trainable_tokens_delta.x", Key("a.e", "token_adapter.trainable_tokens_delta", "x")),
        ("a.e.base_layer.weight", Key("a.e", "base_layer.weight")),
        ("head.dense.bias", Key("head.dense", "bias")),
        ("_orig_mod.a._fsdp_wrapped_module.q._orig_mod.lora_A.weight", Key("a.q", "lora_A.weight")),
        ("a.lora_A.b.lora_A.weight", Key("a.lora_A.b", "lora_A.weight")),  # a module may be called so
        ("weight", Key("", "weight")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_name_is_taken_apart(name: str, key: Key) -> None:
    assert parse_key(name) == key
    assert key.of_lora == ("lora_" in key.part)


@pytest.mark.parametrize(
    ("path", "component", "paths"),
    [
        ("model.layers", None, ["model.layers"]),
        ("base_model.model.model.layers", None, ["base_model.model.model.layers", "model.layers"]),
        ("module.base_model.model.module.a", None, ["base_model.model.module.a", "module.a", "a"]),
        ("base_model.base_model.model.a", None, ["base_model.model.a", "a"]),
        ("transformer.h", None, ["transformer.h"]),  # GPT-2's own name
        ("transformer.h", "transformer", ["transformer.h", "h"]),
        ("modules.a", None, ["modules.a"]),
    ],
)
def test_leading_parts_come_off_one_by_one(path: str, component: str | None, paths: list[str]) -> None:
    found = Key(path, "lora_A.weight").paths(component)
    assert found == [path, *(each for each in paths if each != path)]
