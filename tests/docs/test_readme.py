"""The first look in Python that the README gives runs as it stands there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import Run
from tests.docs.test_docs import ROOT, blocks
from tests.stages.reference import read_json


def test_the_first_look_in_python_runs_and_prints_the_worst_layer(run: Run, tmp_path: Path) -> None:
    (program,) = [block for block in blocks(ROOT / "README.md", "python") if "emloc_tools" in block]
    (tmp_path / "demo-run").mkdir()
    (tmp_path / "demo-run" / "emulator-0.25").symlink_to(run.emulator)
    program += "\nprint(sum(parameter.numel() for parameter in model.parameters()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = read_json(run.emulator / "emulator.json")
    name, layer = max(manifest["layers"].items(), key=lambda item: item[1]["relative_error"])
    assert done.stdout.splitlines() == [
        f"{name}: rank {layer['rank']}, relative error {layer['relative_error']:.3f}",
        str(manifest["parameters"]),
    ]
