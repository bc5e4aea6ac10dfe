"""What is wrong in each `golden/bad-<RULE>-<what>`: one damage to one good folder, and what a reader must say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.damage import Damage, both, in_bytes, in_header, in_json, in_tensor, remove

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
DOWN_GRAM = "model.layers.0.mlp.down_proj.output_gram"
DOWN_GRADIENT = "model.layers.0.mlp.down_proj.output_gradient_gram"
LORA_A = f"base_model.model.{Q}.lora_A.weight"


@dataclass(frozen=True)
class Bad:
    """`damage` changes a copy of the good folder `source`; the reader names `file` and `field`."""

    rule: str
    what: str
    source: str
    file: str
    field: str
    damage: Damage

    @property
    def folder(self) -> str:
        return f"bad-{self.rule}-{self.what}"


def _calibration() -> list[Bad]:
    manifest, shard, source = "calibration.json", "calibration-00001-of-00001.safetensors", "ok-output-side"
    layer = "model.layers.0.mlp.down_proj"
    twice = lambda data: data.replace(b'"format_version": 1', b'"format_version": 1, "format_version": 1')  # noqa: E731
    other = "model.layers.0.self_attn.q_proj"

    def json_case(rule: str, what: str, field: str, change: Callable[[Any], object], good: str = source) -> Bad:
        return Bad(rule, what, good, manifest, field, in_json(manifest, change))

    def gradient_case(rule: str, what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return json_case(rule, what, field, change, "ok-gradients")

    def experts_case(
        rule: str, what: str, field: str, change: Callable[[Any], object], good: str = "ok-experts"
    ) -> Bad:
        return json_case(rule, what, field, change, good)

    return [
        Bad("C1", "duplicate-key", source, manifest, "", in_bytes(manifest, twice)),
        Bad("C1", "byte-order-mark", source, manifest, "", in_bytes(manifest, lambda data: b"\xef\xbb\xbf" + data)),
        # Made when version 2 was to come. It still breaks the rule: version 2 has a field of its own.
        json_case("C2", "later-version", "format_version", lambda m: m.update(format_version=2)),
        json_case("C2", "version-3", "format_version", lambda m: m.update(format_version=3)),
        json_case("C2", "version-4", "format_version", lambda m: m.update(format_version=4)),
        json_case("C2", "version-5", "format_version", lambda m: m.update(format_version=5)),
        json_case("C2", "other-format", "format", lambda m: m.update(format="emloc-emulator")),
        json_case("C3", "unknown-field", "comment", lambda m: m.update(comment="hello")),
        json_case("C3", "path-outside", "shards.0", lambda m: m.update(shards=["../" + shard])),
        json_case("C3", "boolean-count", "grams.0.tokens", lambda m: m["grams"][0].update(tokens=True)),
        gradient_case("C3", "gradient-in-version-1", "grams.1.side", _as_version_1("loss")),
        gradient_case("C3", "gradient-without-energy", "grams.1.energy", lambda m: m["grams"][1].pop("energy")),
        gradient_case(
            "C3", "gradient-of-two-layers", "grams.1.layers", lambda m: m["grams"][1]["layers"].append(other)
        ),
        gradient_case("C3", "unknown-loss", "loss", lambda m: m.update(loss="hinge")),
        gradient_case("C3", "squared-error-in-version-2", "loss", lambda m: m.update(loss="squared-error")),
        json_case("C3", "target-of-tokens", "loss", lambda m: m.update(loss="next-token"), "ok-squared-error"),
        Bad("C4", "absent-shard", source, manifest, f"shards.{shard}", remove(shard)),
        Bad("C4", "truncated", source, shard, "", in_bytes(shard, lambda data: data[:-4])),
        Bad("C4", "offset-past-end", source, shard, DOWN_GRAM, in_header(shard, _offsets(DOWN_GRAM, [8, 32]))),
        Bad("C5", "wrong-dtype", source, manifest, DOWN_GRAM, in_header(shard, _fields(DOWN_GRAM, dtype="I32"))),
        json_case(
            "C5", "gram-without-tensor", "gone", lambda m: m["grams"][0].update(tensor="gone"), "ok-shared-input"
        ),
        json_case(
            "C6", "layer-without-gram", f"layers.{other}", lambda m: m["layers"].update({other: m["layers"][layer]})
        ),
        gradient_case(
            "C6", "two-gradients", f"{Q}.input_gradient_gram", lambda m: m["grams"][2].update(layers=[layer])
        ),
        gradient_case(
            "C7", "gradient-on-wrong-side", DOWN_GRADIENT, lambda m: m["grams"][1].update(side="input_gradient")
        ),
        json_case("C7", "wrong-side", DOWN_GRAM, lambda m: m["grams"][0].update(side="input")),
        Bad("C8", "changed-value", source, manifest, DOWN_GRAM, in_tensor(shard, DOWN_GRAM, lambda t: t.add_(1))),
        Bad(
            "C9",
            "negative-diagonal",
            source,
            manifest,
            DOWN_GRAM,
            in_tensor(shard, DOWN_GRAM, lambda t: t[:1].fill_(-1), manifest=manifest),
        ),
        json_case("C10", "unreached-layer-has-data", f"unreached.{layer}", lambda m: m["unreached"].append(layer)),
        json_case("C11", "no-gradient", "grams", lambda m: m.update(format_version=2, loss="next-token")),
        experts_case("C3", "experts-in-version-1", "experts", lambda m: (m.pop("loss"), m.update(format_version=1))),
        experts_case("C6", "expert-beyond-the-last", f"{EXPERTS}.0.input_gram", _rename_expert),
        experts_case("C11", "gradients-of-no-loss", "grams", lambda m: m.update(loss=None), "ok-experts-gradients"),
        experts_case("C12", "expert-without-gram", f"experts.{EXPERTS}.2", lambda m: m["unreached"].clear()),
        experts_case(
            "C12", "unreached-with-gram", f"experts.{EXPERTS}.0", lambda m: m["unreached"].append(f"{EXPERTS}.0")
        ),
    ]


def _emulator() -> list[Bad]:
    manifest, config, weights = "emulator.json", "config.json", "model.safetensors"
    source, sharded, index = "ok-plain-svd", "ok-linear-shards", "model.safetensors.index.json"

    def in_manifest(rule: str, what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return Bad(rule, what, source, manifest, field, in_json(manifest, change))

    def in_config(rule: str, what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return Bad(rule, what, source, config, field, in_json(config, change))

    def experts_case(rule: str, what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return Bad(rule, what, "ok-experts", manifest, field, in_json(manifest, change))

    def weighted_case(what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return Bad("E3", what, "ok-weighted", manifest, field, in_json(manifest, change))

    def values_case(what: str, factor: str, field: str, change: Callable[[torch.Tensor], object]) -> Bad:
        damage = in_tensor(weights, f"{UP}.{factor}", change, manifest=manifest)
        return Bad("E6", what, source, manifest, field, damage)

    return [
        Bad("E1", "not-json", source, manifest, "", in_bytes(manifest, lambda data: data[: len(data) // 2])),
        # Made when version 2 was to come. It still breaks the rule: version 2 has a field of its own.
        in_manifest("E2", "later-version", "format_version", lambda m: m.update(format_version=2)),
        in_manifest("E2", "version-3", "format_version", lambda m: m.update(format_version=3)),
        in_manifest("E2", "version-5", "format_version", lambda m: m.update(format_version=5)),
        in_manifest("E3", "missing-field", "base", lambda m: m.pop("base")),
        in_manifest("E3", "fraction-for-count", "parameters", lambda m: m.update(parameters=50.5)),
        weighted_case("weighting-in-version-1", "weighting", lambda m: m.update(format_version=1)),
        weighted_case("weighted-without-calibration", "calibration", lambda m: m.update(calibration=None)),
        weighted_case("undamped", "weighting.damping", lambda m: m["weighting"].update(damping=0.0)),
        Bad(
            "E15",
            "sensitivity-of-a-dense-layer",
            "ok-weighted",
            manifest,
            "weighting.sensitivity.lm_head",
            in_json(manifest, lambda m: m["weighting"]["sensitivity"].update(lm_head=1.0)),
        ),
        Bad("E4", "absent-shard", sharded, index, "weight_map", remove("model-00003-of-00003.safetensors")),
        Bad("E4", "path-outside", sharded, index, "weight_map.lm_head.weight", in_json(index, _outside)),
        Bad("E4", "unlisted-tensor", sharded, "model-00002-of-00003.safetensors", UP + ".U", in_json(index, _unlisted)),
        Bad("E4", "overlap", source, weights, "lm_head.weight", in_header(weights, _offsets(f"{UP}.S", [0, 8]))),
        Bad("E4", "overlong-header", source, weights, "header", in_bytes(weights, lambda data: b"\xff" * 8 + data[8:])),
        Bad("E5", "wrong-shape", source, manifest, f"{UP}.U", in_header(weights, _fields(f"{UP}.U", shape=[2, 8]))),
        in_manifest(
            "E5", "more-energetic-than-rank", f"layers.{UP}.rank", lambda m: m["layers"][UP].update(energetic=3)
        ),
        values_case("nan", "Vh", UP, lambda t: t[0, :1].fill_(float("nan"))),
        values_case("unsorted", "S", f"{UP}.S", lambda t: t.copy_(t.flip(0).clone())),
        in_config("E7", "other-rank", "emloc", lambda c: c["emloc"]["ranks"].update({UP: 1})),
        Bad("E7", "other-version", "ok-weighted", config, "emloc", in_json(config, _config_of_version_1)),
        Bad("E8", "guard-missing", source, manifest, "layers", _without(manifest, weights, f"{UP}.weight")),
        in_manifest("E9", "unlisted-tensor", "tensors.lm_head.weight", lambda m: m["tensors"].pop("lm_head.weight")),
        Bad(
            "E10", "changed-value", source, manifest, "lm_head.weight", in_tensor(weights, "lm_head.weight", torch.neg_)
        ),
        in_config("E11", "stock-class", "architectures", lambda c: c.update(architectures=["LlamaForCausalLM"])),
        in_config("E12", "code-from-elsewhere", "auto_map.AutoModelForCausalLM", _remote_code),
        in_config("E12", "code-for-the-tokenizer", "auto_map.AutoTokenizer", _tokenizer_code),
        Bad("E12", "code-missing", source, config, "auto_map.AutoModelForCausalLM", remove("modeling_emloc.py")),
        in_config("E13", "quantised", "quantization_config", lambda c: c.update(quantization_config={})),
        experts_case("E3", "no-experts", "experts", lambda m: m.update(experts={})),
        experts_case(
            "E5", "another-number-of-experts", f"{EXPERTS}_U", lambda m: m["experts"][EXPERTS]["experts"].pop()
        ),
        experts_case("E15", "sensitivity-of-no-expert", f"weighting.sensitivity.{EXPERTS}.3", _fourth_expert),
        Bad(
            "E6",
            "unsorted-expert",
            "ok-experts",
            manifest,
            f"{EXPERTS}.S",
            in_tensor(weights, f"{EXPERTS}_S", lambda t: t[2].copy_(t[2].flip(0).clone()), manifest=manifest),
        ),
        Bad(
            "E8",
            "guard-of-experts-missing",
            "ok-experts-alone",
            manifest,
            "layers",
            _without(manifest, weights, EXPERTS),
        ),
        Bad("E19", "stack-and-layer", "ok-experts", manifest, f"experts.{EXPERTS}", in_json(manifest, _layer_too)),
        in_manifest("E2", "version-6", "format_version", lambda m: m.update(format_version=6)),
        Bad("E20", "path-in-code", "ok-own-code", manifest, "code.../own.py", in_json(manifest, _code_outside)),
        Bad("E12", "configuration-from-elsewhere", "ok-own-code", config, "auto_map.AutoConfig", _other_config(config)),
        Bad("E20", "changed-code", "ok-own-code", manifest, "code.modeling_own.py", _append("modeling_own.py")),
        Bad(
            "E20", "code-missing", "ok-own-code", manifest, "code.configuration_own.py", remove("configuration_own.py")
        ),
        in_manifest("E14", "wrong-sum", "parameters", lambda m: m.update(parameters=m["parameters"] + 1)),
        *_emulator_of_diffusers(),
    ]


def _emulator_of_diffusers() -> list[Bad]:
    manifest, config, good = "emulator.json", "config.json", "ok-diffusers"
    stock, stem = "model.safetensors", "diffusion_pytorch_model"

    def rename(folder: Path) -> None:
        (folder / f"{stem}.safetensors").rename(folder / stock)

    def method(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "bitsandbytes"

    def uncalibrated(manifest: dict[str, Any]) -> None:
        manifest["calibration"] = None

    other_class = lambda c: c.update(_class_name="EmlocFluxTransformer2DModel")  # noqa: E731
    return [
        Bad("E4", "name-of-another-library", good, f"{stem}.safetensors", "", rename),
        Bad("E16", "other-method", good, config, "quantization_config", in_json(config, method)),
        Bad("E17", "other-class", good, config, "_class_name", in_json(config, other_class)),
        Bad(
            "E18",
            "weighted-without-calibration",
            "ok-diffusers-weighted-shards",
            manifest,
            "calibration",
            in_json(manifest, uncalibrated),
        ),
    ]


def _adapter() -> list[Bad]:
    config, weights, manifest = "adapter_config.json", "adapter_model.safetensors", "emloc.json"
    trained, patterns, corrected = "ok-trained", "ok-trained-rslora-patterns", "ok-corrected"
    scaled = "ok-chosen-scaled"

    def in_config(rule: str, what: str, field: str, change: Callable[[Any], object], good: str = trained) -> Bad:
        return Bad(rule, what, good, config, field, in_json(config, change))

    def in_manifest(rule: str, what: str, field: str, change: Callable[[Any], object]) -> Bad:
        return Bad(rule, what, corrected, manifest, field, in_json(manifest, change))

    def chosen_case(rule: str, what: str, field: str, change: Callable[[Any], object], good: str = scaled) -> Bad:
        return Bad(rule, what, good, manifest, field, in_json(manifest, change))

    def candidate_case(what: str, number: int, field: str, **values: object) -> Bad:
        place = f"selection.candidates.{number}{field}"
        return chosen_case("A14", what, place, lambda m: m["selection"]["candidates"][number].update(values))

    unmark = in_header(weights, lambda header: header["__metadata__"].pop("emloc"))
    nested = "rank_pattern.(a+)\\1"
    return [
        Bad("A1", "not-utf8", trained, config, "", in_bytes(config, lambda data: data.replace(b"LORA", b"LOR\xc4"))),
        in_config("A2", "other-peft-type", "peft_type", lambda c: c.update(peft_type="IA3")),
        Bad("A3", "absent", trained, weights, "", remove(weights)),
        Bad("A3", "trailing-bytes", trained, weights, "", in_bytes(weights, lambda data: data + b"\0\0\0\0")),
        Bad("A4", "half-a-pair", trained, weights, LORA_A, in_header(weights, _rename(LORA_A, "orphan"))),
        Bad("A4", "other-rank", trained, weights, UP, in_json(config, lambda c: c.update(r=3))),
        Bad("A5", "nan", trained, weights, LORA_A, in_tensor(weights, LORA_A, lambda t: t[0].fill_(float("nan")))),
        in_config("A6", "alpha-is-true", "lora_alpha", lambda c: c.update(lora_alpha=True)),
        in_config("A6", "back-reference", nested, lambda c: c.update(rank_pattern={"(a+)\\1": 4}), patterns),
        Bad("A7", "not-a-number", corrected, manifest, "", in_bytes(manifest, lambda d: d.replace(b"3.0", b"NaN"))),
        # Made when version 2 was to come. It still breaks the rule: version 2 has a field of its own.
        in_manifest("A8", "later-version", "format_version", lambda m: m.update(format_version=2)),
        in_manifest("A8", "version-3", "format_version", lambda m: m.update(format_version=3)),
        in_manifest("A8", "version-4", "format_version", lambda m: m.update(format_version=4)),
        in_manifest("A8", "version-5", "format_version", lambda m: m.update(format_version=5)),
        in_manifest("A9", "unknown-field", "layers." + Q + ".loss", lambda m: m["layers"][Q].update(loss=0.5)),
        chosen_case("A9", "selection-in-version-1", "selection", lambda m: m.update(format_version=1)),
        chosen_case("A9", "loss-of-nothing", "selection.candidates", lambda m: m["selection"].update(candidates=[])),
        Bad("A10", "mark-missing", corrected, manifest, "", unmark),
        Bad("A10", "mark-of-version-1", scaled, weights, "emloc", _mark_version_1(weights)),
        Bad("A10", "manifest-missing", corrected, weights, "emloc", remove(manifest)),
        Bad("A11", "changed-value", corrected, manifest, f"tensors.{LORA_A}", in_tensor(weights, LORA_A, torch.neg_)),
        in_manifest("A12", "tensor-not-accounted-for", "unchanged.base_model.model.score.weight", _forget_head),
        Bad(
            "A13", "other-alpha", corrected, manifest, f"layers.{Q}", in_json(config, lambda c: c.update(lora_alpha=4))
        ),
        candidate_case("none-at-a-scale", 0, ".scale", scale=0.5),
        candidate_case("twice-the-same", 2, "", adapter="trained"),
        chosen_case("A14", "without-reference", "selection.candidates", lambda m: m["selection"]["candidates"].pop(3)),
        chosen_case("A15", "chosen-is-none", "selection.chosen", lambda m: m["selection"].update(chosen=0)),
        chosen_case("A15", "chosen-is-absent", "selection.chosen", lambda m: m["selection"].update(chosen=4)),
        chosen_case("A16", "corrected-as-trained", f"layers.{Q}", lambda m: m["selection"].update(chosen=1)),
        chosen_case("A9", "refined-by-nothing", "refinements", lambda m: m.update(refinements=[]), "ok-refined"),
        chosen_case(
            "A16", "refined-as-trained", f"layers.{Q}", lambda m: m["selection"].update(chosen=1), "ok-refined"
        ),
        chosen_case("A20", "refined-component", "component", lambda m: m.update(component="unet"), "ok-refined"),
        *_diffusers_lora(),
    ]


def _diffusers_lora() -> list[Bad]:
    weights, manifest, good = "pytorch_lora_weights.safetensors", "emloc.json", "ok-diffusers"
    A = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    B, alpha = A.replace("lora_A", "lora_B"), "transformer.transformer_blocks.0.attn.to_k.alpha"

    def to_unet(header: dict[str, Any]) -> None:
        for name in (A, B):
            header[name.replace("transformer.", "unet.", 1)] = header.pop(name)

    def to_kohya(header: dict[str, Any]) -> None:
        for name in [name for name in header if name.startswith("transformer.") and ".lora_" in name]:
            header[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = header.pop(name)

    text = lambda header: header["__metadata__"].update(lora_adapter_metadata="{")  # noqa: E731
    described = lambda header: header["__metadata__"].update(lora_adapter_metadata="{}")  # noqa: E731
    return [
        Bad("A17", "metadata-is-no-json", good, weights, "lora_adapter_metadata", in_header(weights, text)),
        Bad("A18", "two-components", good, weights, "", in_header(weights, to_unet)),
        Bad("A18", "names-of-another-program", good, weights, "", in_header(weights, to_kohya)),
        Bad(
            "A19",
            "negative-alpha",
            "ok-diffusers-alpha",
            weights,
            alpha,
            in_tensor(weights, alpha, torch.Tensor.neg_),
        ),
        Bad("A19", "alpha-beside-metadata", "ok-diffusers-alpha", weights, alpha, in_header(weights, described)),
        Bad(
            "A20",
            "other-component",
            "ok-diffusers-corrected",
            manifest,
            "component",
            in_json(manifest, lambda m: m.update(component="unet")),
        ),
    ]


def _as_version_1(field: str) -> Callable[[dict[str, Any]], object]:
    """An earlier version's number, without the field that tells the later one."""
    return lambda manifest: (manifest.pop(field), manifest.update(format_version=1))


