"""Code in an emulator's folder is not executed, not even where the code of the base is trusted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from emloc_tools.errors import FormatError
from emloc_tools.stages.evaluate import evaluate
from tests.conftest import Run

CODE = """
from pathlib import Path
from transformers import LlamaConfig, PreTrainedTokenizerFast

Path({place!r}).write_text("executed")


class EmlocTokenizer(PreTrainedTokenizerFast):
    pass


class EmlocConfig(LlamaConfig):
    pass
"""


def update(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def trap(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the emulator whose tokenizer is code, and the file that appears if the code runs."""
    folder, place = tmp_path / "emulator", tmp_path / "place"
    shutil.copytree(run.emulator, folder)
    (folder / "trap.py").write_text(CODE.format(place=str(place)))
    update(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "trap.EmlocTokenizer"]})
    return folder, place


def test_trust_in_the_base_is_no_trust_in_the_emulator(run: Run, trap: tuple[Path, Path]) -> None:
    folder, place = trap
    trusting = evaluate(base=str(run.base), emulator=folder, data=run.data, device="cpu", trust_remote_code=True)
    assert not place.exists()
    plain = evaluate(base=str(run.base), emulator=run.emulator, data=run.data, device="cpu")
    assert [result.loss for result in trusting] == [result.loss for result in plain]
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # control: this is what trust would have done
    assert place.read_text() == "executed"


def test_the_base_is_still_trusted(run: Run, trap: tuple[Path, Path], tmp_path: Path) -> None:
    folder, place = trap
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    for name in ("trap.py", "tokenizer_config.json"):
        shutil.copyfile(folder / name, base / name)
    evaluate(base=str(base), emulator=run.emulator, data=run.data, device="cpu")
    assert not place.exists()
    evaluate(base=str(base), emulator=run.emulator, data=run.data, device="cpu", trust_remote_code=True)
    assert place.read_text() == "executed"


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoTokenizer"])
def test_an_emulator_that_brings_code_for_more_than_its_model_is_refused(
    run: Run, trap: tuple[Path, Path], auto: str
) -> None:
    folder, place = trap
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    update(folder / "config.json", auto_map={**auto_map, auto: f"trap.Emloc{auto.removeprefix('Auto')}"})
    with pytest.raises(FormatError, match=rf"auto_map\.{auto}: is no Auto class of models.*E12"):
        evaluate(base=str(run.base), emulator=folder, data=run.data, device="cpu", trust_remote_code=True)
    assert not place.exists()
    # Control, in a process of its own, since transformers keeps classes that it has seen.
    load = f"from transformers import {auto}; {auto}.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", load], check=True, capture_output=True)
    assert place.read_text() == "executed"
