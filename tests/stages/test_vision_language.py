"""Models that read images go through every stage as docs/vision-language.md says, and every number is as in memory."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel
from PIL import Image
from torch import nn
from torch.nn import functional as F

from emloc_tools.cli import main
from emloc_tools.models.processors import load_processor
from emloc_tools.models.skeleton import load_config
from emloc_tools.models.source import open_source
from emloc_tools.stages import calibrate as stage
from emloc_tools.stages import passes
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.evaluate import evaluate
from emloc_tools.streaming.backward import BackwardLockStep
from tests import pico, pico_vision
from tests.pico_vision import answer, question
from tests.stages.loss_reference import data_part, gradient_moments, read_gradients, unpacked
from tests.stages.reference import close_to, read_json
from tests.vision_reference import moments

# The page trains a pretrained model, gently. These have random weights, and few steps.
FASTER = {"learning_rate=2e-4": "learning_rate=2e-2", "num_train_epochs=1": "max_steps=16"}
PAGE = Path(__file__).parent.parent.parent / "docs" / "vision-language.md"
TOWERS = {"llava": "vision_tower", "internvl": "vision_tower", "qwen2.5-vl": "visual.blocks"}
PROJECTORS = {"llava": "multi_modal_projector", "internvl": "multi_modal_projector", "qwen2.5-vl": "visual.merger"}


@dataclass(frozen=True)
class Case:
    """A folder in which the page was gone through, with the base in memory and what the training script left."""

    family: str
    folder: Path
    model: Any
    processor: Any
    trainer: Any

    def inputs(self, file: str) -> list[dict[str, torch.Tensor]]:
        """Each conversation of a data file as inputs for the base, alone and so without padding."""
        records = [json.loads(line) for line in (self.folder / "data" / file).read_text().splitlines()]
        return [self.processor_inputs(record["messages"]) for record in records]

    def processor_inputs(self, messages: Any) -> dict[str, torch.Tensor]:
        """Inputs by transformers' own way from a conversation to them."""
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = Image.open(self.folder / "data" / part["image"])
        found = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        return dict(found)

    def targets(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of `ids (length,)` count in a loss: all but those of images, which follow those of texts."""
        marks = {"qwen2.5-vl": ["image_token"]}.get(self.family, list(pico_vision.SPECIAL[self.family]))
        return ~torch.isin(ids, torch.tensor([pico_vision.token(self.family, name) for name in marks]))


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The page gone through with a base of a family; tests never write into its folder."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = pico_vision.save_model(folder / "base", family)
            save_data(folder / "data")
            source = open_source(str(folder / "base"))
            processor = load_processor(source, load_config(source))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                if family != "llava":
                    # Its processor cannot be loaded here as users load it, since that needs torchvision.
                    patch.setattr(transformers.AutoProcessor, "from_pretrained", from_pretrained)
                namespace = go_through(PAGE)
            made[family] = Case(family, folder, model, processor, namespace["trainer"])
        return made[family]

    return make


@pytest.fixture(params=pico_vision.FAMILIES)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    """The case of every family."""
    return case_of(request.param)


def from_pretrained(folder: str) -> Any:
    """AutoProcessor's, without a part for videos."""
    source = open_source(folder)
    return load_processor(source, load_config(source))


def save_data(folder: Path) -> None:
    """Conversations about pictures, of different lengths, and one without a picture, in two files."""
    folder.mkdir()
    names = pico_vision.save_pictures(folder / "pictures", 9)
    chats = [
        [question(f"pictures/{name}", text="Which colour?" + "?" * number), answer(name.partition("-")[0])]
        for number, name in enumerate(names)
    ]
    plain = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, answer("Hi")]
    two = [*chats[0], question("pictures/blue-2.png", text="And this?"), answer("blue")]
    pico.write_jsonl(folder / "train.jsonl", [{"messages": chat} for chat in (*chats[:5], plain, two)])
    pico.write_jsonl(folder / "heldout.jsonl", [{"messages": chat} for chat in (*chats[5:], plain)])


def go_through(page: Path) -> dict[str, Any]:
    """Run the page's commands and its Python in their order, after the installation, and return Python's names."""
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    for language, text in blocks[1:]:
        if language == "python":
            for slow, fast in FASTER.items():
                text = text.replace(slow, fast)
            exec(compile(text, str(page), "exec"), names)
            continue
        for line in text.splitlines():
            result = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
            assert result.exit_code == 0, result.output
    return names


