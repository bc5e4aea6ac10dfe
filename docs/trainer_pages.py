"""The pages on trainers, from the recorded runs in `docs/trainers/runs.json`.

`python -m tests.external.trainers_table` runs the trainers and records them. Everything on a page that could go stale,
commands, releases, files, output and results, is from there; the rest is below.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RECORD = DOCS / "trainers" / "runs.json"
TABLE = DOCS / "trainers.md"
TITLES = {
    "transformers": "transformers",
    "trl": "TRL",
    "accelerate": "accelerate",
    "axolotl": "axolotl",
    "llamafactory": "LLaMA-Factory",
    "unsloth": "Unsloth",
    "ms-swift": "ms-swift",
    "diffusers": "DreamBooth scripts of diffusers",
}
RUNS = {"ddp": "accelerate, DDP", "fsdp2": "accelerate, FSDP2", "diffusers": "diffusers, DreamBooth"}
COLUMNS = (
    *("trainer", "releases", "started by", "loss first → last", "keys as on the base"),
    *("corrected, on the base", "without trust"),
)
NOTES = {
    "transformers": "A program on the Trainer of transformers. Its settings stand at its beginning; what follows them "
    "is about a hundred lines to read and to change.",
    "trl": "`trl sft` reads a YAML file. TRL takes float32 unless it is told a dtype, which the file does.",
    "accelerate": "A program with a plain training loop, for one process or several. DDP puts a copy of the emulator "
    "on every device, FSDP2 a shard; in 4 bits it ran with DDP alone.",
    "axolotl": "axolotl's fused LoRA kernels read dense weights, which an emulator does not have: the file keeps them "
    "off.",
    "llamafactory": "LLaMA-Factory finds data by a `dataset_info.json`, which is written beside the configuration.",
    "unsloth": "Without a GPU, Unsloth trains as any other program does. On a GPU its kernels read dense weights of "
    "Llama and others, which an emulator computes anew whenever they do: it then saves memory but no time. "
    "`emloc-tools export --emulator emulator --to dense --output dense` makes a folder that they take as it is, in "
    "place of `emulator`, at the memory of the base. None of this was run on a GPU.",
    "ms-swift": "ms-swift runs the code in a model's folder in any case, and so never without it. It writes the LoRA "
    "to a folder `checkpoint-<step>`.",
    "diffusers": "`train_dreambooth_lora_flux.py` is in the folder `examples/dreambooth` of the repository of "
    "diffusers, and not in its package. It runs unchanged. It takes one folder with the whole pipeline: `light` is the "
    "pipeline with the emulator in the transformer's place. Before the script loads it, diffusers has to be told how: "
    "by `train.py`, which imports the file that every emulator has, or, where emloc-tools is installed, by "
    "`import emloc_tools` in place of the lines about `modeling_emloc`.",
}
USE = {
    "diffusers": """from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("pipeline")
pipeline.load_lora_weights("corrected")
pipeline.fuse_lora()
""",
}
USE_LANGUAGE_MODEL = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "corrected")
"""


def pages() -> dict[Path, str]:
    """The text of every page on trainers."""
    recorded: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
    order = list(TITLES)
    records = dict(sorted(recorded.items(), key=lambda item: order.index(item[1]["page"])))
    found = {TABLE: _with_table(records)}
    for page in TITLES:
        runs = {name: record for name, record in records.items() if record["page"] == page}
        if runs:
            found[DOCS / "trainers" / f"{page}.md"] = _page(page, runs)
    return found


def write_pages() -> None:
    """Write them all."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def _with_table(records: dict[str, dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, run in records.items():
        title = f"[{_title(name)}](trainers/{run['page']}.md)"
        cells = [title, run["releases"], f"`{run['started']}`", _losses(run), *_outcome(run), run["untrusted"]]
        lines.append(f"| {' | '.join(cells)} |")
    table = "<!-- trainers: begin -->\n\n" + "\n".join(lines) + "\n\n<!-- trainers: end -->"
    marked = r"<!-- trainers: begin -->.*?<!-- trainers: end -->"
    return re.sub(marked, lambda _: table, TABLE.read_text(encoding="utf-8"), flags=re.DOTALL)


def _page(page: str, runs: dict[str, dict[str, Any]]) -> str:
    language = page != "diffusers"
    given = "a folder `emulator` from `build-emulator`, its base in `base` and data in `train.jsonl`"
    if not language:
        given = "a pipeline in `pipeline`, its transformer's emulator in `emulator` and some pictures in `pictures`"
    parts = [f"# {TITLES[page]}\n", _wrapped(NOTES[page])]
    parts.append(
        _wrapped(
            f"You have {given}. What follows was run like this on a small random model without a GPU. The trainer's "
            "environment has nothing of emloc-tools, whose commands are for where it is installed. Choose steps, batch "
            "size and learning rate for your own data."
        )
    )
    parts += [_run(name, run) for name, run in runs.items()]
    parts.append(f"## Use it\n\n```python\n{USE.get(page, USE_LANGUAGE_MODEL)}```\n")
    parts.append("[All trainers](../trainers.md)\n")
    return "\n".join(parts)


def _run(name: str, run: dict[str, Any]) -> str:
    text = f"## {_title(name)}\n\n{run['releases']}\n\n```bash\n" + "\n".join(run["commands"]) + "\n```\n"
    for file, content in run["files"].items():
        kind = {"yaml": "yaml", "json": "json"}.get(file.rpartition(".")[2], "python")
        text += f"\n`{file}`{' begins with' if content.startswith('EMULATOR') else ''}:\n\n```{kind}\n{content}```\n"
    if run["log"]:
        text += "\nIts last lines:\n\n```text\n" + "\n".join(run["log"]) + "\n```\n"
    keys, corrected = _outcome(run)
    return f"{text}\n" + _wrapped(
        f"Loss {_losses(run)}; tensors named and shaped as those of a LoRA on the base: {keys}; corrected, on the "
        f"base: {corrected}; without trust in the emulator's code: {run['untrusted']}."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False) + "\n"


def _title(name: str) -> str:
    first, comma, rest = name.partition(", 4 bits")
    return RUNS.get(first, TITLES.get(first, first)) + comma + rest


def _losses(run: dict[str, Any]) -> str:
    return f"{run['losses'][0]:.2f} → {run['losses'][1]:.2f}" if run["losses"] else "failed"


def _outcome(run: dict[str, Any]) -> tuple[str, str]:
    """What the LoRA is, and what becomes of it."""
    if not run["losses"]:
        return "", ""
    works = "loads and fuses" if run["page"] == "diffusers" else "loads"
    return "yes" if run["keys"] else "**no**", works if run["corrected"] else "**does not load**"
