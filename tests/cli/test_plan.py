"""The command `plan`, and `build-emulator --from-plan`."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from emloc_tools.cli.plan import Pixels
from tests import pico
from tests.cli.conftest import Invoke

SMALL = ("--memory", "335KB", "--reserve", "1", "--sequence-length", "64", "--lora-rank", "4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block."""
    folder = tmp_path_factory.mktemp("base")
    config = pico.config("llama")
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_plan_can_be_built_by_the_line_that_it_shows(base: Path, invoke: Invoke) -> None:
    shown = invoke("plan", "--base", base, *SMALL, "--save", "plan.json", columns=200)
    assert shown.status == 0
    line = next(line for line in shown.stdout.splitlines() if "emloc-tools build-emulator" in line)
    words = shlex.split(line[line.index("build-emulator") :])
    assert words[:3] == ["build-emulator", "--from-plan", "plan.json"]
    plan = json.loads(Path("plan.json").read_text())
    assert f"ratio {plan['ratio']:g}: 7 factored layers" in shown.stdout
    assert f"{plan['emulator']['parameters']:,} of {plan['base_model']['parameters']:,}" in shown.stdout
    assert invoke("build-emulator", "--from-plan", "plan.json", "--output", "planned").status == 0
    assert invoke("build-emulator", "--base", base, "--ratio", plan["ratio"], "--output", "by-ratio").status == 0
    ranks = [json.loads(Path(name, "config.json").read_text())["emloc"]["ranks"] for name in ("planned", "by-ratio")]
    assert ranks[0] == ranks[1]


def test_the_line_without_a_file_says_what_the_plan_does(base: Path, invoke: Invoke) -> None:
    """In bfloat16, by the ratio and the layers of the plan; the emulator then is of that precision."""
    options = ("--targets", "mlp", "--exclude", "up_proj", "--dtype", "bfloat16")
    shown = invoke("plan", "--base", base, "--memory", "270KB", "--reserve", "1", *SMALL[4:], *options, columns=300)
    line = next(line for line in shown.stdout.splitlines() if "emloc-tools build-emulator" in line)
    words = shlex.split(line[line.index("build-emulator") :])
    place = words.index("--calibration")
    assert invoke(*words[:place], *words[place + 2 : -1], "out").status == 0
    config = json.loads(Path("out", "config.json").read_text())
    assert sorted(config["emloc"]["ranks"]) == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate")]
    assert config["dtype"] == "bfloat16"


def test_json_is_the_plan_and_nothing_else(base: Path, invoke: Invoke) -> None:
    given = invoke("plan", "--base", base, "--memory", "1GB", "--sequence-length", "8", "--targets", "mlp", "--json")
    plan = json.loads(given.stdout)
    assert (plan["format"], plan["ratio"], plan["memory"], plan["reserve"]) == ("emloc-plan", None, 10**9, 5 * 10**7)
    assert plan["targets"] == "mlp"
    shown = invoke("plan", "--base", base, "--memory", "1GB", "--sequence-length", "8")
    assert "none is needed: the base itself can be trained in this memory" in shown.stdout


def test_a_plan_leaves_no_choice_of_another_size(invoke: Invoke) -> None:
    refused = invoke("build-emulator", "--from-plan", "plan.json", "--ratio", "0.5", "--output", "out")
    assert refused.status == 2
    assert "--from-plan already says the ratio" in " ".join(refused.stderr.split())


def test_without_a_plan_a_base_is_needed(invoke: Invoke) -> None:
    refused = invoke("build-emulator", "--ratio", "0.5", "--output", "out")
    assert refused.status == 2
    assert "Missing option '--base'" in refused.stderr


def test_what_is_no_plan_is_refused(invoke: Invoke) -> None:
    Path("plan.json").write_text('{"ratio": 0.5}')
    refused = invoke("build-emulator", "--from-plan", "plan.json", "--output", "out")
    assert refused.status == 1
    assert re.search(r"plan.json: format: is None, expected 'emloc-plan' \(format rule P2\)", refused.error)


@pytest.mark.parametrize(
    ("text", "size"), [("448", (448, 448)), ("1024x768", (1024, 768)), ("0", None), ("4x4x4", None), ("big", None)]
)
def test_sizes_in_pixels_are_height_and_width(text: str, size: tuple[int, int] | None, invoke: Invoke) -> None:
    if size is not None:
        assert Pixels().convert(text, None, None) == size
        return
    refused = invoke("plan", "--base", "b", "--memory", "1GB", "--image-size", text)
    assert refused.status == 2
    assert "is no size in pixels, such as 448 or 1024x768" in " ".join(refused.stderr.split())


def test_a_quiet_plan_prints_nothing_whatever_is_installed(base: Path) -> None:
    """bitsandbytes, which PEFT imports, warns of kernels that it lacks; it does so once in a process."""
    words = ["plan", "--base", str(base), *SMALL, "--quiet"]
    done = subprocess.run([sys.executable, "-m", "emloc_tools", *words], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert importlib.util.find_spec("bitsandbytes") is not None  # else this would show nothing
