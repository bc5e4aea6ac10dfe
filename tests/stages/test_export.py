"""export --to dense: the base's own class with W_E for weights, in the layout that the class saves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import xxhash
from safetensors.torch import load_file

from emloc_tools.errors import FormatError, InputError, UnsupportedError
from emloc_tools.files.tensors import TensorFolder
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.export import export
from tests import pico
from tests.conftest import Run
from tests.stages.reference import contents, read_json, read_tensors

FAMILIES = ("llama", "llama-tied", "gpt2", "bert", "gemma3", "qwen3-moe")
IDS = torch.tensor([[1, 40, 9, 77, 200, 31, 150, 8]])
FLOAT32 = 10 * torch.finfo(torch.float32).eps  # relative; for sums of a few dozen products


@pytest.fixture(scope="module")
def made_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `base`, `emulator` (its truncated SVD) and `dense` of a family, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            root = made[family] = tmp_path_factory.mktemp(family)
            pico.save_model(root / "base", family)
            build_emulator(base=str(root / "base"), ratio=0.5, output=root / "emulator")
            export(emulator=root / "emulator", output=root / "dense", command="export it")
        return made[family]

    return make


def product(emulator: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """U diag(S) Vh in float64."""
    U, S, Vh = (emulator[f"{name}.{factor}"].double() for factor in ("U", "S", "Vh"))
    return U @ torch.diag(S) @ Vh


def logits(folder: Path, family: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the stock class computes, and what it says of the keys."""
    model, info = getattr(transformers, pico.CLASSES[family]).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        return model.eval()(IDS).logits, info


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_class_computes_what_the_emulator_computes(made_of: Callable[[str], Path], family: str) -> None:
    root = made_of(family)
    found, info = logits(root / "dense", family)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    auto = {"bert": transformers.AutoModelForMaskedLM}.get(family, transformers.AutoModelForCausalLM)
    emulator = auto.from_pretrained(root / "emulator", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = emulator(IDS).logits
    limit = 10 * FLOAT32 * expected.abs().max()  # rounding adds up over the layers
    assert (found - expected).abs().max() < limit
    assert (found - logits(root / "base", family)[0]).abs().max() > 100 * limit, "the emulator is the base"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_dtypes_are_those_of_the_base(made_of: Callable[[str], Path], family: str) -> None:
    """Also where the model has other names and tensors than its checkpoint, such as one per expert."""
    base, dense = (read_tensors(made_of(family) / name) for name in ("base", "dense"))
    assert {name: (t.shape, t.dtype) for name, t in dense.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factored_weights_are_products_and_all_others_keep_their_bytes(
    made_of: Callable[[str], Path], family: str
) -> None:
    root = made_of(family)
    base, emulator, dense = (read_tensors(root / name) for name in ("base", "emulator", "dense"))
    factored = {name.removesuffix(".U") for name in emulator if name.endswith(".U")}
    assert factored
    for name, found in dense.items():
        layer = name.removesuffix(".weight")
        if layer not in factored:
            assert torch.equal(found, base[name]), name
            continue
        W_E = product(emulator, layer)
        expected = W_E.T if family == "gpt2" else W_E
        assert (found.double() - expected).abs().max() < FLOAT32 * expected.abs().max(), name
        assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == emulator[f"{layer}.S"].numel() < min(found.shape)


def test_products_of_experts_are_those_of_each_expert(made_of: Callable[[str], Path]) -> None:
    """On disk every expert has its own gate_proj and up_proj; in the model, and so in the emulator, they are one."""
    emulator, dense = (read_tensors(made_of("qwen3-moe") / name) for name in ("emulator", "dense"))
    stem = "model.layers.1.mlp.experts"
    for number in range(4):
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            U, S, Vh = (emulator[f"{stem}.{stack}_{factor}"][number].double() for factor in ("U", "S", "Vh"))
            expected = U @ torch.diag(S) @ Vh
            found = torch.cat([dense[f"{stem}.{number}.{part}.weight"] for part in parts]).double()
            assert (found - expected).abs().max() < FLOAT32 * expected.abs().max(), (number, stack)


def test_bfloat16_products_are_rounded_once(run: Run, tmp_path: Path) -> None:
    build_emulator(base=str(run.base), ratio=0.5, dtype="bfloat16", output=tmp_path / "emulator")
    export(emulator=tmp_path / "emulator", output=tmp_path / "dense")
    emulator, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("emulator", "dense"))
    name = "model.layers.0.mlp.up_proj"
    once = product(emulator, name).bfloat16()
    twice = (emulator[f"{name}.U"] * emulator[f"{name}.S"]) @ emulator[f"{name}.Vh"]
    found = dense[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    # A sum in float32 may fall to the other side of a tie between two values; one in bfloat16 often does.
    assert (found != once).float().mean() < 0.01
    assert (twice != once).float().mean() > 0.1, "rounding on the way makes no difference here"


def test_configuration_companions_and_note(made_of: Callable[[str], Path]) -> None:
    root = made_of("llama")
    config, expected = (read_json(root / name / "config.json") for name in ("dense", "base"))
    assert {key: config[key] for key in expected} == expected
    assert not {"emloc", "auto_map", "quantization_config"} & config.keys()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (root / "dense" / name).read_bytes() == (root / "base" / name).read_bytes()
    assert not list((root / "dense").glob("*.py"))
    note = read_json(root / "dense" / "emloc-export.json")
    assert note["base"]["id"] == str(root / "base")
    assert note["made_by"]["command"] == "export it"
    assert len(note["multiplied"]) == len(read_json(root / "emulator" / "emulator.json")["layers"])


def test_memory_holds_one_tensor_and_every_tensor_is_read_once(
    made_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TensorFolder.read

    def counted(self: TensorFolder, name: str, buffer: torch.Tensor | None = None) -> torch.Tensor:
        read.append(name)
        return original(self, name, buffer)

    monkeypatch.setattr(TensorFolder, "read", counted)
    written: list[int] = []
    emulator = made_of("qwen3-moe") / "emulator"
    export(emulator=emulator, output=tmp_path / "dense", progress=lambda step: written.append(len(read)))
    guard = [name for name, tensor in read_tensors(emulator).items() if tensor.shape == (1,)]
    assert sorted([*read, *guard]) == sorted(read_tensors(emulator))
    assert max(later - earlier for earlier, later in itertools.pairwise(written)) == 3  # U, S, Vh


def test_shards_have_an_index_and_the_same_tensors(made_of: Callable[[str], Path], tmp_path: Path) -> None:
    root = made_of("llama")
    export(emulator=root / "emulator", output=tmp_path / "dense", max_shard_size=50_000)
    assert len(list((tmp_path / "dense").glob("model-*.safetensors"))) > 2
    whole, shards = read_tensors(root / "dense"), read_tensors(tmp_path / "dense")
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    assert torch.equal(logits(tmp_path / "dense", "llama")[0], logits(root / "dense", "llama")[0])


def test_our_own_folder_is_replaced_where_that_is_asked_for(made_of: Callable[[str], Path], tmp_path: Path) -> None:
    emulator, output = made_of("llama") / "emulator", tmp_path / "dense"
    export(emulator=emulator, output=output, command="export it")
    before = contents(output)
    with pytest.raises(InputError, match="--overwrite"):
        export(emulator=emulator, output=output)
    export(emulator=emulator, output=output, overwrite=True, command="export it")
    assert contents(output) == before


def test_a_damaged_emulator_leaves_nothing(made_of: Callable[[str], Path], tmp_path: Path) -> None:
    for path in (made_of("llama") / "emulator").iterdir():
        (tmp_path / "emulator").mkdir(exist_ok=True)
        if path.is_file():
            (tmp_path / "emulator" / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "emulator" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(FormatError, match="E10"):
        export(emulator=tmp_path / "emulator", output=tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["emulator"]


def test_a_base_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    emulator = Path(__file__).parents[2] / "formats" / "emulator" / "golden" / "ok-own-code"
    with pytest.raises(UnsupportedError, match="code of the base's own"):
        export(emulator=emulator, output=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_what_is_no_emulator_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no emulator\.json"):
        export(emulator=run.base, output=tmp_path / "dense")


def test_the_note_is_json_that_names_the_emulator_by_its_manifest(made_of: Callable[[str], Path]) -> None:
    root = made_of("llama")
    note = json.loads((root / "dense" / "emloc-export.json").read_text())
    digest = xxhash.xxh3_128((root / "emulator" / "emulator.json").read_bytes()).hexdigest()
    assert note["emulator"] == f"xxh3_128:{digest}"
