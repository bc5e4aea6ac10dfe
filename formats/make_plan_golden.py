"""Write the golden files of the plan format and its schema: `python -m formats.make_plan_golden`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emloc_tools.files.plan import PlanV1

HERE = Path(__file__).parent / "plan"
GOLDEN = HERE / "golden"


def schema_text() -> str:
    """The JSON Schema of a plan, as the file holds it."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **PlanV1.model_json_schema(mode="serialization"),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _parts(weights: int, training_state: int) -> dict[str, int]:
    parts = {"weights": weights, "training_state": training_state, "activations": 900, "logits": 300}
    return {"total": sum(parts.values()), **parts}


def good() -> dict[str, Any]:
    """A plan with an emulator; its numbers are made up."""
    return {
        "format": "emloc-plan",
        "format_version": 1,
        "made_by": {"emloc_tools": "0.1.0", "libraries": {"torch": "2.13.0"}, "command": "emloc-tools plan"},
        "base": {"id": "org/name", "revision": None, "architecture": "LlamaForCausalLM"},
        "targets": None,
        "exclude": "layers\\.0\\.",
        "memory": 10000,
        "reserve": 500,
        "ratio": 0.325,
        "factored_layers": 21,
        "conditions": {
            "batch_size": 1,
            "sequence_length": 2048,
            "images": 0,
            "image_size": [448, 448],
            "resolution": [1024, 1024],
            "data": None,
            "dtype": "bfloat16",
            "lora_rank": 16,
            "lora_targets": ["q_proj", "v_proj"],
            "lora_dtype": "float32",
            "gradient_checkpointing": True,
            "optimizer": "adamw",
        },
        "emulator": {"parameters": 3000, "size": 6000, "training": _parts(6000, 2000)},
        "base_model": {"parameters": 8000, "size": 16000, "training": _parts(16000, 2000)},
        "inference": _parts(16000, 0),
        "stages": [{"stage": "build-emulator", "disk": 6000, "scratch": 0, "memory": 400000000}],
    }


def _changed(change: Callable[[dict[str, Any]], Any]) -> str:
    plan = copy.deepcopy(good())
    change(plan)
    return json.dumps(plan, indent=2)


def files() -> dict[str, str]:
    """The text of every golden file by its name; `bad-<rule>-…` breaks that rule and no other."""
    text = json.dumps(good(), indent=2)
    return {
        "ok-emulator.json": text,
        "ok-base-fits.json": _changed(lambda plan: plan.update(ratio=None, emulator=None, factored_layers=0)),
        "bad-P1-cut-off.json": text[:-20],
        "bad-P1-duplicate-key.json": text.replace('"reserve": 500', '"memory": 10000,\n  "reserve": 500'),
        "bad-P2-other-format.json": _changed(lambda plan: plan.update(format="emloc-emulator")),
        "bad-P2-later-version.json": _changed(lambda plan: plan.update(format_version=2)),
        "bad-P3-unknown-field.json": _changed(lambda plan: plan.update(ranks={})),
        "bad-P3-ratio-of-one.json": _changed(lambda plan: plan.update(ratio=1.0)),
        "bad-P3-negative-size.json": _changed(lambda plan: plan["stages"][0].update(disk=-1)),
        "bad-P3-no-conditions.json": _changed(lambda plan: plan.pop("conditions")),
        "bad-P4-ratio-without-emulator.json": _changed(lambda plan: plan.update(emulator=None)),
        "bad-P4-emulator-without-ratio.json": _changed(lambda plan: plan.update(ratio=None)),
        "bad-P4-wrong-sum.json": _changed(lambda plan: plan["inference"].update(total=1)),
    }


def main() -> None:
    """Renew what this repository holds."""
    GOLDEN.mkdir(exist_ok=True)
    (HERE / "schema.json").write_text(schema_text(), encoding="utf-8", newline="\n")
    for name, text in files().items():
        (GOLDEN / name).write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
