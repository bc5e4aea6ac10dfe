"""correct --data and --select: the losses are those of PEFT models in memory, and the adapter that they speak for wins.

Samples that are drawn from a model are, on average, best predicted by that very model (Gibbs' inequality). So each
candidate can be planted: draw the samples from the base with it, and it must win.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional as F

from emloc_tools.files.adapter import Adapter
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.models.lora import attach_loras
from emloc_tools.stages import correct as stage
from emloc_tools.stages import scoring
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.correct import CorrectionResult, correct
from emloc_tools.stages.selection import SCALES
from tests import pico
from tests.conftest import Run
from tests.stages.adapters import changed, on, pairs
from tests.stages.reference import bytes_hash, contents, read_json, read_tensors

TRIED = [("none", 0.0)] + [(kind, scale) for kind in ("trained", "corrected") for scale in SCALES]
COMPARED = [("none", 0.0), ("trained", 1.0), ("corrected", 1.0)]


def model_of(run: Run, adapter: str, scale: float) -> Any:
    """The base in float64 with an adapter by PEFT, its B scaled."""
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base).eval()
    if adapter == "none":
        return base.double()
    model = on(base, run.adapter if adapter == "trained" else run.corrected).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter *= scale
    return model


def draw(model: Any, path: Path, *, samples: int, length: int = 24) -> Path:
    """Ready inputs: samples drawn token by token from a model, a batch of all."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, pico.VOCABULARY, (samples, 1), generator=generator)
    while ids.shape[1] < length:
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    save_file({"0/input_ids": ids}, path)
    return path


def run_correct(run: Run, output: Path | None, **options: Any) -> CorrectionResult:
    return correct(emulator=run.emulator, adapter=run.adapter, base=str(run.base), output=output, **options)


