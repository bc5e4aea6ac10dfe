"""verify --fold-scaling: one lora_alpha for all pairs, and every weight gains what it gained before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emloc_tools.errors import NumericalError, UnsupportedError
from emloc_tools.files.adapter import Adapter
from emloc_tools.stages.verify import verify
from tests.adapters import subjects
from tests.adapters.subjects import CONFIG, PREFIX, WEIGHTS, Subject

SCALINGS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"q_proj": 9, r"layers\.1\..*": 1}},
    "ranks": {"rank_pattern": {"down_proj": 2, r"layers\.0\..*": 3}},
    "ranks, alphas and rsLoRA": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 11}, "use_rslora": True},
    "an embedding": {
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"embed_tokens": 2},
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("subject"), target_modules=["q_proj", "down_proj"], use_rslora=True)


def alpha_over_rank(folder: Path) -> dict[str, torch.Tensor]:
    """What a program computes that reads lora_alpha and the rank of each tensor, as llama.cpp does; float64."""
    tensors, alpha = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())["lora_alpha"]
    found = {}
    for name, A in tensors.items():
        other = name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        if name != other:
            product = alpha / A.shape[0] * tensors[other].double() @ A.double()
            module = name.removeprefix(PREFIX).partition(".lora_")[0]
            found[module] = product.T if "embedding" in name else product
    return found


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_every_weight_gains_what_peft_gave_it(subject: Subject, tmp_path: Path, options: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], **options}
    subjects.train(subject.model, subject.base, tmp_path / "trained", **settings)
    trained, _ = subjects.loaded(subject, tmp_path / "trained")
    meant = subjects.deltas(trained)
    verify(adapter=tmp_path / "trained", base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / CONFIG).read_text())
    assert (config["use_rslora"], config["alpha_pattern"]) == (False, {})
    folded, missing = subjects.loaded(subject, tmp_path / "folded")
    assert missing == []
    assert subjects.furthest(subjects.deltas(folded), meant) < 1e-6
    assert subjects.furthest(alpha_over_rank(tmp_path / "folded"), meant) < 1e-6
    before = subjects.furthest(alpha_over_rank(tmp_path / "trained"), meant)
    if options.keys() & {"use_rslora", "alpha_pattern"}:
        assert before > 0.05  # the control: alpha and rank alone did not give it
    else:
        assert before < 1e-6


def test_another_alpha_is_noticed(subject: Subject, tmp_path: Path) -> None:
    """The control of the comparison itself."""
    verify(adapter=subject.adapter, base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / CONFIG).read_text())
    wrong = subjects.changed(tmp_path / "folded", tmp_path / "wrong", lora_alpha=1.01 * config["lora_alpha"])
    meant = subjects.deltas(subjects.loaded(subject, subject.adapter)[0])
    assert subjects.furthest(subjects.deltas(subjects.loaded(subject, wrong)[0]), meant) > 0.009


def test_pairs_of_one_scaling_keep_their_bytes(subject: Subject, tmp_path: Path) -> None:
    """The alpha takes up the scaling of rsLoRA: 6 / sqrt(4) = 12 / 4."""
    result = verify(adapter=subject.adapter, base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    assert (result.folded, result.settings) == ({}, {"lora_alpha": [6, 12], "use_rslora": [True, False]})
    before, after = (load_file(folder / WEIGHTS) for folder in (subject.adapter, tmp_path / "folded"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_only_the_pairs_that_differ_from_most_are_multiplied_and_recorded(subject: Subject, tmp_path: Path) -> None:
    alphas = {"layers.0.self_attn.q_proj": 12}
    subjects.train(subject.model, subject.base, tmp_path / "trained", target_modules=["q_proj"], alpha_pattern=alphas)
    output = tmp_path / "folded"
    result = verify(adapter=tmp_path / "trained", base=str(subject.base), fold_scaling=True, output=output)
    assert result.folded == {"model.layers.0.self_attn.q_proj": 2.0}
    note = json.loads((output / "emloc-verify.json").read_text())
    assert note["folded"] == result.folded
    assert note["settings"] == {"alpha_pattern": [alphas, {}]}
    before, after = (load_file(folder / WEIGHTS) for folder in (tmp_path / "trained", output))
    doubled = [name for name in before if not torch.equal(before[name], after[name])]
    assert doubled == [f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(after[doubled[0]], 2 * before[doubled[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(subject: Subject, tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = subjects.changed(
        subject.adapter, tmp_path / "adapter", value=lambda name, value: value.to(dtype), alpha_pattern={"q_proj": 7}
    )
    verify(adapter=adapter, base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "folded"))
    name = f"{PREFIX}model.layers.2.self_attn.q_proj.lora_B.weight"
    assert after[name].dtype == dtype
    scaled = (before[name].float() * (7 / 6)).to(dtype)
    assert torch.equal(after[name], scaled)


def test_values_that_the_dtype_does_not_hold_are_refused(subject: Subject, tmp_path: Path) -> None:
    def large(name: str, value: torch.Tensor) -> torch.Tensor:
        return (value * 1e5 if "q_proj.lora_B" in name else value).clamp(-6e4, 6e4).half()

    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", value=large, alpha_pattern={"q_proj": 60})
    with pytest.raises(
        NumericalError, match=r"q_proj\.lora_B.*times 10 it exceeds .*float16; save the LoRA in float32"
    ):
        verify(adapter=adapter, base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_kinds_whose_effect_is_not_one_product_are_refused(subject: Subject, tmp_path: Path) -> None:
    subjects.train(subject.model, subject.base, tmp_path / "trained", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UnsupportedError, match="was trained with lora_bias"):
        verify(adapter=tmp_path / "trained", base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")


def test_names_and_scalings_can_be_mended_at_once(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", lambda name: name.removeprefix(PREFIX))
    options: dict[str, Any] = {"adapter": adapter, "base": str(subject.base), "output": tmp_path / "mended"}
    with pytest.raises(Exception, match="add --fix"):
        verify(**options, fold_scaling=True)
    verify(**options, fold_scaling=True, fix=True)
    meant = subjects.deltas(subjects.loaded(subject, subject.adapter)[0])
    assert subjects.furthest(alpha_over_rank(tmp_path / "mended"), meant) < 1e-6


def test_a_scaling_that_no_whole_alpha_gives_is_kept(subject: Subject, tmp_path: Path) -> None:
    subjects.train(subject.model, subject.base, tmp_path / "trained", target_modules=["q_proj"], r=3, use_rslora=True)
    verify(adapter=tmp_path / "trained", base=str(subject.base), fold_scaling=True, output=tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / CONFIG).read_text())
    assert config["lora_alpha"] / 3 == pytest.approx(6 / math.sqrt(3), rel=1e-12)
    adapter = Adapter(tmp_path / "folded")
    adapter.close()
    assert adapter.loras["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(6 / math.sqrt(3), rel=1e-12)
