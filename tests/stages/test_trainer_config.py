"""trainer-config: what is written follows from the emulator and the data, and says what an emulator needs."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
import yaml

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.stages.build_emulator import build_emulator
from emloc_tools.stages.trainer_config import RUN, WRITERS, Trainer, trainer_config
from tests import pico
from tests.conftest import Run

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
YAML: tuple[Trainer, ...] = ("trl", "axolotl", "llamafactory", "ms-swift")
PROGRAMS: tuple[Trainer, ...] = ("transformers", "accelerate", "unsloth")
OWN_LOOPS: tuple[Trainer, ...] = ("transformers", "accelerate")  # and with them what encodes the data
# How each calls: the emulator, the LoRA's rank, its alpha, its targets, and steps.
NAMES = {
    "trl": ("model_name_or_path", "lora_r", "lora_alpha", "lora_target_modules"),
    "axolotl": ("base_model", "lora_r", "lora_alpha", "lora_target_modules"),
    "llamafactory": ("model_name_or_path", "lora_rank", "lora_alpha", "lora_target"),
    "ms-swift": ("model", "lora_rank", "lora_alpha", "target_modules"),
    "transformers": ("EMULATOR", "RANK", "ALPHA", "TARGETS"),
    "accelerate": ("EMULATOR", "RANK", "ALPHA", "TARGETS"),
    "unsloth": ("EMULATOR", "RANK", "ALPHA", "TARGETS"),
}
SAME = ("encode", "quantisation")  # functions that both programs have
RECORDS = {
    "text": {"text": "One two three four."},
    "messages": {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Three."}]},
    "prompt": {"prompt": "After two comes", "completion": " three."},
}


def read(trainer: Trainer, path: Path) -> dict[str, Any]:
    """The settings in a written file: the YAML's mapping, or the program's constants."""
    text = path.read_text(encoding="utf-8")
    if trainer in YAML:
        return yaml.safe_load(text)  # type: ignore[no-any-return]
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found


def write(run: Run, folder: Path, trainer: Trainer = "trl", **options: Any) -> dict[str, Any]:
    """Write a configuration and read it."""
    output = folder / "config"
    trainer_config(**{"trainer": trainer, "emulator": run.emulator, "data": run.data, "output": output, **options})
    return read(trainer, output)


@pytest.mark.parametrize("trainer", get_args(Trainer))
def test_rank_targets_and_scaling_come_from_the_emulator(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    manifest = json.loads((run.emulator / "emulator.json").read_text())
    smallest = min(layer["rank"] for layer in manifest["layers"].values())
    settings = write(run, tmp_path, trainer)
    emulator, rank, alpha, targets = (settings[name] for name in NAMES[trainer])
    assert emulator == str(run.emulator)
    assert rank <= smallest < 2 * rank  # the largest power of two that is not above it, which is below 16 here
    assert rank.bit_count() == 1
    assert alpha == 2 * rank
    assert (targets.split(",") if isinstance(targets, str) else targets) == ALL


@pytest.mark.parametrize("trainer", [name for name in get_args(Trainer) if name != "ms-swift"])
def test_trust_is_asked_for_where_it_can_be(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    """ms-swift runs the code of a model's folder in any case."""
    settings = write(run, tmp_path, trainer)
    assert settings["trust_remote_code" if trainer in YAML else "TRUST_REMOTE_CODE"] is True
    assert "use_dora" not in settings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_that_of_the_factors(run: Run, tmp_path: Path, dtype: str) -> None:
    build_emulator(base=str(run.base), ratio=0.5, dtype=dtype, output=tmp_path / "emulator")
    for trainer in get_args(Trainer):
        settings = write(run, tmp_path / trainer, trainer, emulator=tmp_path / "emulator")
        stated = settings.get("dtype", settings.get("torch_dtype", settings.get("DTYPE", dtype)))
        assert stated == dtype, trainer
        assert settings.get("bf16", dtype == "bfloat16") is (dtype == "bfloat16"), trainer


@pytest.mark.parametrize("trainer", YAML)
def test_numbers_are_numbers_to_every_yaml_reader(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    """YAML 1.1 takes 2e-05 for a text."""
    settings = write(run, tmp_path, trainer, learning_rate=2e-5)
    assert settings["learning_rate"] == 2e-5
    assert isinstance(yaml.safe_load("rate: 2e-05")["rate"], str), "the control"


@pytest.mark.parametrize("trainer", get_args(Trainer))
def test_steps_take_the_place_of_epochs(run: Run, tmp_path: Path, trainer: Trainer) -> None:
    epochs, steps = write(run, tmp_path / "e", trainer, epochs=3), write(run, tmp_path / "s", trainer, steps=7)
    if trainer in PROGRAMS:
        assert (epochs["EPOCHS"], epochs["STEPS"], steps["STEPS"]) == (3, None, 7)
        return
    assert epochs.get("num_train_epochs", epochs.get("num_epochs")) == 3
    assert "max_steps" not in epochs
    assert steps["max_steps"] == 7


@pytest.mark.parametrize("kind", RECORDS)
def test_the_kind_of_data_is_read_from_its_first_line(run: Run, tmp_path: Path, kind: str) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [RECORDS[kind]])
    factory = write(run, tmp_path / "f", "llamafactory", data=data)
    assert factory["stage"] == ("pt" if kind == "text" else "sft")
    info = json.loads((tmp_path / "f" / "dataset_info.json").read_text())[factory["dataset"]]
    assert factory["dataset_dir"] == str(tmp_path / "f")
    assert info["file_name"] == str(data)
    assert set(info["columns"].values()) == set(RECORDS[kind])
    (source,) = write(run, tmp_path / "a", "axolotl", data=data)["datasets"]
    assert source["path"] == str(data)
    assert all(key in json.dumps(source) for key in RECORDS[kind])


