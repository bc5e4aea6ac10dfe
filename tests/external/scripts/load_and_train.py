"""What a training machine does with emulator folders. Runs where transformers and PEFT are, and nothing of emloc-tools.

python -I load_and_train.py JOB.json     (written by tests/external/conftest.py)

Writes `<output>/results.json`, and what each model computes to `<output>/<case>.safetensors`. It only records; the
tests judge. What goes wrong in one case is recorded as its error.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

LORA = {"r": 4, "lora_alpha": 6}


def main() -> None:
    """Take every case of the job through loading, adapting and training."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    transformers.logging.set_verbosity_error()
    results = {case["name"]: recorded(case, Path(job["output"]), job["train_script"]) for case in job["cases"]}
    environment = {
        "importable": [name for name in job["foreign"] if importlib.util.find_spec(name)],
        "imported": sorted(set(job["foreign"]) & set(sys.modules)),
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")},
    }
    path = Path(job["output"], "results.json")
    path.write_text(json.dumps({"environment": environment, "cases": results}, indent=2), encoding="utf-8")


def recorded(case: dict[str, Any], output: Path, train_script: str) -> dict[str, Any]:
    """The results of one case, or its error."""
    try:
        ids = torch.tensor(case["input_ids"])
        auto = getattr(transformers, case["auto"])
        stock = getattr(transformers, case["stock"])
        result: dict[str, Any] = {"loading": {}, "refusals": {}, "adapters": {}}
        logits = {}
        for kind in ("emulator", "sharded"):
            model, info = load(auto, case[kind], trust_remote_code=True)
            result["loading"][kind] = {"class": type(model).__name__, **info}
            with torch.no_grad():
                logits[kind] = model(input_ids=ids).logits
            result["refusals"][kind] = {"auto": refusal(auto, case[kind]), "stock": refusal(stock, case[kind])}
        result["refusals"]["unguarded"] = refusal(stock, case["unguarded"])
        for dtype in ("float32", "bfloat16"):
            for targets in (case["targets"], "all-linear"):
                name = f"{dtype} {'all-linear' if targets == 'all-linear' else 'list'}"
                result["adapters"][name] = {
                    kind: adapter_tensors(auto, case[kind], dtype, targets) for kind in ("base", "emulator")
                }
        adapter = str(output / case["name"] / "adapter")
        if case["auto"] == "AutoModelForCausalLM":
            result["losses"] = train_causal(train_script, case["emulator"], case["data"], adapter)
        else:
            result["losses"] = train_masked(auto, case["emulator"], case["data"], adapter)
        save_file(logits, output / f"{case['name']}.safetensors")
    except Exception:
        return {"error": traceback.format_exc()}
    return result


def load(auto: Any, folder: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
    """A model in evaluation mode, and what transformers tells about its keys."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model.eval(), {key: sorted(map(str, info.get(key) or ())) for key in keys}


def refusal(cls: Any, folder: str) -> str | None:
    """The error of a load that does not trust the folder's code; None if it loads."""
    try:
        cls.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def adapter_tensors(auto: Any, folder: str, dtype: str, targets: str | list[str]) -> dict[str, list[Any]]:
    """Shape and dtype of every tensor of a new LoRA on a model."""
    model = auto.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=True)
    peft = get_peft_model(model, LoraConfig(**LORA, target_modules=targets))
    return {key: [list(t.shape), str(t.dtype)] for key, t in sorted(get_peft_model_state_dict(peft).items())}


def train_causal(script: str, model: str, data: str, adapter: str) -> list[float]:
    """Run the plain Trainer script as `python train_lora.py` would; its first and last loss over all samples."""
    samples = len(Path(data).read_text(encoding="utf-8").splitlines())
    options = {"model": model, "data": data, "output": adapter, "steps": 30, "batch-size": samples, "max-length": 32}
    options |= {"rank": LORA["r"], "alpha": LORA["lora_alpha"]}
    sys.argv = [script, "--trust-remote-code", *(f"--{name}={value}" for name, value in options.items())]
    runpy.run_path(script, run_name="__main__")
    figures = json.loads(Path(adapter, "training.json").read_text(encoding="utf-8"))
    return [figures["first_loss"], figures["last_loss"]]


def train_masked(auto: Any, folder: str, data: str, adapter: str) -> list[float]:
    """Fill in every third token. Without a task type, so the adapter names the emulator's class; all losses."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in Path(data).read_text(encoding="utf-8").splitlines()]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    masked = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 3 == 0)
    labels = batch["input_ids"].where(masked, -100)
    inputs = {"input_ids": batch["input_ids"].masked_fill(masked, tokenizer.unk_token_id)}
    torch.manual_seed(0)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    peft = get_peft_model(model, LoraConfig(**LORA, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=6e-3)
    losses = []
    for _ in range(30):
        loss = peft(**inputs, attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peft.save_pretrained(adapter)
    return losses


if __name__ == "__main__":
    main()
