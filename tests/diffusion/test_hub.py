"""A pipeline on the Hub: its denoiser is found there, and of all else nothing but small files is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.diffusion.conftest import Case
from tests.models.fake_hub import FakeHub, commit_of, serve
from tests.stages.reference import read_tensors

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from emloc_tools.errors import InputError
from emloc_tools.models.source import open_source, open_tensors
for line in sys.stdin:
    try:
        source = open_source(**json.loads(line))
        with open_tensors(source, "diffusers") as tensors:
            total = sum(float(tensors.read(name).double().sum()) for name in tensors.names())
        found = {"id": source.id, "revision": source.revision, "folder": source.folder.name, "total": total}
    except InputError as error:
        found = {"message": str(error)}
    print(json.dumps(found), flush=True)
"""


def test_the_denoiser_of_a_pipeline_is_found_and_fetched_alone(flux: Case, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    (two / "model_index.json").write_text(json.dumps({"unet": ["d", "U"], "unet_2": ["d", "U"], "vae": ["d", "V"]}))
    hub = FakeHub({"org/pipe": {"main": flux.pipeline}, "org/two": {"main": two}})
    questions = [{"base": "org/pipe"}, {"base": "org/pipe/transformer"}, {"base": "org/two"}, {"base": "org/pipe/vea"}]
    with serve(hub):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input="".join(json.dumps(question) + "\n" for question in questions),
            env={**environment, "HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found, named, several, absent = map(json.loads, done.stdout.splitlines())
    stored = read_tensors(flux.pipeline / "transformer")
    expected = {
        "revision": commit_of("main"),
        "folder": "transformer",
        "total": pytest.approx(sum(float(tensor.double().sum()) for tensor in stored.values()), rel=1e-9),
    }
    assert found == {"id": "org/pipe", **expected}
    assert named == {"id": "org/pipe/transformer", **expected}
    assert "org/two is a pipeline with unet, unet_2; name one of them, such as org/two/unet" in several["message"]
    assert "org/pipe/vea has no config.json" in absent["message"]
    weights = {name for name in hub.fetched() if name.endswith((".safetensors", ".bin"))}
    assert weights == {"transformer/diffusion_pytorch_model.safetensors"}
