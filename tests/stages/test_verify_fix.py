"""verify --fix: names that PEFT does not read become those that it reads, and the adapter computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emloc_tools.errors import InputError, MismatchError
from emloc_tools.stages.verify import Verification, verify
from tests.adapters import subjects
from tests.adapters.subjects import PREFIX, Subject

VARIANTS: dict[str, Callable[[str], str]] = {
    "prefix missing": lambda name: name.removeprefix(PREFIX),
    "prefix doubled": lambda name: PREFIX + name,
    "half of the prefix missing": lambda name: name.replace(PREFIX, "base_model."),
    "other name of the adapter": lambda name: name.replace(".weight", ".task.weight"),
    "DataParallel around PEFT": lambda name: f"module.{name}",
    "DataParallel inside PEFT": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "torch.compile around PEFT": lambda name: f"_orig_mod.{name}",
    "torch.compile inside PEFT": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP around PEFT and each block": lambda name: (
        "_fsdp_wrapped_module." + name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")
    ),
    "checkpointed blocks": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "class without a head": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
    "language model of another": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
    "language model of another, before": lambda name: name.replace(f"{PREFIX}model.", f"{PREFIX}language_model.model."),
    "several at once": lambda name: "module._orig_mod." + name.replace(".weight", ".task.weight"),
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("subject"), target_modules=["q_proj", "down_proj"])


def fix(subject: Subject, adapter: Path, output: Path) -> Verification:
    return verify(adapter=adapter, base=str(subject.base), fix=True, output=output)


@pytest.mark.parametrize("rename", VARIANTS.values(), ids=VARIANTS)
def test_an_adapter_under_other_names_does_nothing_until_it_is_fixed(
    subject: Subject, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", rename)
    stored = load_file(adapter / subjects.WEIGHTS)
    before, missing = subjects.loaded(subject, adapter)
    differing = {name for name in load_file(subject.adapter / subjects.WEIGHTS) if rename(name) != name}
    inert = [name for name, delta in subjects.deltas(before).items() if delta.abs().max() == 0]
    assert len(inert) == len(differing) / 2  # the control: PEFT leaves them out
    assert len(missing) == 1
    result = verify(adapter=adapter, base=str(subject.base))
    assert result.matching == len(stored) - len(differing)
    assert f"{len(differing)} of {len(stored)} tensors" in str(result.refusal)
    assert "write an adapter that has these with --fix" in str(result.refusal)
    fixed = fix(subject, adapter, tmp_path / "fixed")
    assert (fixed.refusal, fixed.matching, len(fixed.renamed)) == (None, len(stored), len(differing))
    after, missing = subjects.loaded(subject, tmp_path / "fixed")
    meant, _ = subjects.loaded(subject, subject.adapter)
    assert missing == []
    assert torch.equal(subjects.logits(after), subjects.logits(meant))
    assert not torch.allclose(subjects.logits(after), subjects.logits(subject.model), atol=1e-3)


def test_the_name_of_peft_s_own_adapter_is_taken_by_peft_and_by_no_other(subject: Subject, tmp_path: Path) -> None:
    """PEFT 0.21 happens to find keys with `default` in them. vLLM and llama.cpp know no such names."""
    adapter = subjects.changed(
        subject.adapter, tmp_path / "adapter", lambda name: name.replace(".weight", ".default.weight")
    )
    found, missing = subjects.loaded(subject, adapter)
    assert missing == []
    assert all(delta.abs().max() > 0 for delta in subjects.deltas(found).values())
    assert "other names than PEFT reads" in str(verify(adapter=adapter, base=str(subject.base)).refusal)
    fix(subject, adapter, tmp_path / "fixed")
    assert set(load_file(tmp_path / "fixed" / subjects.WEIGHTS)) == set(load_file(subject.adapter / subjects.WEIGHTS))


def test_what_was_renamed_is_recorded_and_nothing_else_changes(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", VARIANTS["prefix missing"], unknown_field=[1])
    fix(subject, adapter, tmp_path / "fixed")
    note = json.loads((tmp_path / "fixed" / "emloc-verify.json").read_text())
    stored, fixed = (load_file(folder / subjects.WEIGHTS) for folder in (adapter, tmp_path / "fixed"))
    assert note["renamed"] == {name: PREFIX + name for name in stored}
    assert (note["settings"], note["folded"]) == ({}, {})
    assert {PREFIX + name: value.tolist() for name, value in stored.items()} == {
        name: value.tolist() for name, value in fixed.items()
    }
    configs = [json.loads((folder / subjects.CONFIG).read_text()) for folder in (adapter, tmp_path / "fixed")]
    assert configs[0] == configs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "fixed"]


def test_fixing_what_is_fixed_changes_nothing(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", VARIANTS["DataParallel around PEFT"])
    fix(subject, adapter, tmp_path / "once")
    assert fix(subject, tmp_path / "once", tmp_path / "twice").renamed == {}
    for name in (subjects.WEIGHTS, subjects.CONFIG):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    verify(adapter=adapter, base=str(subject.base), fix=True, output=tmp_path / "twice", overwrite=True)
    assert json.loads((tmp_path / "twice" / "emloc-verify.json").read_text())["renamed"] != {}


def test_ranks_and_alphas_that_patterns_give_to_old_names_are_kept(subject: Subject, tmp_path: Path) -> None:
    """A pattern that speaks of the old names would mean nothing, or something else, under the new ones."""
    patterns = {"rank_pattern": {r"model\.layers\.1\..*": 2}, "alpha_pattern": {"model.layers.0.self_attn.q_proj": 9}}
    subjects.train(subject.model, subject.base, tmp_path / "meant", **patterns)
    old = {
        "rank_pattern": {r"^layers\.1\..*": 2},
        "alpha_pattern": {"^layers.0.self_attn.q_proj": 9},
    }
    adapter = subjects.changed(tmp_path / "meant", tmp_path / "adapter", VARIANTS["class without a head"], **old)
    result = fix(subject, adapter, tmp_path / "fixed")
    assert {"rank_pattern", "alpha_pattern"} <= set(result.settings)
    found, meant = (subjects.loaded(subject, folder)[0] for folder in (tmp_path / "fixed", tmp_path / "meant"))
    assert subjects.furthest(subjects.deltas(found), subjects.deltas(meant)) == 0


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)"},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [0, 1]},
    ],
    ids=["pattern of old names", "too few", "excluded", "other layers"],
)
def test_a_configuration_that_means_other_modules_is_reported_and_fixed(
    subject: Subject, tmp_path: Path, config: dict[str, object]
) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", **config)
    result = verify(adapter=adapter, base=str(subject.base))
    assert "adapter_config.json" in str(result.refusal)
    assert "--fix" in str(result.refusal)
    fixed = fix(subject, adapter, tmp_path / "fixed")
    assert "target_modules" in fixed.settings
    found, missing = subjects.loaded(subject, tmp_path / "fixed")
    meant, _ = subjects.loaded(subject, subject.adapter)
    assert missing == []
    assert torch.equal(subjects.logits(found), subjects.logits(meant))


def test_names_that_mean_nothing_are_not_fixed(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", lambda name: name.replace("layers.2", "layers.7"))
    message = r"8 of the 12 LoRA tensors .* found .*layers\.7\..*, the base has model\..*; the adapter was trained on"
    with pytest.raises(MismatchError, match=message):
        fix(subject, adapter, tmp_path / "fixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_name_that_may_mean_several_modules_is_not_fixed(subject: Subject, tmp_path: Path) -> None:
    def shortened(name: str) -> str:
        return name.replace("model.layers.0.self_attn.", "self_attn.")

    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", shortened)
    message = r"self_attn\.q_proj.* may mean model\.layers\.0\.self_attn\.q_proj or model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(MismatchError, match=message):
        fix(subject, adapter, tmp_path / "fixed")


def test_two_names_of_one_tensor_are_refused(subject: Subject, tmp_path: Path) -> None:
    def halved(name: str) -> str:
        return name.replace("layers.1.", "layers.0.").removeprefix(PREFIX) if "layers.1." in name else name

    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", halved)
    with pytest.raises(MismatchError, match=r"which would both become base_model\.model\.model\.layers\.0\."):
        verify(adapter=adapter, base=str(subject.base))


def test_the_tensors_of_two_adapters_in_one_file_are_refused(subject: Subject, tmp_path: Path) -> None:
    def named(name: str) -> str:
        return name.replace(".weight", ".first.weight" if "layers.0" in name else ".second.weight")

    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", named)
    with pytest.raises(MismatchError, match=r"holds the tensors of several adapters, first, second; save them one by"):
        verify(adapter=adapter, base=str(subject.base))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fix": True}, "add --output"), ({"output": Path("out")}, "needs --fix or --fold-scaling")],
    ids=["no output", "nothing to write"],
)
def test_an_output_goes_with_something_to_write(subject: Subject, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(adapter=subject.adapter, base=str(subject.base), **options)  # type: ignore[arg-type]
