"""The commands' options for gradients of the loss: what they print, what they refuse, what inspect shows of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.calibrate import calibrate
from tests import pico
from tests.cli.conftest import Invoke
from tests.conftest import Run


@pytest.fixture(scope="module")
def weighted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the run's base with gradients."""
    folder = tmp_path_factory.mktemp("weighted") / "calibration"
    calibrate(base=str(run.base), data=run.data, output=folder, gradients=True, max_length=32, device="cpu")
    return folder


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_calibrate_collects_gradients_where_it_is_asked_to(run: Run, invoke: Invoke) -> None:
    line = ("calibrate", "--base", run.base, "--data", run.data, "--device", "cpu", "--max-length", "32")
    results = {}
    for name, options in (("plain", ()), ("with", ("--gradients",))):
        printed = invoke(*line, *options, "--output", name, "--json")
        results[name] = json.loads(printed.stdout)
        assert ("gradients: " in printed.stderr) == (name == "with")
    assert (results["plain"]["gradients"], results["with"]["gradients"]) == (0, 21)
    assert results["plain"]["grams"] == results["with"]["grams"]
    assert results["with"]["gram_bytes"] > results["plain"]["gram_bytes"]


def test_calibrate_counts_all_gram_matrices(run: Run, invoke: Invoke) -> None:
    printed = invoke(
        "calibrate", "--base", run.base, "--data", run.data, "--device", "cpu", "--gradients", "--output", "out"
    )
    records = json.loads(Path("out/calibration.json").read_text())["grams"]
    assert f"{len(records)} Gram matrices" in one_line(printed.stdout)
    assert "Warning" not in printed.stderr


def test_layers_that_the_loss_does_not_depend_on_are_warned_of(
    run: Run, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and queries of a single token have no say in its attention; here they are told apart by hand."""
    from emloc_tools.stages import gradient_sums

    add = gradient_sums.GradientSums._add

    def some(self: gradient_sums.GradientSums, batch: int, gradient: gradient_sums.Gradient) -> None:
        if "layers.0" not in gradient.layer:
            add(self, batch, gradient)

    monkeypatch.setattr(gradient_sums.GradientSums, "_add", some)
    line = ("calibrate", "--base", run.base, "--data", run.data, "--device", "cpu", "--gradients", "--output", "out")
    warning = "Warning: the loss depends on 14 of 21 layers; the others are not weighted by it"
    assert warning in invoke(*line).stderr
    assert invoke(*line, "--overwrite", "--quiet").stderr == ""


def test_build_emulator_weights_by_default_and_says_so(run: Run, weighted: Path, invoke: Invoke) -> None:
    line = ("build-emulator", "--base", run.base, "--calibration", weighted, "--ratio", "0.4")
    text = one_line(invoke(*line, "--output", "default").stdout)
    assert "21 layers, ranks by adaptive allocation" in text
    assert "weighting by the loss gradient in 21 layers, damping 0.05" in text
    assert "of a layer's output on the data, weighted by the loss gradient" in text
    text = one_line(invoke(*line, "--weighting", "none", "--output", "none").stdout)
    assert "ranks by uniform allocation" in text
    assert "gradient" not in text
    given = ("--weighting", "gradient", "--allocation", "uniform", "--damping", "0.2")
    manifest = json.loads(invoke(*line, *given, "--output", "given", "--json").stdout)["manifest"]
    assert (manifest["weighting"]["damping"], manifest["allocation"]) == (0.2, "uniform")


def test_the_paper_s_preset_is_neither_weighted_nor_adaptive(run: Run, weighted: Path, invoke: Invoke) -> None:
    line = ("build-emulator", "--base", run.base, "--calibration", weighted, "--ratio", "0.4", "--preset", "paper")
    manifest = json.loads(invoke(*line, "--output", "out", "--json").stdout)["manifest"]
    written = build_emulator(
        base=str(run.base),
        calibration=weighted,
        ratio=0.4,
        weighting="none",
        allocation="uniform",
        output=Path("expected"),
    )
    assert manifest["format_version"] == 1
    assert manifest["tensors"] == written.manifest.tensors


@pytest.mark.parametrize("option", [("--weighting", "none"), ("--allocation", "uniform"), ("--damping", "0.1")])
def test_the_preset_stands_for_itself(run: Run, weighted: Path, invoke: Invoke, option: tuple[str, str]) -> None:
    line = ("build-emulator", "--base", run.base, "--calibration", weighted, "--ratio", "0.4", "--output", "out")
    printed = invoke(*line, "--preset", "paper", *option)
    assert printed.status == 2
    assert "--preset paper already says --weighting none --allocation uniform" in printed.error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--weighting", "gradient"), r"--weighting gradient needs gradients, and .*; run calibrate with --gradients"),
        (("--damping", "0.1"), r"--damping belongs to a weighting by gradients: .*; run calibrate with --gradients"),
        (("--damping", "-1"), r"--damping -1 must be above 0: .* such as 0\.05"),
        (("--damping", "0.1", "--weighting", "none"), "--weighting none has no use for it"),
    ],
)
def test_options_that_need_gradients_say_where_to_get_them(
    run: Run, invoke: Invoke, options: tuple[str, ...], says: str
) -> None:
    line = ("build-emulator", "--base", run.base, "--calibration", run.calibration, "--ratio", "0.4", "--output", "out")
    printed = invoke(*line, *options)
    assert printed.status == 1
    assert re.search(says, printed.error), printed.error


def test_inspect_shows_gradients_and_weighting(run: Run, weighted: Path, invoke: Invoke) -> None:
    text = invoke("inspect", weighted).stdout
    assert "layers with gradients 21" in one_line(text)
    assert "loss next-token" in one_line(text)
    assert re.search(r"^mlp\.up_proj  48 x 32\n +0-2  .* input$", text, re.MULTILINE)
    line = ("build-emulator", "--base", run.base, "--calibration", weighted, "--ratio", "0.4", "--output", "out")
    sensitivity = json.loads(invoke(*line, "--json").stdout)["manifest"]["weighting"]["sensitivity"]
    text = one_line(invoke("inspect", "out").stdout)
    assert "weighting gradient damping 0.05 weighted layers 21" in text
    rows = {row["layer"]: row for row in json.loads(invoke("inspect", "out", "--json").stdout)["layers"]}
    assert {name: row["sensitivity"] for name, row in rows.items()} == sensitivity
    assert "sensitivity" not in invoke("inspect", run.emulator).stdout


def test_merging_counts_the_gradients_too(run: Run, weighted: Path, invoke: Invoke, tmp_path: Path) -> None:
    data = pico.save_texts(tmp_path / "more.jsonl", count=2, seed=1)
    calibrate(base=str(run.base), data=data, output=tmp_path / "other", gradients=True, device="cpu")
    printed = invoke("merge-calibration", weighted, "other", "--output", "merged")
    count = len(json.loads(Path("merged/calibration.json").read_text())["grams"])
    assert f"{count} Gram matrices" in one_line(printed.stdout)
