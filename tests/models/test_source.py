"""Bases come from local folders or from the Hub, of which only the needed files are fetched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.base import choose_device, open_base
from emloc_tools.models.source import first_line, open_source
from tests import pico
from tests.models.fake_hub import FakeHub, commit_of, serve

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from huggingface_hub import constants
from emloc_tools.errors import EmlocError
from emloc_tools.models.base import open_base
for line in sys.stdin:
    options = json.loads(line)
    constants.HF_HUB_CACHE, read = options.pop("cache"), options.pop("read")
    try:
        opened = open_base(**options)
        weights = opened.weights()
        total = sum(float(t.double().sum()) for t in weights.load(weights.stored_names()).values()) if read else None
        print(json.dumps({"revision": opened.source.revision, "total": total}), flush=True)
    except EmlocError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), flush=True)
"""


class Worker:
    """`open_base` in a fresh process, whose huggingface_hub reads its settings anew; without an endpoint offline."""

    def __init__(self, home: Path, endpoint: str | None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint}
        command = [sys.executable, "-c", SCRIPT]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def open(self, cache: Path, *, read: bool = False, **options: Any) -> dict[str, Any]:
        """What came of opening a base: its revision and, if it was read, the sum of its weights; or the error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"cache": str(cache), "read": read, **options}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the process; it must not have printed a traceback."""
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        assert "Traceback" not in errors


def total(folder: Path) -> float:
    """The sum of all weights, to tell which revision's weights were read."""
    opened = open_base(str(folder))
    weights = opened.weights()
    return sum(float(t.double().sum()) for t in weights.load(weights.stored_names()).values())


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two states of a repository; the first is sharded, the second has one file, and both hold what nobody needs."""
    root = tmp_path_factory.mktemp("states")
    pico.save_model(root / "main", max_shard_size="30KB")
    pico.save_model(root / "v2", seed=5)
    for name in ("main", "v2"):
        (root / name / "pytorch_model.bin").write_bytes(b"pickled")
        (root / name / "evil.py").write_text("raise SystemExit")
        (root / name / "README.md").write_text("card")
        (root / name / "LICENSE").write_text("free")
        (root / name / "onnx").mkdir()
        (root / name / "onnx" / "config.json").write_text("{}")
    return {"main": root / "main", "v2": root / "v2"}


@pytest.fixture(scope="module")
def hub(states: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Hub with the repository `org/tiny`, one that is gated and one that is quantised in a way that is not read."""
    quantised = tmp_path_factory.mktemp("quantised")
    shutil.copytree(states["v2"], quantised, dirs_exist_ok=True)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (quantised / "config.json").write_text(json.dumps(config))
    repositories = {"org/tiny": states, "org/gated": {"main": quantised}, "org/quantised": {"main": quantised}}
    with serve(FakeHub(repositories, gated=frozenset({"org/gated"}))) as served:
        yield served