@pytest.mark.parametrize("trainer", OWN_LOOPS)
@pytest.mark.parametrize("kind", RECORDS)
def test_programs_encode_records_and_label_what_is_to_be_learnt(
    run: Run, tmp_path: Path, trainer: Trainer, kind: str
) -> None:
    write(run, tmp_path, trainer)
    program = runpy.run_path(str(tmp_path / "config"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    found = program["encode"](RECORDS[kind], tokenizer)
    prompt, whole = {
        "text": ("", "One two three four."),
        "messages": ("", "<s>user: Two?</s><s>assistant: Three.</s>"),
        "prompt": ("After two comes", "After two comes three."),
    }[kind]
    ids = tokenizer(whole).input_ids
    skipped = len(tokenizer(prompt).input_ids) if prompt else 0
    assert found["input_ids"] == ids
    assert found["labels"] == [-100] * skipped + ids[skipped:]
    assert (skipped > 0) is (kind == "prompt")


def test_both_programs_encode_and_quantise_alike(run: Run, tmp_path: Path) -> None:
    """Each is a file of its own, so they hold the same text twice."""
    texts = []
    for trainer in OWN_LOOPS:
        write(run, tmp_path / trainer, trainer)
        functions = ast.parse((tmp_path / trainer / "config").read_text()).body
        texts.append([ast.unparse(node) for node in functions if getattr(node, "name", "") in SAME])
    assert len(texts[0]) == len(SAME)
    assert texts[0] == texts[1]


def test_names_with_quotes_and_backslashes_survive(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / 'a "b" \\1 # c'
    folder.mkdir()
    data = pico.write_jsonl(folder / "it's.jsonl", [RECORDS["text"]])
    for trainer in PROGRAMS:
        assert write(run, tmp_path / trainer, trainer, data=data)["DATA"] == str(data)
    assert write(run, tmp_path / "trl", "trl", data=data)["datasets"][0]["data_files"] == str(data)


def test_the_next_command_corrects_what_is_trained(run: Run, tmp_path: Path) -> None:
    result = trainer_config(
        trainer="trl", emulator=run.emulator, data=run.data, output=tmp_path / "c.yaml", lora=tmp_path / "lora"
    )
    expected = f"emloc-tools correct --emulator {run.emulator} --adapter {tmp_path / 'lora'} --base {run.base}"
    assert result.settings.next_command.startswith(expected)
    assert expected in (tmp_path / "c.yaml").read_text()
    assert result.run == f"trl sft --config {tmp_path / 'c.yaml'}"


def test_existing_files_are_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("mine")
    for overwrite, expected in ((False, "mine"), (True, "emloc")):
        if not overwrite:
            with pytest.raises(InputError, match=r"dataset_info\.json already exists"):
                write(run, tmp_path, "llamafactory")
            assert not (tmp_path / "config").exists()
        else:
            write(run, tmp_path, "llamafactory", overwrite=True)
        assert expected in (tmp_path / "dataset_info.json").read_text()


def test_where_experts_alone_are_factored_the_lora_goes_on_the_other_layers(run: Run, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "qwen3-moe")
    build_emulator(base=str(tmp_path / "base"), ratio=0.5, targets="experts", output=tmp_path / "emulator")
    settings = write(run, tmp_path, emulator=tmp_path / "emulator")
    assert settings["lora_target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]  # no router, no expert


def test_models_of_other_kinds_are_refused(run: Run, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "base", "bert")
    build_emulator(base=str(tmp_path / "base"), ratio=0.5, targets="attention", output=tmp_path / "emulator")
    auto_map = json.loads((tmp_path / "emulator" / "config.json").read_text())["auto_map"]
    if "AutoModelForCausalLM" in auto_map:
        auto_map.pop("AutoModelForCausalLM")
        config = json.loads((tmp_path / "emulator" / "config.json").read_text())
        (tmp_path / "emulator" / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    with pytest.raises(UnsupportedError, match="BertForMaskedLM, no causal language model"):
        write(run, tmp_path, emulator=tmp_path / "emulator")


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"text": "a", "label": 1}, UnsupportedError, "labels or images"),
        ({"images": ["a.png"], "messages": []}, UnsupportedError, "labels or images"),
        ({"question": "a"}, InputError, r":1: found the keys \['question'\]"),
        (3, InputError, ":1: int found"),
    ],
)
def test_other_data_is_refused(run: Run, tmp_path: Path, record: Any, error: type[Exception], message: str) -> None:
    data = pico.write_jsonl(tmp_path / "data.jsonl", [record])
    with pytest.raises(error, match=message):
        write(run, tmp_path, data=data)
    assert not (tmp_path / "config").exists()


def test_every_trainer_has_a_writer_and_a_command() -> None:
    from emloc_tools.cli.trainer_config import TRAINERS

    assert set(WRITERS) == set(RUN) == set(get_args(Trainer)) == set(TRAINERS)
