"""What the commands print of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke, invoke
from tests.experts.conftest import Case
from tests.experts.families import UNREACHED

__all__ = ["invoke"]  # the fixture of the commands' own tests


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def case(case_of: Callable[[str], Case]) -> Case:
    """The base with an expert that no token reaches, in two stacks of each of two blocks."""
    return case_of("gpt-oss")


def test_calibrate_warns_of_experts_without_tokens(case: Case, invoke: Invoke) -> None:
    line = ("calibrate", "--base", case.base, "--data", case.data, "--device", "cpu", "--max-length", "40")
    printed = invoke(*line, "--output", "out")
    stack = next(iter(case.W))
    assert f"no sample reached 4 layers, such as {stack}.{UNREACHED};" in one_line(printed.stderr)
    assert "single experts of others become plain SVDs" in one_line(printed.stderr)


def test_build_emulator_and_inspect_show_stacks_and_experts_without_tokens(
    case: Case,
    invoke: Invoke,
) -> None:
    line = ("build-emulator", "--base", case.base, "--calibration", case.calibration, "--ratio", "0.4")
    printed = invoke(*line, "--output", "out", columns=200)
    shown, manifest = one_line(printed.stdout), json.loads(Path("out/emulator.json").read_text())
    experts = sum(len(stack["experts"]) for stack in manifest["experts"].values())
    assert experts == 20
    layers = len(manifest["layers"])
    assert f"{layers} layers, and {experts} matrices of experts in 4 stacks, which take no LoRA" in shown
    assert "4 matrices of experts that no token was routed to are plain SVDs" in shown
    of_inspect = invoke("inspect", "out", columns=200).stdout.splitlines()
    for stack, record in manifest["experts"].items():
        block, _, kind = stack.removeprefix("model.layers.").partition(".")
        heading = f"{kind}  {record['out_features']} x {record['in_features']}"
        below = (text.split() for text in of_inspect[of_inspect.index(heading) + 1 :])
        row = next(columns for columns in below if columns[0] == block)
        assert row[1] == str(record["rank"])
        assert row[-2:] == [str(len(record["experts"])), "1"]