def _config_of_version_1(config: dict[str, Any]) -> None:
    config["emloc"]["format_version"] = 1


def _mark_version_1(weights: str) -> Damage:
    mark = json.dumps({"corrected": True, "format_version": 1})
    return in_header(weights, lambda header: header["__metadata__"].update(emloc=mark))


def _offsets(name: str, offsets: list[int]) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(data_offsets=offsets)


def _fields(name: str, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header[name].update(changes)


def _rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header.update({new: header.pop(old)})


def _outside(index: dict[str, Any]) -> None:
    index["weight_map"]["lm_head.weight"] = "../model.safetensors"


def _unlisted(index: dict[str, Any]) -> None:
    del index["weight_map"][f"{UP}.U"]


def _remote_code(config: dict[str, Any]) -> None:
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling_emloc.EmlocLlamaForCausalLM"


def _tokenizer_code(config: dict[str, Any]) -> None:
    config["auto_map"]["AutoTokenizer"] = "modeling_emloc.EmlocTokenizer"


def _forget_head(manifest: dict[str, Any]) -> None:
    manifest["unchanged"].remove("base_model.model.score.weight")


def _rename_expert(manifest: dict[str, Any]) -> None:
    manifest["grams"][0].update(layers=[f"{EXPERTS}.3"])


def _fourth_expert(manifest: dict[str, Any]) -> None:
    manifest["weighting"]["sensitivity"][f"{EXPERTS}.3"] = 1.0


def _code_outside(manifest: dict[str, Any]) -> None:
    manifest["code"]["../own.py"] = manifest["code"].pop("modeling_own.py")


def _other_config(config: str) -> Damage:
    """Code for the configuration in a file that the manifest does not know."""
    return in_json(config, lambda c: c["auto_map"].update(AutoConfig="modeling_emloc.OwnConfig"))


def _append(file: str) -> Damage:
    return in_bytes(file, lambda data: data + b"print('changed')\n")


def _layer_too(manifest: dict[str, Any]) -> None:
    layer = {**next(iter(manifest["layers"].values())), "out_features": 8, "rank": 2}
    manifest["layers"][EXPERTS] = layer


def _without(manifest: str, weights: str, guard: str) -> Damage:
    """The guard under another name: all else stays right."""
    other = "guard"
    renamed = in_json(manifest, lambda m: m["tensors"].update({other: m["tensors"].pop(guard)}))
    return both(in_header(weights, _rename(guard, other)), renamed)


BAD = {"calibration": _calibration(), "emulator": _emulator(), "adapter": _adapter()}
