"""Emulators load with their code, with our loader, and never by accident as something else."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from emloc_tools import load_emulator
from emloc_tools.errors import FormatError, UnsupportedError
from emloc_tools.models.loading import emulator_class
from emloc_tools.models.lowrank_layers import LowRankLayer
from emloc_tools.models.modeling import FILE, emulator_name, modeling_source
from emloc_tools.stages.build_emulator import build_emulator
from tests import pico
from tests.streaming.streamed import batches, checkpoint

FAMILIES = ["llama", "gpt2", "bert", "qwen3-moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator of a family, in one file."""
    root = tmp_path_factory.mktemp(request.param)
    pico.save_model(root / "base", request.param)
    exclude = "experts" if request.param == "qwen3-moe" else None  # test_experts has them
    build_emulator(base=str(root / "base"), ratio=0.5, exclude=exclude, output=root / "emulator")
    return root / "emulator"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's emulator in several files."""
    root = tmp_path_factory.mktemp("sharded")
    pico.save_model(root / "base")
    build_emulator(base=str(root / "base"), ratio=0.5, output=root / "emulator", max_shard_size=20_000)
    assert len(list((root / "emulator").glob("*.safetensors"))) > 2
    return root / "emulator"


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a folder."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def stock_class(folder: Path) -> Any:
    """The class of the base, which knows nothing of low-rank layers."""
    return getattr(transformers, config_of(folder)["architectures"][0].removeprefix("Emloc"))


def densify(folder: Path) -> Any:
    """An independent reference: the stock class with the products written into its weights, in float64 products."""
    model = stock_class(folder)(transformers.AutoConfig.from_pretrained(folder)).eval()
    state, ranks = checkpoint(folder), config_of(folder)["emloc"]["ranks"]
    for name in ranks:
        U, S, Vh = (state.pop(f"{name}.{factor}").double() for factor in ("U", "S", "Vh"))
        W = (U @ torch.diag(S) @ Vh).float()
        state[f"{name}.weight"] = W.T if "gpt2" in type(model).__module__ else W
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    model.tie_weights()
    return model


def logits(model: Any) -> torch.Tensor:
    """The logits of one batch without padding."""
    with torch.no_grad():
        result: torch.Tensor = model(**batches()[0]).logits
    return result


def test_our_loader_and_the_folder_s_own_code_give_the_model_of_the_products(emulator: Path) -> None:
    ours, expected = load_emulator(emulator).eval(), logits(densify(emulator))
    assert type(ours).__name__ == config_of(emulator)["architectures"][0]
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    auto = next(name for name, cls in config_of(emulator)["auto_map"].items() if cls.endswith(type(ours).__name__))
    theirs = getattr(transformers, auto).from_pretrained(emulator, trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert torch.equal(logits(theirs), logits(ours))


def test_every_auto_class_of_the_auto_map_loads_the_factors(emulator: Path) -> None:
    auto_map, stored = config_of(emulator)["auto_map"], checkpoint(emulator)
    ranks = config_of(emulator)["emloc"]["ranks"]
    assert len(auto_map) >= 2
    for auto, reference in auto_map.items():
        cls = getattr(transformers, auto)
        model, report = cls.from_pretrained(emulator, trust_remote_code=True, output_loading_info=True)
        assert not [name for name in report["unexpected_keys"] if any(rank in name for rank in ranks)], auto
        assert f"{FILE}.{type(model).__name__}" == reference, auto
        layers = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "Vh", None), torch.Tensor)}
        assert len(layers) == len(ranks), auto
        for name, layer in layers.items():
            match = next(n for n in ranks if n == name or n.endswith(f".{name}") or name.endswith(f".{n}"))
            assert all(torch.equal(getattr(layer, f), stored[f"{match}.{f}"]) for f in ("U", "S", "Vh")), (auto, name)


