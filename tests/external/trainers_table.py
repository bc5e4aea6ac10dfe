"""Run every trainer on an emulator and write the table of docs/trainers.md.

    python -m tests.external.trainers_table [NAME=FOLDER ...]

TRL, transformers and accelerate run in `.venv-trainer-trl`. Of the others, those run whose virtual environment is
given, such as `axolotl=../axolotl-env`; the rows of the rest stay as they were recorded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import peft
import transformers
from safetensors.torch import load_file

from emloc_tools.stages.correct import correct
from tests.external.environments import ROOT
from tests.external.trainers import OTHER_WAYS, REFUSED, SLOW_WAYS, WAYS, Outcome, Way, train_all
from tests.external.workshop import Case, make_case

PAGE = ROOT / "docs" / "trainers.md"
BEGIN, END = "<!-- trainers: begin -->", "<!-- trainers: end -->"
COLUMNS = (
    *("trainer", "releases", "started by", "loss first → last", "keys as on the base"),
    *("corrected, on the base", "without trust"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"
PACKAGES = {"ddp": "accelerate", "fsdp2": "accelerate"}
NAMES = {"ddp": "accelerate, DDP", "fsdp2": "accelerate, FSDP2", "llamafactory": "LLaMA-Factory", "trl": "TRL"}


def main(arguments: list[str]) -> None:
    """Run and write."""
    given = dict(argument.split("=", 1) for argument in arguments)
    ways = {**WAYS, **SLOW_WAYS}
    ways |= {name: replace(OTHER_WAYS[name], programs=Path(given[name]).absolute() / "bin") for name in given}
    with tempfile.TemporaryDirectory() as folder:
        case = make_case("llama", Path(folder, "llama"))
        trained = train_all(case, Path(folder, "trusting"), ways, trust=True)
        refusing = {name: way for name, way in ways.items() if way.can_refuse}
        refused = train_all(case, Path(folder, "untrusting"), refusing, trust=False)
        rows = {row_name(name): row(name, ways[name], case, trained[name], refused.get(name)) for name in ways}
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    recorded, _, after = rest.partition(END)
    for line in recorded.splitlines():
        if line.startswith("| ") and not line.startswith("| trainer "):
            rows.setdefault(line.split("|")[1].strip(), line + "\n")
    order = [row_name(name) for name in (*WAYS, *SLOW_WAYS, *OTHER_WAYS)]
    table = HEADER + "".join(rows[name] for name in order if name in rows)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")
    print(table)


def row_name(name: str) -> str:
    """What the table calls a way to train."""
    return NAMES.get(name, name)


def row(name: str, way: Way, case: Case, trained: Outcome, refused: Outcome | None) -> str:
    """One line of the table."""
    releases = versions(way, [PACKAGES.get(name, name), "transformers", "peft"])
    cells = [row_name(name), releases, f"`{' '.join(way.command)}`"]
    if trained.status:
        return f"| {' | '.join([*cells, 'failed: ' + trained.log.strip().splitlines()[-1], '', '', ''])} |\n"
    cells.append(f"{trained.losses[0]:.2f} → {trained.losses[-1]:.2f}")
    cells.append("yes" if keys_are_those_of_the_base(case, trained.adapter) else "**no**")
    cells.append("loads" if loads_corrected(case, trained.adapter) else "**does not load**")
    cells.append("always runs the code" if refused is None else refusal(refused))
    return f"| {' | '.join(cells)} |\n"


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


def loads_corrected(case: Case, adapter: Path) -> bool:
    """Whether the corrected adapter loads on the base with no key missing or left over."""
    corrected = adapter.parent / f"{adapter.name}-corrected"
    correct(emulator=case.emulator, adapter=adapter, base=str(case.base), output=corrected)
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base)
    status = peft.PeftModel.from_pretrained(base, corrected).load_adapter(corrected, "again")
    return not status.missing_keys and not status.unexpected_keys


def refusal(refused: Outcome) -> str:
    """How a run without trust ended."""
    if not refused.status or refused.losses:
        return "**trains**"
    return "shape error" if REFUSED.search(refused.log) else "another error"


if __name__ == "__main__":
    main(sys.argv[1:])
