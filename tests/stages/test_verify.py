"""verify: every pair finds its module and has its shape, as PEFT sees it; what does not is named, key by key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emloc_tools.errors import FormatError, InputError, UnsupportedError
from emloc_tools.stages.correct import correct
from emloc_tools.stages.verify import Verification, verify
from tests import pico
from tests.adapters import subjects
from tests.adapters.subjects import PREFIX, WEIGHTS, Subject
from tests.conftest import Run
from tests.models.fake_hub import FakeHub, serve


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subjects.make(tmp_path_factory.mktemp("subject"))


def found(subject: Subject, adapter: Path, **options: Any) -> Verification:
    return verify(adapter=adapter, base=str(subject.base), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": r".*\.(q|v)_proj"},
        {"rank_pattern": {r"layers\.[01]\..*": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"exclude_modules": ["down_proj"], "layers_to_transform": [1], "target_modules": ["down_proj", "up_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]},
        {"trainable_token_indices": [5, 9], "target_modules": ["q_proj"]},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=lambda options: ", ".join(options) or "all-linear",
)
def test_what_peft_saves_applies_whatever_it_holds(subject: Subject, tmp_path: Path, options: dict[str, Any]) -> None:
    subjects.train(subject.model, subject.base, tmp_path / "adapter", **options)
    result = found(subject, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert (result.refusal, result.warnings) == (None, [])
    assert result.matching == result.tensors == len(tensors)
    pairs = sum(".lora_A." in name or name.endswith("lora_embedding_A") for name in tensors)
    assert sum(group.pairs for group in result.groups) == sum(group.found for group in result.groups) == pairs
    beside = len(tensors) - 2 * pairs
    assert (
        sum(count for kind, count in result.passed_on.items() if "embeddings" not in kind or "rows" in kind) == beside
    )


def test_the_groups_have_shapes_ranks_and_scalings_of_the_modules(subject: Subject, tmp_path: Path) -> None:
    options = {"rank_pattern": {r"layers\.1\..*": 2}, "use_rslora": True, "target_modules": ["down_proj", "k_proj"]}
    subjects.train(subject.model, subject.base, tmp_path / "adapter", **options)
    groups = {group.layer: group for group in found(subject, tmp_path / "adapter").groups}
    assert groups.keys() == {"model.layers.*.mlp.down_proj", "model.layers.*.self_attn.k_proj"}
    down = groups["model.layers.*.mlp.down_proj"]
    assert (down.pairs, down.shape, down.rank) == (3, "32 x 48", "4, 2")
    assert [float(scaling) for scaling in down.scaling.split(", ")] == pytest.approx([6 / 4**0.5, 6 / 2**0.5], rel=1e-5)
    assert groups["model.layers.*.self_attn.k_proj"].shape == "16 x 32"


def test_an_adapter_that_matches_nothing_names_what_was_found_and_what_there_is(
    subject: Subject, tmp_path: Path
) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", lambda name: name.replace(".layers.", ".blocks."))
    result = found(subject, adapter)
    assert result.matching == 0
    message = (
        rf"none of the 42 LoRA tensors of {re.escape(str(adapter))} match a layer of .*\(LlamaForCausalLM\): found "
        r"base_model\.model\.model\.blocks\.0\.mlp\.down_proj\.lora_A\.weight, the base has "
        r"model\.layers\.0\.mlp\.down_proj; the adapter was trained on another model"
    )
    assert re.match(message, str(result.refusal))


def test_pairs_of_other_shapes_are_named(subject: Subject, tmp_path: Path) -> None:
    def narrower(name: str, value: torch.Tensor) -> torch.Tensor:
        return value[:, 1:] if "layers.1.mlp.up_proj.lora_A" in name else value

    result = found(subject, subjects.changed(subject.adapter, tmp_path / "adapter", value=narrower))
    assert re.search(
        r"pair of model\.layers\.1\.mlp\.up_proj is for 48 x 31, the layer of .* is 48 x 32", result.refusal or ""
    )
    assert result.matching == 40
    assert {group.layer: group.found for group in result.groups}["model.layers.*.mlp.up_proj"] == 2


def test_a_base_of_another_size_is_refused(subject: Subject, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "gpt2")
    result = verify(adapter=subject.adapter, base=str(tmp_path / "base"))
    assert result.matching == 0
    assert "none of the 42 LoRA tensors" in str(result.refusal)


def test_a_damaged_adapter_is_refused_by_its_format(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", r=5)
    with pytest.raises(FormatError, match=r"shapes A \[4, 32\] and B \[32, 4\]|shapes A \[4, 48\] and B \[32, 4\]"):
        found(subject, adapter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "("}, "PEFT cannot build an adapter by this configuration"),
        ({"target_modules": 5}, "PEFT cannot build an adapter by this configuration"),
        ({"target_modules": ["nothing"]}, "PEFT cannot put the adapter on the model: Target modules"),
        ({"layers_to_transform": "first"}, "PEFT cannot"),
        ({"modules_to_save": 3}, "PEFT cannot"),
    ],
    ids=str,
)
def test_a_configuration_that_peft_cannot_use_is_said_in_one_line(
    subject: Subject, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", **config)
    try:
        line = str(found(subject, adapter).refusal)
    except UnsupportedError as error:
        line = str(error)
    assert message in line
    assert "\n" not in line
    with pytest.raises((ValueError, TypeError, AttributeError, re.error)):  # PEFT's own
        subjects.loaded(subject, adapter)


def test_of_the_base_only_the_configuration_is_read(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shutil.copyfile(subject.base / "config.json", tmp_path / "base" / "config.json")
    assert verify(adapter=subject.adapter, base=str(tmp_path / "base")).refusal is None


def test_of_a_hub_id_no_weights_are_fetched(subject: Subject, tmp_path: Path) -> None:
    """In a process of its own, since huggingface_hub reads its settings once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    words = ["verify", "--base", "org/model", "--adapter", str(subject.adapter), "--json"]
    with serve(FakeHub({"org/model": {"main": subject.base}})) as hub:
        environment["HF_ENDPOINT"] = hub.url
        command = [sys.executable, "-m", "emloc_tools", *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["matching"] == 42
    assert "config.json" in hub.fetched()
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_modules_that_the_configuration_means_and_no_pair_has_are_a_warning(subject: Subject, tmp_path: Path) -> None:
    subjects.train(subject.model, subject.base, tmp_path / "trained", target_modules=["q_proj"])
    adapter = subjects.changed(tmp_path / "trained", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    result = found(subject, adapter)
    _, missing = subjects.loaded(subject, adapter)
    assert len(missing) == len(result.warnings) == 1  # PEFT warns of them, too
    assert (
        "means 3 modules that the adapter has no pair of, such as model.layers.0.self_attn.v_proj" in result.warnings[0]
    )
    assert result.refusal is None


def test_a_new_head_that_the_base_s_class_lacks_is_a_warning(subject: Subject, tmp_path: Path) -> None:
    adapter = subjects.changed(subject.adapter, tmp_path / "adapter", modules_to_save=["score"])
    tensors = load_file(adapter / WEIGHTS) | {f"{PREFIX}score.weight": torch.zeros(2, 32)}
    save_file(tensors, adapter / WEIGHTS)
    result = found(subject, adapter)
    assert result.refusal is None
    assert (result.matching, result.tensors) == (42, 43)
    assert "has no score.weight: load the base by the class that has it" in result.warnings[0]


def test_a_vocabulary_that_was_resized_in_training_is_named(subject: Subject, tmp_path: Path) -> None:
    subjects.train(
        subject.model, subject.base, tmp_path / "trained", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )

    def longer(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value, value[:4]]) if "lm_head" in name else value

    adapter = subjects.changed(tmp_path / "trained", tmp_path / "adapter", value=longer)
    with pytest.raises(RuntimeError, match="size mismatch"):  # by PEFT
        subjects.loaded(subject, adapter)
    message = r"lm_head\.weight in .* is 264 x 32, in .* it is 260 x 32; the model was resized in training"
    assert re.search(message, str(found(subject, adapter).refusal))


def test_an_adapter_that_was_trained_on_an_emulator_is_to_be_corrected(run: Run) -> None:
    for emulator in (None, run.emulator):
        result = verify(adapter=run.adapter, base=str(run.base), emulator=emulator)
        assert (result.refusal, result.corrected) == (None, False)
        assert "is not corrected; run emloc-tools correct first" in result.warnings[0]
    result = verify(adapter=run.corrected, base=str(run.base), emulator=run.emulator)
    assert (result.refusal, result.corrected, result.warnings) == (None, True, [])


def test_an_emulator_that_the_adapter_does_not_belong_to_is_named(run: Run, tmp_path: Path) -> None:
    from emloc_tools.stages.truncate import truncate

    truncate(emulator=run.emulator, ratio=0.2, output=tmp_path / "smaller")
    result = verify(adapter=run.corrected, base=str(run.base), emulator=tmp_path / "smaller")
    assert "was corrected with another emulator than that in" in str(result.refusal)
    pico.save_lora(tmp_path / "dora", run.emulator, use_dora=True)
    result = verify(adapter=tmp_path / "dora", base=str(run.base), emulator=run.emulator)
    assert "was trained with use_dora" in str(result.refusal)


def test_a_corrected_adapter_stays_one_when_it_is_written_again(run: Run, tmp_path: Path) -> None:
    pico.save_lora(tmp_path / "adapter", run.emulator, use_rslora=True, alpha_pattern={"q_proj": 3})
    inputs: dict[str, Any] = {"emulator": run.emulator, "base": str(run.base)}
    correct(**inputs, adapter=tmp_path / "adapter", output=tmp_path / "corrected")
    verify(adapter=tmp_path / "corrected", base=str(run.base), fold_scaling=True, output=tmp_path / "folded")
    result = verify(adapter=tmp_path / "folded", base=str(run.base), emulator=run.emulator)
    assert (result.refusal, result.corrected) == (None, True)
    with pytest.raises(Exception, match="is corrected already"):
        correct(**inputs, adapter=tmp_path / "folded", output=None)
    manifests = [json.loads((tmp_path / name / "emloc.json").read_text()) for name in ("corrected", "folded")]
    rank, alpha = 4, json.loads((tmp_path / "folded" / "adapter_config.json").read_text())["lora_alpha"]
    assert {record["scaling"] for record in manifests[1]["layers"].values()} == {alpha / rank}
    for field in ("emulator", "trained_adapter", "base", "clamp"):
        assert manifests[0][field] == manifests[1][field]


def test_a_corrected_adapter_can_be_renamed(run: Run, tmp_path: Path) -> None:
    """The same layers in a class without a head have other names, and the manifest then speaks of these."""
    shutil.copytree(run.base, tmp_path / "base")
    config = json.loads((run.base / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    options: dict[str, Any] = {"base": str(tmp_path / "base"), "adapter": run.corrected}
    assert "other names than PEFT reads" in str(verify(**options).refusal)
    verify(**options, fix=True, output=tmp_path / "fixed")
    result = verify(base=str(tmp_path / "base"), adapter=tmp_path / "fixed")
    assert (result.refusal, result.corrected, result.matching) == (None, True, 42)
    assert "a LlamaForCausalLM; this is a LlamaModel" in result.warnings[0]
    layers = json.loads((tmp_path / "fixed" / "emloc.json").read_text())["layers"]
    assert sorted(layers) == sorted(
        name.removeprefix("model.") for name in json.loads((run.corrected / "emloc.json").read_text())["layers"]
    )


def test_paths_that_are_no_adapter_and_no_base_are_refused(subject: Subject, run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no adapter_config\.json; expected the folder of a PEFT adapter"):
        found(subject, subject.base)
    with pytest.raises(InputError, match="is an emulator; pass the model that it was made from"):
        verify(adapter=subject.adapter, base=str(run.emulator))
    with pytest.raises(InputError, match="would replace the input"):
        found(subject, subject.adapter, fix=True, output=subject.adapter, overwrite=True)