def summed_loss(model: Any, call: dict[str, torch.Tensor], wanted: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy over a sample's targets `wanted (length,)`, and how many these are; nothing predicts the first."""
    ids, logits = call["input_ids"][0, 1:], model(**call).logits[0, :-1]
    return F.cross_entropy(logits[wanted[1:]], ids[wanted[1:]], reduction="sum"), int(wanted[1:].sum())


def test_grams_are_those_of_exactly_the_real_rows_of_text_and_images(case: Case) -> None:
    calls = case.inputs("train.jsonl")
    found = {layer: of for layers, of in data_part(case.folder / "calibration").items() for layer in layers}
    expected = moments(case.model, calls, list(found))
    for layer, (side, rows, packed) in found.items():
        inputs, outputs, real = expected[layer]
        G = inputs if side == "input" else outputs
        assert rows == real, layer
        assert close_to(unpacked(packed, len(G)), G) < 1e-5, layer
    tokens = sum(call["input_ids"].numel() for call in calls)
    images = sum(int((~case.targets(call["input_ids"][0])).sum()) for call in calls)
    assert 0 < images < tokens
    assert {expected[name][2] for name in found if "language_model" in name} == {tokens}
    assert read_json(case.folder / "calibration" / "calibration.json")["data"][0]["tokens"] == tokens
    # The control: without the image tokens a layer of the language model sees other data.
    layer = next(name for name in found if "language_model" in name and name.endswith("q_proj"))
    texts = moments(
        case.model, [{"input_ids": call["input_ids"][:, case.targets(call["input_ids"][0])]} for call in calls], [layer]
    )
    assert close_to(texts[layer][0], expected[layer][0]) > 1e-2


def test_padding_in_a_batch_changes_neither_grams_nor_gradients(case: Case, tmp_path: Path) -> None:
    calibrate(
        base=str(case.folder / "base"),
        data=case.folder / "data" / "train.jsonl",
        output=tmp_path / "batched",
        batch_size=3,
        gradients=True,
        device="cpu",
    )
    alone, batched = (data_part(folder) for folder in (case.folder / "calibration", tmp_path / "batched"))
    assert alone.keys() == batched.keys()
    for layers, (side, rows, packed) in alone.items():
        assert batched[layers][:2] == (side, rows)
        assert close_to(batched[layers][2], packed) < 1e-5, layers
    gradients = read_gradients(tmp_path / "batched")
    for layer, (side, rows, energy, G) in read_gradients(case.folder / "calibration").items():
        assert gradients[layer][:2] == (side, rows)
        assert gradients[layer][2] == pytest.approx(energy, rel=1e-4)
        assert close_to(gradients[layer][3], G) < 1e-4, layer


def test_the_room_that_activations_need_is_estimated_with_those_of_the_tower(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never too low, and not far too high; where images have many patches it would be too low without these."""
    estimates, streams = [], []
    monkeypatch.setattr(stage, "require_room", lambda folder, output, needed, fewer: estimates.append(needed))

    class Kept(BackwardLockStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            streams.append(self)

    monkeypatch.setattr(stage, "BackwardLockStep", Kept)
    options: dict[str, Any] = {"base": str(case.folder / "base"), "data": case.folder / "data" / "train.jsonl"}
    calibrate(**options, output=tmp_path / "calibration", gradients=True, device="cpu")
    assert 0.4 * estimates[0] < streams[0].spilled <= estimates[0]
    if case.family == "qwen2.5-vl":  # four patches for each token of an image
        monkeypatch.setattr(passes, "PIXELS", "nothing")
        calibrate(**options, output=tmp_path / "control", gradients=True, device="cpu")
        assert estimates[1] < streams[1].spilled


def test_gradients_are_of_the_next_token_and_never_of_a_token_of_an_image(case: Case) -> None:
    calls = case.inputs("train.jsonl")
    found = read_gradients(case.folder / "calibration")

    def losses(targets: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        wanted = [targets(call["input_ids"][0]) for call in calls]
        return [
            lambda model, call=call, of=of: summed_loss(model, call, of)[0]
            for call, of in zip(calls, wanted, strict=True)
        ]

    expected = gradient_moments(case.model, losses(case.targets))
    assert any(TOWERS[case.family] in layer for layer in found)
    for layer, (side, rows, energy, G) in found.items():
        assert rows == expected[layer].tokens, layer
        assert energy == pytest.approx(expected[layer].energy, rel=1e-4), layer
        assert close_to(G, expected[layer].of(side)) < 1e-4, layer
    # The control: with image tokens among the targets the gradients are others.
    everything = gradient_moments(case.model, losses(lambda ids: torch.ones_like(ids, dtype=torch.bool)))
    layer = next(name for name in found if "language_model" in name)
    assert close_to(everything[layer].outside, expected[layer].outside) > 0.02


def products(case: Case, emulator: Path) -> Any:
    """The base with the product of its factors in the place of every factored weight."""
    from safetensors.torch import load_file

    tensors, model = load_file(emulator / "model.safetensors"), copy.deepcopy(case.model)
    for name in read_json(emulator / "emulator.json")["layers"]:
        U, S, Vh = (tensors[f"{name}.{factor}"].double() for factor in ("U", "S", "Vh"))
        model.get_submodule(name).weight.data = (U * S @ Vh).float()
    return model


def test_the_emulator_reads_images_through_its_low_rank_tower(case: Case) -> None:
    emulator = case.folder / "emulator"
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(emulator, trust_remote_code=True).eval()
    dense = products(case, emulator)
    call = case.inputs("heldout.jsonl")[0]
    with torch.no_grad():
        found, expected, base = (model(**call).logits for model in (loaded, dense, case.model))
    assert close_to(found, expected) < 1e-4
    assert close_to(base, expected) > 1e-2  # the control
    blank = {**call, "pixel_values": torch.zeros_like(call["pixel_values"])}
    with torch.no_grad():
        assert close_to(loaded(**blank).logits, found) > 1e-3, "the image matters"


def test_the_processor_of_the_emulator_is_that_of_the_base(case: Case) -> None:
    source = open_source(str(case.folder / "emulator"))
    processor = load_processor(source, load_config(source))
    picture = Image.open(case.folder / "data" / "pictures" / "red-0.png")
    text = pico_vision.MARKS[case.family]
    found, expected = (p(text=[text], images=[[picture]], return_tensors="pt") for p in (processor, case.processor))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert processor.chat_template == case.processor.chat_template


def test_a_plain_trainer_trains_tower_projector_and_language_model_on_images(case: Case) -> None:
    losses = [entry["loss"] for entry in case.trainer.state.log_history if "loss" in entry]
    assert len(losses) == 16
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.1  # the head stays random, so they do not fall far
    trained = {
        name for name, parameter in case.trainer.model.named_parameters() if ".lora_B." in name and parameter.any()
    }
    for part in (TOWERS[case.family], PROJECTORS[case.family], "language_model"):
        assert any(part in name for name in trained), part


def test_losses_on_images_are_those_of_the_models_in_memory(case: Case) -> None:
    base, corrected = case.folder / "base", case.folder / "corrected"
    results = evaluate(
        base=str(base),
        emulator=case.folder / "emulator",
        adapters=[case.folder / "lora", corrected],
        data=case.folder / "data" / "heldout.jsonl",
        batch_size=2,
        device="cpu",
    )
    found = {(result.model, Path(result.adapter).name if result.adapter else None): result for result in results}
    calls = case.inputs("heldout.jsonl")
    with_adapter = PeftModel.from_pretrained(copy.deepcopy(case.model), corrected).eval()
    expected = {("base", None): case.model, ("base", "corrected"): with_adapter}
    expected["emulator", None] = products(case, case.folder / "emulator")
    for key, model in expected.items():
        with torch.no_grad():
            sums = [summed_loss(model, call, case.targets(call["input_ids"][0])) for call in calls]
        tokens = sum(count for _, count in sums)
        assert found[key].tokens == tokens
        assert found[key].loss == pytest.approx(float(sum(loss for loss, _ in sums)) / tokens, rel=1e-4), key
    assert found["base", "corrected"].loss < found["base", None].loss


def test_targets_choose_tower_projector_or_language_model(case: Case, tmp_path: Path) -> None:
    chosen = {}
    for part, pattern in {
        "tower": TOWERS[case.family],
        "projector": PROJECTORS[case.family],
        "language model": "language_model.layers",
    }.items():
        output = tmp_path / part
        calibrate(
            base=str(case.folder / "base"),
            data=case.folder / "data" / "train.jsonl",
            output=output,
            samples=2,
            targets=pattern,
            device="cpu",
        )
        chosen[part] = set(read_json(output / "calibration.json")["layers"])
        expected = {
            name for name, module in case.model.named_modules() if type(module) is nn.Linear and pattern in name
        }
        assert chosen[part] == expected != set()
    assert not chosen["tower"] & chosen["projector"]
    # A projector of low rank alone: everything else is the base's.
    emulator = tmp_path / "emulator"
    build_emulator(base=str(case.folder / "base"), calibration=tmp_path / "projector", ratio=0.3, output=emulator)
    assert set(read_json(emulator / "emulator.json")["layers"]) == chosen["projector"]
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(emulator, trust_remote_code=True).eval()
    calls = case.inputs("heldout.jsonl")
    with torch.no_grad():
        seen, unseen = calls[0], calls[-1]  # with an image, and without
        assert close_to(loaded(**seen).logits, products(case, emulator)(**seen).logits) < 1e-4
        assert close_to(loaded(**seen).logits, case.model(**seen).logits) > 1e-3
        assert close_to(loaded(**unseen).logits, case.model(**unseen).logits) < 1e-5