@pytest.fixture(scope="module")
def online(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A process that reaches the Hub."""
    worker = Worker(tmp_path_factory.mktemp("online"), hub.url)
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A process without a network."""
    worker = Worker(tmp_path_factory.mktemp("offline"), None)
    yield worker
    worker.stop()


@pytest.fixture(autouse=True)
def _forget(hub: FakeHub) -> None:
    hub.requests.clear()


def test_opening_a_hub_model_fetches_the_small_files_and_reading_its_weights(
    hub: FakeHub, online: Worker, offline: Worker, states: dict[str, Path], tmp_path: Path
) -> None:
    opened = online.open(tmp_path, base="org/tiny")
    small = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json"]
    assert opened == {"revision": commit_of("main"), "total": None}
    small += ["tokenizer.json", "tokenizer_config.json"]
    assert hub.fetched() == small

    read = online.open(tmp_path, base="org/tiny", read=True)
    shards = sorted(path.name for path in states["main"].glob("*.safetensors"))
    assert read == {"revision": commit_of("main"), "total": pytest.approx(total(states["main"]), rel=1e-12)}
    assert hub.fetched() == sorted([*small, *shards])
    # Weights are asked for by the commit that was opened, whatever `main` means by then.
    assert {revision for _, revision, name in hub.requests if name in shards} == {commit_of("main")}

    # Another run without a network finds everything in the cache.
    hub.requests.clear()
    assert offline.open(tmp_path, base="org/tiny", read=True) == read
    assert hub.requests == []


def test_a_revision_is_honoured(
    hub: FakeHub, online: Worker, offline: Worker, states: dict[str, Path], tmp_path: Path
) -> None:
    expected = {"revision": commit_of("v2"), "total": pytest.approx(total(states["v2"]), rel=1e-12)}
    assert expected["total"] != total(states["main"])
    assert online.open(tmp_path, base="org/tiny", revision="v2", read=True) == expected
    assert offline.open(tmp_path, base="org/tiny", revision="v2", read=True) == expected
    assert "model.safetensors" in hub.fetched()


def test_code_is_fetched_only_with_trust(hub: FakeHub, online: Worker, tmp_path: Path) -> None:
    online.open(tmp_path, base="org/tiny")
    assert "evil.py" not in hub.fetched()
    online.open(tmp_path, base="org/tiny", trust_remote_code=True)
    assert "evil.py" in hub.fetched()
    assert not {"pytorch_model.bin", "README.md", "onnx/config.json"} & {name for *_, name in hub.requests}


def test_a_quantised_model_is_refused_before_its_weights_are_fetched(
    hub: FakeHub, online: Worker, tmp_path: Path
) -> None:
    answer = online.open(tmp_path, base="org/quantised")
    assert answer["error"] == "UnsupportedError"
    assert "org/quantised is quantised" in answer["message"]
    assert "config.json" in hub.fetched()
    assert not [name for *_, name in hub.requests if name.endswith("safetensors")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "org/absent"}, "org/absent is neither a local folder nor a model on the Hub"),
        ({"base": "org/tiny", "revision": "v9"}, "org/tiny has no revision v9"),
        ({"base": "org/gated"}, "org/gated is gated: accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_one_readable_message(
    online: Worker, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    answer = online.open(tmp_path, **options)
    assert answer["error"] == "InputError"
    assert message in answer["message"]


def test_weights_that_the_hub_withholds_are_a_readable_message(
    hub: FakeHub, online: Worker, states: dict[str, Path], tmp_path: Path
) -> None:
    shard = sorted(path.name for path in states["main"].glob("*.safetensors"))[1]
    hub.broken.add(shard)
    answer = online.open(tmp_path, base="org/tiny", read=True)
    hub.broken.clear()
    assert answer["error"] == "InputError"
    assert f"org/tiny: {shard}" in answer["message"]


def test_an_unknown_id_offline_is_a_message() -> None:
    with pytest.raises(InputError, match="org/unknown is no local folder, and the Hub does not give it"):
        open_source("org/unknown")


def test_a_local_folder_is_used_where_it_is(states: dict[str, Path]) -> None:
    source = open_source(str(states["v2"]))
    assert (source.folder, source.revision) == (states["v2"], None)
    assert source.locate("model.safetensors") == states["v2"] / "model.safetensors"
    assert source.locate("model.safetensors.index.json") is None


def test_a_revision_of_a_local_folder_is_refused(states: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is a local folder, which has no --revision"):
        open_source(str(states["v2"]), revision="v2")


def test_a_file_is_refused_as_a_base(states: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"config\.json is a file; --base takes"):
        open_source(str(states["v2"] / "config.json"))


@pytest.mark.parametrize("base", ["./absent/folder", "/absent", "a/b/c/d", "no such thing", "../a/b"])
def test_what_can_be_no_id_is_not_asked_for(base: str) -> None:
    with pytest.raises(InputError, match="does not exist; --base takes"):
        open_source(base)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_source(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = pico.save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="weights are read only from safetensors, never unpickled"):
        open_base(str(tmp_path))


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match="--device abacus cannot be used here"):
        choose_device("abacus")


def test_the_first_line_of_an_error_without_a_message_is_its_type() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
