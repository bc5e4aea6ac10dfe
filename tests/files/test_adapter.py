"""PEFT's adapters are read as PEFT reads them, and what means nothing is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError
from emloc_tools.files.adapter import Adapter
from tests.files.lora import PREFIX, change, train


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
    """The first pattern of each kind fits no module, and `re` tries every way to split a name before it says so."""
    train(tmp_path)
    path, long = tmp_path / "adapter_model.safetensors", "a" * 60 + ".up"
    save_file({name.replace("block.1.up", long): value for name, value in load_file(path).items()}, path)
    rank, alpha = {"([a-z.0-9]+)+!": 9}, {"([a-z.0-9]+)+!": 5, "([a-z.0-9]+)+p": 7}
    change(tmp_path / "adapter_config.json", lambda c: c.update(rank_pattern=rank, alpha_pattern=alpha))
    adapter = Adapter(tmp_path)
    found = {name: (keys.rank, keys.scaling) for name, keys in adapter.loras.items()}
    adapter.close()
    assert found == {"block.0.up": (2, 3.5), long: (2, 3.5), "block.0.down": (2, 1.5), "block.1.down": (2, 1.5)}
    # Control: PEFT's own expression.
    question = f"import re; re.match(r'(.*\\.)?([a-z.0-9]+)+!$', {long!r})"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", question], timeout=1)


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
