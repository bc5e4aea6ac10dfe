"""What anyone does with corrected adapters: load them on their base, merge. Runs without emloc-tools.

python -I use_corrected.py JOB.json     (written by tests/external/conftest.py)

Writes `<output>/corrected.json`, and each case's logits and merged weights to `<output>/<case>-merged.safetensors`.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file


def main() -> None:
    """Load and merge every case's corrected adapter."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    transformers.logging.set_verbosity_error()
    results = {case["name"]: recorded(case, Path(job["output"])) for case in job["cases"]}
    Path(job["output"], "corrected.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def recorded(case: dict[str, Any], output: Path) -> dict[str, Any]:
    """The results of one case, or its error."""
    try:
        ids = torch.tensor(case["input_ids"])
        model, complaints = load(case, case["corrected"])
        _, expected_complaints = load(case, case["incomplete"])
        # The adapter's own configuration leads to the base, and from there to the right class.
        alone = getattr(peft, case["auto_peft"]).from_pretrained(case["corrected"]).eval()
        logits = {"adapter": logits_of(model, ids), "alone": logits_of(alone, ids)}
        merged = model.merge_and_unload()
        logits["merged"] = logits_of(merged, ids)
        weights = {name: parameter.detach().clone() for name, parameter in merged.named_parameters()}
        tensors = {f"logits {name}": tensor for name, tensor in logits.items()} | weights
        save_file(tensors, output / f"{case['name']}-merged.safetensors")
        alone_class = type(alone.get_base_model()).__name__
        return {"complaints": complaints, "incomplete": expected_complaints, "class": alone_class}
    except Exception:
        return {"error": traceback.format_exc()}


def load(case: dict[str, Any], adapter: str) -> tuple[Any, dict[str, list[str]]]:
    """The base with an adapter, and what PEFT says about its keys: in warnings, and asked for them."""
    base = getattr(transformers, case["auto"]).from_pretrained(case["base"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter).eval()
    status = model.load_adapter(adapter, "again")
    return model, {
        "warnings": [message for message in (str(warning.message) for warning in caught) if "adapter keys" in message],
        "missing": list(status.missing_keys),
        "unexpected": list(status.unexpected_keys),
    }


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model computes."""
    with torch.no_grad():
        return model(input_ids=ids).logits


if __name__ == "__main__":
    main()
