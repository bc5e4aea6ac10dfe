"""Run every trainer on an emulator and record the runs, from which the pages on trainers are made.

    python -m tests.external.trainers_table [--only-given] [NAME=FOLDER ...] [dreambooth=SCRIPT]

TRL, transformers and accelerate run in `.venv-trainer-trl`, unless `--only-given`. Of the others, those run that
`tests.external.environments --released` made a virtual environment for, or whose environment is given, such as
`axolotl=../axolotl-env`. `dreambooth=../train_dreambooth_lora_flux.py` is a script of diffusers, and runs in the
environment of `diffusers`. The records of the rest stay as they are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import transformers
from safetensors.torch import load_file

from docs.trainer_pages import RECORD, write_pages
from tests.external.environments import RELEASED, Released
from tests.external.trainers import (
    LOSS,
    OTHER_WAYS,
    SLOW_WAYS,
    WAYS,
    Outcome,
    Way,
    emloc_tools,
    train_all,
)
from tests.external.workshop import Case, make_case

PROGRESS = re.compile(r"\d+%\||\d(it/s|s/it)|^\s*$|FutureWarning|UserWarning|warnings\.warn")
ALL_WAYS = {**WAYS, **SLOW_WAYS, **OTHER_WAYS}


def main(arguments: list[str]) -> None:
    """Run and record."""
    only_given = "--only-given" in arguments
    pairs = (argument.split("=", 1) for argument in arguments if argument != "--only-given")
    made = [] if only_given else [environment for environment in map(Released, RELEASED) if environment.is_current()]
    given = {environment.name: environment.folder for environment in made}
    given |= {name: Path(value).absolute() for name, value in pairs}
    others = {name: way for name, way in OTHER_WAYS.items() if way.trainer in given}
    ways = {} if only_given else {**WAYS, **SLOW_WAYS}
    ways |= {name: replace(way, programs=given[way.trainer] / "bin") for name, way in others.items()}
    records: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        case = make_case("llama", Path(folder, "llama"))
        trained = train_all(case, Path(folder, "trusting"), ways, trust=True)
        refusing = {name: way for name, way in ways.items() if way.can_refuse}
        refused = train_all(case, Path(folder, "untrusting"), refusing, trust=False)
        for name, way in ways.items():
            records[name] = record(way, case, Path(folder, "trusting", name), trained[name], refused.get(name))
        if "dreambooth" in given:
            from tests.external.dreambooth import dreambooth  # needs diffusers, which Python 3.10 does not have

            records["diffusers"] = dreambooth(Path(folder, "dreambooth"), given["dreambooth"], given["diffusers"])
    records = {name: records[name] for name in (*ALL_WAYS, "diffusers") if name in records}
    RECORD.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_pages()
    for name, found in records.items():
        print(name, found["losses"], found["keys"], found["corrected"], found["untrusted"])


def record(way: Way, case: Case, folder: Path, trained: Outcome, refused: Outcome | None) -> dict[str, Any]:
    """What a page says of one run; without losses if it failed, and then with the end of what it printed."""
    start = " ".join([*way.command, f"train{way.suffix}"])
    commands = [" ".join(["emloc-tools", *way.written_by]), start]
    found: dict[str, Any] = {
        "page": way.trainer,
        "four_bits": way.four_bits,
        "releases": versions(way, [way.trainer, "transformers", "peft", *(["bitsandbytes"] if way.four_bits else [])]),
        "started": " ".join(way.command),
        "files": shown(folder, way, case),
        "losses": [],
        "keys": None,
        "corrected": None,
        "untrusted": "always runs the code" if refused is None else refusal(way, refused),
    }
    if trained.status:
        return {**found, "commands": commands, "log": plain(trained.log, folder)[-3:]}
    adapter = str(trained.adapter.relative_to(folder))
    files = ["--emulator", "emulator", "--adapter", adapter, "--base", "base", "--output", "corrected"]
    commands.append(emloc_tools(["correct", *files], folder))
    return {
        **found,
        "commands": commands,
        "log": [line for line in plain(trained.log, folder) if LOSS.search(line)][-3:],
        "losses": [trained.losses[0], trained.losses[-1]],
        "keys": keys_are_those_of_the_base(case, trained.adapter),
        "corrected": loads(case, folder / "corrected"),
    }


def shown(folder: Path, way: Way, case: Case) -> dict[str, str]:
    """The written files; of a program its settings. Folders of this run bear the names that they have in commands."""
    texts = {}
    for path in (folder / f"train{way.suffix}", folder / "dataset_info.json"):
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace(str(case.base), "base").replace(str(folder), "/path/to")
            settings = re.search(r"^EMULATOR = .*?^NEXT = .*?$", text, flags=re.MULTILINE | re.DOTALL)
            texts[path.name] = settings[0] + "\n" if settings else text
    return texts


def plain(log: str, folder: Path) -> list[str]:
    """Lines of output without progress bars, colours and the folder of this run."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log).replace(str(folder), ".")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if not PROGRESS.search(line)]


def versions(way: Way, packages: list[str]) -> str:
    """The installed releases of the packages."""
    names = list(dict.fromkeys(packages))
    program = f"import importlib.metadata as m; print(*(m.version(n) for n in {names}))"
    shown = subprocess.run(
        [str(way.programs / "python"), "-I", "-c", program], capture_output=True, text=True, check=True
    )
    return ", ".join(f"{name} {version}" for name, version in zip(names, shown.stdout.split(), strict=True))


def keys_are_those_of_the_base(case: Case, adapter: Path) -> bool:
    """Whether the adapter's tensors have the names and shapes of a LoRA of the same settings on the base."""
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base)
    model = peft.get_peft_model(base, peft.LoraConfig.from_pretrained(adapter))
    expected: Mapping[str, object] = {n: t.shape for n, t in peft.get_peft_model_state_dict(model).items()}
    return expected == {n: t.shape for n, t in load_file(adapter / "adapter_model.safetensors").items()}


def loads(case: Case, corrected: Path) -> bool:
    """Whether the corrected adapter loads on the base with no key missing or left over."""
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base)
    status = peft.PeftModel.from_pretrained(base, corrected).load_adapter(corrected, "again")
    return not status.missing_keys and not status.unexpected_keys


def refusal(way: Way, refused: Outcome) -> str:
    """How a run without trust ended."""
    if not refused.status or refused.losses:
        return "**trains**"
    found = way.refusal.search(refused.log)
    if way.four_bits and found:
        return f"`{found[0]}`"
    return "shape error" if found else "another error"


if __name__ == "__main__":
    main(sys.argv[1:])