def losses_by_sample(model: Any, samples: list[list[int]]) -> torch.Tensor:
    """Summed loss of every sample, float64."""
    sums = []
    for ids in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        sums.append(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
    return torch.stack(sums)


def error(losses: torch.Tensor, tokens: torch.Tensor) -> float:
    """Standard error of a ratio of sums."""
    mean, m = losses.sum() / tokens.sum(), len(tokens)
    return float(torch.sqrt(m / (m - 1) * ((losses - mean * tokens) ** 2).sum()) / tokens.sum())


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_losses_and_their_errors_are_those_of_peft_models_in_memory(run: Run, select: bool, batch_size: int) -> None:
    result = run_correct(run, None, data=run.data, select=select, batch_size=batch_size, max_length=40)
    assert result.heldout is not None
    samples = pico.token_ids(run.data, run.base, 40)
    tokens = torch.tensor([len(ids) - 1 for ids in samples])
    assert len(set(tokens.tolist())) > 1, "samples of one length would not tell a ratio from a mean"
    tried = TRIED if select else COMPARED
    losses = {each: losses_by_sample(model_of(run, *each), samples) for each in tried}
    assert [(each.adapter, each.scale) for each in result.heldout.candidates] == tried
    for found in result.heldout.candidates:
        expected = losses[found.adapter, found.scale]
        to_none, to_corrected = expected - losses["none", 0.0], expected - losses["corrected", 1.0]
        assert found.loss == pytest.approx(float(expected.sum() / tokens.sum()), rel=1e-5)
        assert found.standard_error == pytest.approx(error(expected, tokens), rel=1e-4)
        assert found.standard_error_to_none == pytest.approx(error(to_none, tokens), rel=1e-4)
        assert found.standard_error_to_corrected == pytest.approx(error(to_corrected, tokens), rel=1e-4)
    assert len({round(found.loss, 5) for found in result.heldout.candidates}) == len(tried), "B must make a difference"
    assert (result.heldout.chosen is None) != select
    data = result.heldout.data
    assert (data.file, data.hash) == (run.data.name, bytes_hash(run.data))
    assert (data.samples, data.tokens, data.max_length, data.seed) == (len(samples), int(tokens.sum()), 40, 0)


@pytest.mark.parametrize(("kind", "scale"), [("trained", 1.0), ("corrected", 0.5), ("corrected", 1.0)])
def test_the_lora_that_the_samples_were_drawn_from_is_chosen_and_stored(
    run: Run, tmp_path: Path, kind: str, scale: float
) -> None:
    data = draw(model_of(run, kind, scale), tmp_path / "data.safetensors", samples=200)
    result = run_correct(run, tmp_path / "chosen", data=data, select=True)
    assert result.heldout is not None
    assert result.heldout.chosen is not None
    winner = result.heldout.candidates[result.heldout.chosen]
    assert (winner.adapter, winner.scale) == (kind, scale)

    manifest = read_json(tmp_path / "chosen" / "emloc.json")
    assert manifest["format_version"] == 2
    assert manifest["selection"] == {
        "data": result.heldout.data.model_dump(),
        "candidates": [each.model_dump() for each in result.heldout.candidates],
        "chosen": result.heldout.chosen,
    }
    assert manifest["selection"]["data"]["tokens"] == 200 * 23
    source = run.adapter if kind == "trained" else run.corrected
    expected, found = read_tensors(source), read_tensors(tmp_path / "chosen")
    for name, tensor in expected.items():
        assert torch.equal(found[name], scale * tensor if ".lora_B." in name else tensor), name
    config, before = (read_json(folder / "adapter_config.json") for folder in (tmp_path / "chosen", run.adapter))
    assert config["base_model_name_or_path"] == str(run.base)
    assert all(config[key] == before[key] for key in ("r", "lora_alpha", "use_rslora", "alpha_pattern"))
    assert (set(manifest["layers"]) == set(pairs(run.adapter))) == (kind == "corrected")
    stored = Adapter(tmp_path / "chosen")
    assert stored.corrected, "it belongs to the base and is not to be corrected again"
    stored.close()


def test_the_stored_adapter_has_the_loss_that_the_table_gives(run: Run, tmp_path: Path) -> None:
    """Read back by PEFT; float32, so that storing rounds nothing that matters."""
    data = draw(model_of(run, "corrected", 0.5), tmp_path / "data.safetensors", samples=20)
    result = run_correct(run, tmp_path / "chosen", data=data, select=True)
    samples = read_tensors(tmp_path)["0/input_ids"].tolist()
    base = transformers.AutoModelForCausalLM.from_pretrained(run.base).eval()
    losses = losses_by_sample(on(base, tmp_path / "chosen"), samples)
    assert result.heldout is not None
    assert result.heldout.chosen is not None
    winner = result.heldout.candidates[result.heldout.chosen]
    assert (winner.adapter, winner.scale) != ("corrected", 1.0)
    assert winner.loss == pytest.approx(float(losses.sum()) / (20 * 23), rel=1e-5)


@pytest.mark.parametrize("kind", ["trained", "corrected"])
def test_the_scale_is_in_every_b_also_of_dense_layers_rounded_once_to_its_dtype(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    emulator = tmp_path / "emulator"
    build_emulator(base=str(run.base), calibration=run.calibration, ratio=0.5, exclude="v_proj", output=emulator)
    pico.save_lora(tmp_path / "float32", emulator, target_modules=["q_proj", "v_proj"])

    def halved(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name, value.bfloat16()

    adapter = changed(tmp_path / "float32", tmp_path / "bfloat16", tensor=halved)
    options: dict[str, Any] = {"emulator": emulator, "adapter": adapter, "base": str(run.base)}
    place = TRIED.index((kind, 0.75))
    monkeypatch.setattr(stage, "choose", lambda candidates: place)
    correct(output=tmp_path / "corrected", **options)
    correct(output=tmp_path / "chosen", data=run.data, select=True, **options)
    source = read_tensors(adapter if kind == "trained" else tmp_path / "corrected")
    found = read_tensors(tmp_path / "chosen")
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        expected = (0.75 * tensor.double()).bfloat16() if ".lora_B." in name else tensor
        assert torch.equal(found[name], expected), name
    unchanged = read_json(tmp_path / "chosen" / "emloc.json")["unchanged"]
    dense = [name for name in found if "v_proj" in name]
    assert sorted(unchanged) == sorted(found if kind == "trained" else dense)


def test_where_no_lora_wins_nothing_is_written_and_what_was_there_stays(run: Run, tmp_path: Path) -> None:
    data = draw(model_of(run, "none", 0.0), tmp_path / "data.safetensors", samples=200)
    run_correct(run, tmp_path / "out")
    before = contents(tmp_path / "out")
    result = run_correct(run, tmp_path / "out", data=data, select=True, overwrite=True)
    assert result.output is None
    assert result.heldout is not None
    assert result.heldout.none_wins
    assert result.heldout.candidates[0].loss == min(each.loss for each in result.heldout.candidates)
    assert contents(tmp_path / "out") == before
    compared = run_correct(run, tmp_path / "out", data=data, overwrite=True)  # the control: without a choice
    assert compared.output == tmp_path / "out"
    assert not compared.heldout.none_wins  # type: ignore[union-attr]


def test_without_a_choice_the_corrected_adapter_is_that_of_a_run_without_data(run: Run, tmp_path: Path) -> None:
    run_correct(run, tmp_path / "compared", data=run.data)
    expected, found = contents(run.corrected), contents(tmp_path / "compared")
    assert found == expected
    assert json.loads(found["emloc.json"])["format_version"] == 1


def test_a_dry_run_measures_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": run.data, "select": True}
    result = run_correct(run, tmp_path / "out", **options)
    before = contents(tmp_path)
    assert run_correct(run, None, **options) == replace(result, output=None)
    assert contents(tmp_path) == before


def test_all_candidates_share_one_pass_and_two_copies_of_the_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    kept: set[int] = set()
    read, attach = TensorFolder.read, attach_loras
    stored = set(run.model.state_dict())

    def counted(self: TensorFolder, name: str, *rest: Any) -> torch.Tensor:
        if name in stored:
            reads[name] += 1
        return read(self, name, *rest)

    def seen(model: Any, adapters: Any, active: Callable[[], int | None]) -> Any:
        assert len(adapters) == len(TRIED) - 1
        kept.update(id(tensor) for pair in adapters for lora in pair.values() for tensor in (lora.A, lora.B))
        return attach(model, adapters, active)

    monkeypatch.setattr(TensorFolder, "read", counted)
    run_correct(run, None)
    corrected = dict(reads)
    reads.clear()
    monkeypatch.setattr(scoring, "attach_loras", seen)
    at_once = run_correct(run, None, data=run.data, select=True)
    assert {name: reads[name] - corrected.get(name, 0) for name in stored} == dict.fromkeys(stored, 1)
    assert len(kept) == 2 * 2 * len(pairs(run.adapter)), "A and B of the trained and of the corrected adapter"
    reads.clear()
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 500)
    in_waves = run_correct(run, None, data=run.data, select=True)
    assert min(reads[name] - corrected.get(name, 0) for name in stored) > 2
    expected = [each.loss for each in at_once.heldout.candidates]  # type: ignore[union-attr]
    assert [each.loss for each in in_waves.heldout.candidates] == pytest.approx(expected)  # type: ignore[union-attr]