def test_our_loader_does_not_run_the_folder_s_code(emulator: Path, tmp_path: Path) -> None:
    folder = tmp_path / "emulator"
    shutil.copytree(emulator, folder)
    (folder / f"{FILE}.py").write_text("raise SystemExit('the code ran')\n")
    assert torch.equal(logits(load_emulator(folder).eval()), logits(load_emulator(emulator).eval()))
    auto = next(iter(config_of(folder)["auto_map"]))
    with pytest.raises(SystemExit, match="the code ran"):  # control
        getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("shards", ["one", "many"])
def test_a_load_without_our_class_fails_because_of_the_guard(
    shards: str, emulator: Path, sharded: Path, tmp_path: Path
) -> None:
    folder = sharded if shards == "many" else emulator
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatch"):
        stock_class(folder).from_pretrained(folder)

    # Control: without the guard the stock class loads, and its factored layers hold random numbers.
    unguarded = tmp_path / "unguarded"
    shutil.copytree(folder, unguarded)
    guards = []
    for path in unguarded.glob("*.safetensors"):
        tensors = load_file(path)
        guards += [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.shape == (1,)]
        save_file({n: t for n, t in tensors.items() if n not in guards}, path, metadata={"format": "pt"})
    (guard,) = guards
    index = unguarded / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        del content["weight_map"][guard]
        index.write_text(json.dumps(content))
    torch.manual_seed(0)
    one = logits(stock_class(folder).from_pretrained(unguarded).eval())
    torch.manual_seed(1)
    other = logits(stock_class(folder).from_pretrained(unguarded).eval())
    assert not torch.allclose(one, other)


def test_the_modeling_file_is_self_contained(emulator: Path) -> None:
    text = (emulator / f"{FILE}.py").read_text()
    tree = ast.parse(text)
    compile(tree, FILE, "exec")
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    roots = {name.split(".")[0] for name in imported}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert "emloc_tools" not in text.replace("emloc-tools", "")
    assert not [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in ("exec", "eval")
    ]
    docstring = ast.get_docstring(tree) or ""
    assert config_of(emulator)["architectures"][0].removeprefix("Emloc") in docstring
    assert len([node for node in tree.body if isinstance(node, ast.Expr)]) == 1  # one docstring, that of the emulator
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for reference in config_of(emulator)["auto_map"].values():
        assert reference.removeprefix(f"{FILE}.") in defined


def test_no_stock_class_bears_the_name_of_an_emulator(emulator: Path) -> None:
    """Trainers look for `architectures[0]` among the classes of transformers first."""
    (name,) = config_of(emulator)["architectures"]
    assert name == emulator_name(stock_class(emulator).__name__)
    assert not hasattr(transformers, name)


def auto_map_of(cls: type[Any], config: Any) -> dict[str, str]:
    """The classes in the `auto_map` for a model class, if its first block's layers are factored."""
    model = cls(config)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".0." in name]
    text, auto_map = modeling_source(config, cls.__name__, layers, list(model.state_dict()))
    compile(text, FILE, "exec")
    return {auto: reference.removeprefix(f"{FILE}.") for auto, reference in auto_map.items()}


def test_the_auto_map_names_what_transformers_would_choose() -> None:
    auto_map = auto_map_of(transformers.LlamaForCausalLM, pico.config("llama"))
    assert auto_map["AutoModelForCausalLM"] == "EmlocLlamaForCausalLM"
    assert auto_map["AutoModel"] == "EmlocLlamaModel"
    assert auto_map["AutoModelForSequenceClassification"] == "EmlocLlamaForSequenceClassification"
    assert "AutoModelForImageClassification" not in auto_map
    # Its class calls the body `transformer` and not `model`, so it would find none of the tensors.
    assert transformers.LlamaForQuestionAnswering.base_model_prefix != transformers.LlamaForCausalLM.base_model_prefix
    assert "AutoModelForQuestionAnswering" not in auto_map
    assert (
        auto_map_of(transformers.BertForMaskedLM, pico.config("bert"))["AutoModelForMaskedLM"] == "EmlocBertForMaskedLM"
    )


def test_a_class_with_its_own_loader_is_left_out() -> None:
    """It wants more files than a checkpoint has."""
    assert transformers.AutoModelForDecision._model_mapping[transformers.Qwen2Config] is transformers.JevForDecision
    assert "AutoModelForDecision" not in auto_map_of(transformers.Qwen2ForCausalLM, pico.config("qwen2"))


