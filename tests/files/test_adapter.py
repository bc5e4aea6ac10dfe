"""PEFT's adapters are read as PEFT reads them; corrected ones are known, protected and still PEFT's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import Adapter, write_adapter
from emloc_tools.files.manifest import made_by
from tests.files.making import BASE, HASH

PREFIX = "base_model.model."
NAMES = ["block.0.up", "block.0.down", "block.1.up", "block.1.down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Tiny(nn.Module):
    """Two blocks and a head; `config` is what PEFT looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.score = nn.ModuleList(Block() for _ in range(2)), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return self.score(x)


def train(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT adapter of random values, saved by PEFT."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "down"], **options}
    peft = get_peft_model(Tiny(), LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    peft.save_pretrained(folder)
    return peft


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down": 3}, "alpha_pattern": {"up": 8}},
        {"rank_pattern": {r"block\.1\..*": 4, "up": 1}, "alpha_pattern": {"^block.0.(up|down)": 5}, "use_rslora": True},
        {"alpha_pattern": {"block.1": 7, "1.up": 9}, "target_modules": "all-linear"},
        {"modules_to_save": ["score"], "target_modules": ["up"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora with patterns", "all-linear", "modules_to_save"],
)
def test_pairs_ranks_and_scalings_are_those_that_peft_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = train(tmp_path, **options)
    adapter = Adapter(tmp_path)
    layers = {name.removeprefix(PREFIX): m for name, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter.loras) == set(layers)
    for name, layer in layers.items():
        A, B = adapter.pair(name)
        assert torch.equal(A, layer.lora_A["default"].weight)
        assert torch.equal(B, layer.lora_B["default"].weight)
        assert adapter.loras[name].rank == layer.r["default"]
        assert adapter.loras[name].scaling == layer.scaling["default"]
        assert torch.allclose(adapter.loras[name].scaling * B @ A, layer.get_delta_weight("default"), atol=1e-6)
    saved = [f"{PREFIX}score.bias", f"{PREFIX}score.weight"] if "modules_to_save" in options else []
    assert adapter.other_tensors == saved
    assert not adapter.corrected
    adapter.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_keep_the_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    train(tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    adapter = Adapter(tmp_path)
    for name, value in stored.items():
        assert adapter.read(name).dtype == value.dtype == dtype
        assert torch.equal(adapter.read(name), value)
    adapter.close()


def test_the_hash_is_over_names_and_content_hashes(tmp_path: Path) -> None:
    train(tmp_path)
    text = ""
    for name, value in sorted(load_file(tmp_path / "adapter_model.safetensors").items()):
        content = xxhash.xxh3_128(f"F32 {list(value.shape)} ".encode() + value.numpy().tobytes()).hexdigest()
        text += f"{name} xxh3_128:{content}\n"
    adapter = Adapter(tmp_path)
    assert adapter.hash == f"xxh3_128:{xxhash.xxh3_128(text.encode()).hexdigest()}"
    adapter.close()


def change(path: Path, update: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    update(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("update", "field"),
    [
        (lambda c: c.pop("r"), "r"),
        (lambda c: c.update(r=0), "r"),
        (lambda c: c.update(r=-2), "r"),
        (lambda c: c.update(r=2.0), "r"),
        (lambda c: c.update(r=True), "r"),
        (lambda c: c.update(r="2"), "r"),
        (lambda c: c.update(r=[2]), "r"),
        (lambda c: c.update(r=10**400), "r"),
        (lambda c: c.update(lora_alpha=None), "lora_alpha"),
        (lambda c: c.update(lora_alpha=0), "lora_alpha"),
        (lambda c: c.update(lora_alpha=-1.5), "lora_alpha"),
        (lambda c: c.update(lora_alpha=10**400), "lora_alpha"),
        (lambda c: c.update(use_rslora="false"), "use_rslora"),
        (lambda c: c.update(use_rslora=0), "use_rslora"),
        (lambda c: c.update(rank_pattern=["up"]), "rank_pattern"),
        (lambda c: c.update(alpha_pattern="up"), "alpha_pattern"),
        (lambda c: c.update(alpha_pattern={"up": None}), "alpha_pattern.up"),
        (lambda c: c.update(alpha_pattern={"up": {"x": 1}}), "alpha_pattern.up"),
        (lambda c: c.update(rank_pattern={"(": 2}), "rank_pattern.("),
        (lambda c: c.update(alpha_pattern={"(?=a)": 2}), "alpha_pattern.(?=a)"),
    ],
)
def test_a_rank_alpha_or_pattern_that_means_nothing_is_refused(
    tmp_path: Path, update: Callable[[Any], object], field: str
) -> None:
    train(tmp_path)
    change(tmp_path / "adapter_config.json", update)
    with pytest.raises(FormatError) as caught:
        Adapter(tmp_path)
    assert (caught.value.rule, caught.value.field) == ("A6", field)
    assert caught.value.file == str(tmp_path / "adapter_config.json")


def test_an_alpha_that_json_reads_as_infinite_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 3', '"lora_alpha": 1e999'))
    with pytest.raises(FormatError, match=r"lora_alpha: must be a positive number .* found inf .*A6"):
        Adapter(tmp_path)


def test_a_pattern_that_would_hang_peft_is_answered(tmp_path: Path) -> None:
    train(tmp_path)
    change(tmp_path / "adapter_config.json", lambda c: c.update(rank_pattern={"([a-z.0-9]+)+!": 9}))
    Adapter(tmp_path).close()


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (torch.full((2, 4), float("nan")), "A5"),
        (torch.full((2, 4), float("inf"), dtype=torch.bfloat16), "A5"),
        (torch.ones(2, 4, dtype=torch.int32), "A4"),
        (torch.ones(2, 4, dtype=torch.float8_e4m3fn), "A4"),
        (torch.ones(3, 4), "A4"),
        (torch.ones(2, 4, 1, 1), "A4"),
        (torch.ones(8), "A4"),
        (None, "A4"),
    ],
)
def test_a_pair_that_cannot_be_multiplied_is_refused(tmp_path: Path, value: torch.Tensor | None, rule: str) -> None:
    train(tmp_path)
    path, key = tmp_path / "adapter_model.safetensors", f"{PREFIX}block.0.up.lora_A.weight"
    stored = load_file(path)
    del stored[key]
    save_file(stored if value is None else {**stored, key: value}, path)
    with pytest.raises(FormatError) as caught:
        Adapter(tmp_path).pair("block.0.up")
    assert caught.value.rule == rule
    assert "block.0.up" in caught.value.field


def test_other_tensors_may_have_any_dtype_but_must_be_finite(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    eight = torch.tensor([0x38, 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 1.0 and NaN
    others = {"steps": torch.tensor(7), "fine": eight[:1].clone(), "broken": eight[1:].clone()}
    save_file({**load_file(path), **others}, path)
    adapter = Adapter(tmp_path)
    assert adapter.read("steps").item() == 7
    assert adapter.read("fine").float().item() == 1
    with pytest.raises(FormatError, match=r"broken: holds NaN or infinity.*A5"):
        adapter.read("broken")
    adapter.close()


def test_a_pickled_adapter_is_not_opened_and_the_remedy_is_named(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    os.mkfifo(tmp_path / "adapter_model.bin")  # whoever opens it waits for ever
    with pytest.raises(FormatError, match=r"adapter_model\.bin is pickled and is never opened.*A3"):
        Adapter(tmp_path)


def test_weights_behind_a_link_that_leaves_the_folder_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "adapter_model.safetensors").symlink_to("../elsewhere")
    with pytest.raises(FormatError, match=r"leads out of its folder.*A3"):
        Adapter(tmp_path / "a")


def correct(folder: Path, trained: Path) -> dict[str, torch.Tensor]:
    """Write a corrected adapter: `block.0.up` has new factors, all else is unchanged."""
    folder.mkdir()
    adapter = Adapter(trained)
    tensors = {name: adapter.read(name) for name in adapter.tensors.names()}
    keys = adapter.loras["block.0.up"]
    tensors |= {keys.A: torch.eye(2, 4), keys.B: torch.arange(12.0).view(6, 2)}
    report = {"directions": 2, "clamped": 1, "delta_norm": 0.5, "update_norm": 2.0}
    write_adapter(
        folder,
        {**adapter.config, "base_model_name_or_path": "example/base", "unknown_field": [1]},
        tensors,
        fields={
            "made_by": made_by("test"),
            "base": BASE,
            "emulator": HASH,
            "trained_adapter": adapter.hash,
            "clamp": None,
            "layers": {"block.0.up": {"rank": keys.rank, "scaling": keys.scaling, **report}},
            "unchanged": [name for name in tensors if name not in (keys.A, keys.B)],
        },
    )
    adapter.close()
    return tensors


@pytest.fixture
def corrected(tmp_path: Path) -> Path:
    train(tmp_path / "trained", use_rslora=True)
    correct(tmp_path / "corrected", tmp_path / "trained")
    return tmp_path / "corrected"


def test_peft_loads_a_corrected_adapter_and_gets_its_values(tmp_path: Path) -> None:
    train(tmp_path / "trained", use_rslora=True)
    tensors = correct(tmp_path / "corrected", tmp_path / "trained")
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path / "corrected")
    ours = Adapter(tmp_path / "corrected")
    assert ours.corrected
    for name in NAMES:
        layer, keys = loaded.get_submodule(f"{PREFIX}{name}"), ours.loras[name]
        assert torch.equal(layer.lora_A["default"].weight, tensors[keys.A])
        assert torch.equal(layer.lora_B["default"].weight, tensors[keys.B])
        assert layer.scaling["default"] == keys.scaling
    ours.close()


def test_the_mark_is_in_the_header_and_unknown_fields_pass_through(corrected: Path) -> None:
    with safe_open(corrected / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["emloc"]) == {"corrected": True, "format_version": 1}
    assert json.loads((corrected / "adapter_config.json").read_text())["unknown_field"] == [1]


def test_files_that_are_copied_one_by_one_still_say_that_they_are_corrected(corrected: Path) -> None:
    (corrected / "emloc.json").unlink()
    with pytest.raises(FormatError, match=r"marks a corrected adapter, but emloc\.json is gone.*A10"):
        Adapter(corrected)


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "yes",
        "{}",
        '{"corrected": true}',
        '{"corrected": false, "format_version": 1}',
        '{"corrected": true, "format_version": 2}',
        '{"corrected": 1, "format_version": 1}',
        '{"corrected": true, "format_version": true}',
        '{"corrected": true, "format_version": 1, "format_version": 1}',
        '{"corrected": [], "format_version": {}}',
    ],
)
def test_any_other_mark_is_refused(corrected: Path, mark: str) -> None:
    path = corrected / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "emloc": mark})
    with pytest.raises(FormatError) as caught:
        Adapter(corrected)
    assert (caught.value.rule, caught.value.field) == ("A10", "emloc")


def test_a_corrected_adapter_that_was_trained_further_is_noticed(corrected: Path) -> None:
    """A trainer that keeps the metadata, or a merge of adapters, would otherwise pass for the corrected one."""
    path = corrected / "adapter_model.safetensors"
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(stored, path, metadata=metadata)
    Adapter(corrected).close()  # written again without a change
    stored[f"{PREFIX}block.1.up.lora_B.weight"][0, 0] += 1e-3
    save_file(stored, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"block\.1\.up\.lora_B\.weight: is not what was written.*A11"):
        Adapter(corrected)


@pytest.mark.parametrize(
    ("update", "rule"),
    [
        (lambda m: m["layers"]["block.0.up"].update(scaling=1.5), "A13"),
        (lambda m: m["layers"]["block.0.up"].update(rank=3), "A13"),
        (lambda m: m["layers"].update(absent=m["layers"]["block.0.up"]), "A12"),
        (lambda m: m["unchanged"].append(f"{PREFIX}block.0.up.lora_A.weight"), "A12"),
        (lambda m: m["unchanged"].append(m["unchanged"][0]), "A12"),
        (lambda m: m["unchanged"].pop(), "A12"),
        (lambda m: m["tensors"].popitem(), "A11"),
        (lambda m: m["tensors"].update(absent=HASH), "A11"),
    ],
)
def test_a_report_that_is_not_of_this_adapter_is_refused(
    corrected: Path, update: Callable[[Any], object], rule: str
) -> None:
    change(corrected / "emloc.json", update)
    with pytest.raises(FormatError) as caught:
        Adapter(corrected)
    assert caught.value.rule == rule


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    train(tmp_path / "trained")
    for name in ("one", "two"):
        correct(tmp_path / name, tmp_path / "trained")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
