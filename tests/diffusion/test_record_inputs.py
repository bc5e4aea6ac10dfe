"""record-inputs: a pipeline runs on prompts, and its transformer's inputs at some timesteps become calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from emloc_tools.cli import main
from emloc_tools.errors import InputError
from emloc_tools.stages.calibrate import calibrate
from emloc_tools.stages.record_inputs import read_prompts, record_inputs
from tests.diffusion import pico_flux
from tests.diffusion.conftest import Case, calls_in

STEPS, KEEP = 6, 3
SET = [word for name, value in pico_flux.SIZE.items() for word in ("--set", f"{name}={value}")]


def command(*words: object) -> Result:
    return CliRunner().invoke(main, ["record-inputs", *map(str, words)])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red dog\n\n  two blue cars \n")
    return path


def test_the_calls_are_those_of_the_pipeline_at_spread_timesteps(flux: Case, prompts: Path, tmp_path: Path) -> None:
    """Compared with all calls of the same pipeline, seen by a hook of the test's own."""
    words = ("--base", flux.base, "--prompts", prompts, "--steps", STEPS, "--keep", KEEP, *SET, "--seed", 4)
    done = command(*words, "--set", "guidance_scale=2.5", "--device", "cpu", "--json", "--output", tmp_path / "inputs")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["prompts"], result["calls"], result["component"]) == (2, 2 * KEEP, "transformer")
    found = calls_in(Path(result["file"]))
    assert len(found) == 2 * KEEP

    pipeline = pico_flux.load_pipeline(flux.pipeline)
    seen: list[dict[str, torch.Tensor]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    for number, prompt in enumerate(("a red dog", "two blue cars")):
        generator = torch.Generator().manual_seed(4 + number)
        pipeline(prompt, num_inference_steps=STEPS, guidance_scale=2.5, generator=generator, **pico_flux.SIZE)
    assert len(seen) == 2 * STEPS
    targets = [call.pop("target") for call in found]
    for place, call in enumerate(found):
        run, stretch = divmod(place, KEEP)
        width = STEPS // KEEP
        candidates = seen[run * STEPS + stretch * width : run * STEPS + (stretch + 1) * width]
        assert any(all(torch.equal(call[name], candidate[name]) for name in call) for candidate in candidates)
    assert set(found[0]) == {name for name, value in seen[0].items() if isinstance(value, torch.Tensor)}
    assert len({float(call["timestep"]) for call in found[:KEEP]}) == KEEP
    assert all(float(call["guidance"]) == 2.5 for call in found)
    noise = torch.stack(targets) - torch.stack([flux.model(**call).sample.detach() for call in found])
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / noise.numel()) ** 0.5  # four standard errors of a variance
    assert float(torch.stack(targets).var()) > 1.2  # control: the targets are not the noise alone


def test_what_is_recorded_calibrates(flux: Case, prompts: Path, tmp_path: Path) -> None:
    """And is counted by images and not by the rows of position ids."""
    recorded = record_inputs(
        base=flux.base, prompts=prompts, steps=2, keep=1, arguments=pico_flux.SIZE, output=tmp_path / "i", device="cpu"
    )
    result = calibrate(base=flux.base, data=recorded.file, output=tmp_path / "calibration", device="cpu")
    assert result.samples == recorded.calls == 2
    assert result.unreached == []


def test_the_weights_decide_the_precision(flux: Case, prompts: Path, tmp_path: Path) -> None:
    options = {"prompts": prompts, "steps": 1, "keep": 1, "arguments": pico_flux.SIZE, "device": "cpu"}
    for dtype in ("auto", "bfloat16"):
        result = record_inputs(base=flux.base, output=tmp_path / dtype, dtype=dtype, **options)
        wanted = torch.float32 if dtype == "auto" else torch.bfloat16
        assert calls_in(result.file)[0]["hidden_states"].dtype == wanted


def test_the_next_step_is_shown_and_the_output_is_not_replaced_unasked(
    flux: Case, prompts: Path, tmp_path: Path
) -> None:
    words = (
        "--base",
        flux.base,
        "--prompts",
        prompts,
        "--steps",
        1,
        *SET,
        "--device",
        "cpu",
        "--output",
        tmp_path / "i",
    )
    done = command(*words)
    assert done.exit_code == 0, done.output
    assert f"emloc-tools calibrate --base {flux.base} --data {tmp_path}/i/inputs.safetensors --samples 2" in done.stdout
    again = command(*words)
    assert (again.exit_code, "already exists" in again.stderr) == (1, True)
    assert command(*words, "--overwrite").exit_code == 0
    (tmp_path / "i" / "own.txt").write_text("")
    other = command(*words, "--overwrite")
    assert (other.exit_code, "also holds own.txt" in other.stderr) == (1, True)


def test_prompts_are_lines_or_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a red dog"}\n\n{"prompt": "two {cars}", "image": "1.png"}\n')
    assert read_prompts(path) == ["a red dog", "two {cars}"]
    path.with_suffix(".txt").write_text('{"prompt": "a red dog"}\n')
    assert read_prompts(path.with_suffix(".txt")) == ['{"prompt": "a red dog"}']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', r"prompts.jsonl:2: expected an object with `prompt`"),
        ("a red dog\n", r"prompts.jsonl:1: not JSON"),
        ("\n\n", "holds no prompt"),
        (None, "does not exist"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_bad_arguments_are_refused_in_one_line(flux: Case, prompts: Path, tmp_path: Path) -> None:
    base, output = ("--base", flux.base, "--prompts", prompts), ("--device", "cpu", "--output", tmp_path / "inputs")
    cases = [
        ((*base, "--set", "hight=16"), 1, "FluxPipeline has no argument hight; it has prompt, prompt_2"),
        ((*base, "--set", "height"), 2, "'height' is not of the form NAME=VALUE"),
        ((*base, "--set", "max_sequence_length=9999"), 1, "FluxPipeline cannot run on 'a red dog'"),
        ((*base, "--offload", "model"), 1, "--offload model moves models between a GPU and the CPU"),
        (("--base", flux.inputs, "--prompts", prompts), 1, "is a file"),
    ]
    for words, status, message in cases:
        done = command(*words, *output)
        assert (done.exit_code, message in done.stderr) == (status, True), done.stderr
        assert status == 2 or len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "inputs").exists()


def test_a_transformer_without_its_pipeline_is_refused(flux: Case, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").symlink_to(flux.pipeline / "transformer")
    with pytest.raises(InputError, match=r"is no pipeline of diffusers, which has a model_index.json"):
        record_inputs(base=str(tmp_path / "alone"), prompts=prompts, output=tmp_path / "inputs", device="cpu")