def test_a_class_that_is_a_part_of_the_model_loads_its_part(tmp_path: Path) -> None:
    """BART's decoder by itself, from an emulator of encoder and decoder."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(**sizes, vocab_size=64, encoder_attention_heads=4, decoder_attention_heads=4)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    build_emulator(base=str(tmp_path / "base"), ratio=0.5, output=tmp_path / "emulator")
    whole, part = (
        getattr(transformers, auto).from_pretrained(tmp_path / "emulator", trust_remote_code=True)
        for auto in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
    )
    factored = {name for name, module in part.named_modules() if isinstance(getattr(module, "U", None), nn.Parameter)}
    assert len(factored) == 20
    assert all(name.startswith("model.decoder.") for name in factored)
    for name in factored:
        assert torch.equal(part.get_submodule(name).Vh, whole.get_submodule(name).Vh), name


def test_architectures_outside_transformers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="OwnModel is not part of transformers"):
        modeling_source(pico.config("llama"), "OwnModel", [], [])
    with pytest.raises(UnsupportedError, match="does not know OwnModel"):
        emulator_class("OwnModel")


def test_a_folder_that_is_no_emulator_is_refused(tmp_path: Path) -> None:
    pico.save_model(tmp_path)
    with pytest.raises(FormatError, match=r"emulator\.json"):
        load_emulator(tmp_path)


def test_options_reach_from_pretrained(emulator: Path) -> None:
    model = load_emulator(emulator, dtype=torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, LowRankLayer)]
    assert layers
    assert {layer.U.dtype for layer in layers} == {torch.bfloat16}


def test_buffers_that_a_parent_fills_are_those_of_the_base(tmp_path: Path) -> None:
    """For code that is not its own, transformers 5 leaves Falcon-H1's multipliers as they lie in memory."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64}
    config = transformers.FalconH1Config(
        vocab_size=64, num_hidden_layers=1, head_dim=8, **sizes, **mamba, ssm_multipliers=[0.5, 0.7, 0.9, 1.1, 1.3]
    )
    transformers.FalconH1ForCausalLM(config).save_pretrained(tmp_path / "base")
    build_emulator(base=str(tmp_path / "base"), ratio=0.5, output=tmp_path / "emulator")
    base = transformers.FalconH1ForCausalLM.from_pretrained(tmp_path / "base")
    expected = base.model.layers[0].mamba.mup_vector
    assert len(expected.unique()) == 5
    by_code = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "emulator", trust_remote_code=True)
    for emulator in (by_code, load_emulator(tmp_path / "emulator")):
        assert torch.equal(emulator.model.layers[0].mamba.mup_vector, expected)
        assert emulator.is_custom_code()  # as ever after loading, so that no keys are converted


@pytest.mark.parametrize("by", ["the folder's own code", "load_emulator"])
def test_a_tensor_that_the_files_lack_is_an_error_and_not_random(by: str, emulator: Path, tmp_path: Path) -> None:
    """So it is where another version of transformers calls a part of the model otherwise."""
    config = config_of(emulator)
    own = next(auto for auto, cls in config["auto_map"].items() if cls.endswith(f".{config['architectures'][0]}"))

    def load(folder: Path) -> Any:
        if by == "load_emulator":
            return load_emulator(folder)
        return getattr(transformers, own).from_pretrained(folder, trust_remote_code=True)

    damaged = tmp_path / "damaged"
    shutil.copytree(emulator, damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("norm.weight", "ln_1.weight", "LayerNorm.weight")))
    tensors[f"elsewhere.{name}"] = tensors.pop(name)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, FormatError), match=re.escape(name)):
        load(damaged)
    load(emulator)  # the controls: the whole one loads, and a class of transformers makes up what is missing
    cls = stock_class(damaged)
    _, report = cls.from_pretrained(damaged, output_loading_info=True, ignore_mismatched_sizes=True)
    assert name in report["missing_keys"]
