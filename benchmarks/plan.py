"""How well `plan` foresees the memory of a training step, and what it says of the EMLoC paper's cases and others.

    python -m benchmarks.plan                      # on the CPU: ten minutes, and 3 GB
    python -m benchmarks.plan --device cuda        # accuracy on a GPU as well, by torch.cuda.max_memory_allocated

A real step runs the model's class with random weights, PEFT and torch's optimizer, and is written here without the
package's planning. On the CPU its peak is what torch's profiler sees of every allocation and release, those inside of
kernels included; on a GPU what the caching allocator says. The cases of the last table are configurations written from
published numbers; nothing is fetched, and no weight exists.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.plan_cases import ACCURACY, CASES, Accuracy, Case, save_config
from emloc_tools.files.plan import PlanV1
from emloc_tools.linalg.allocate import uniform_ranks
from emloc_tools.models.layers import select_layers
from emloc_tools.models.lowrank_modules import factor_layers
from emloc_tools.models.skeleton import build_skeleton, load_config, model_class
from emloc_tools.models.source import open_source
from emloc_tools.planning.inputs import make_inputs
from emloc_tools.planning.step import Training, training_memory
from emloc_tools.stages.plan import plan

GOAL = 0.05  # relative error of a prediction
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}


def accuracy(case: Accuracy, folder: Path, device: str) -> dict[str, Any]:
    """A prediction and a measurement of the same step."""
    save_config(folder, case.config, case.architecture)
    source = open_source(str(folder))
    config = load_config(source)
    cls = model_class(config, source)
    dtype = getattr(torch, case.dtype)

    def skeleton() -> nn.Module:
        model = build_skeleton(cls, config, dtype=dtype)
        layers = select_layers(model)
        return factor_layers(model, uniform_ranks(layers, case.ratio)) if case.ratio < 1 else model

    model = skeleton()
    names = [layer.name for layer in select_layers(build_skeleton(cls, config, dtype=dtype)) if layer.experts is None]
    inputs = make_inputs(model, config, source, case.shape)
    training = Training(case.rank, names, torch.float32, case.checkpointing, case.optimizer)
    predicted = training_memory(model, inputs, training)
    measured = real_peak(skeleton(), inputs, names, case, device)
    return {
        "case": case.name,
        "ratio": case.ratio,
        "dtype": case.dtype,
        "checkpointing": case.checkpointing,
        "optimizer": case.optimizer,
        "predicted": predicted.total,
        "measured": measured,
        "error": predicted.total / measured - 1,
    }


def real_peak(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], names: list[str], case: Accuracy, device: str
) -> int:
    """Bytes at the peak of the second step of a real training, of a model whose weights are random."""
    from peft import LoraConfig, inject_adapter_in_model

    values: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter not in values:  # tied ones stay one
                random = torch.randn(parameter.shape, dtype=parameter.dtype) * 0.02
                values[parameter] = nn.Parameter(random, requires_grad=False)
            if parameter is not None:
                module._parameters[key] = values[parameter]
    trained_model: Any = inject_adapter_in_model(LoraConfig(r=case.rank, target_modules=names), model)
    for name, parameter in trained_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    trained_model.train().to(device)
    if case.checkpointing:
        if hasattr(trained_model, "enable_gradient_checkpointing"):
            trained_model.enable_gradient_checkpointing()
        else:
            trained_model.activation_checkpointing_enable({"use_reentrant": False})
            trained_model.enable_input_require_grads()
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    trained = [parameter for parameter in trained_model.parameters() if parameter.requires_grad]
    optimizer: Any = OPTIMIZERS[case.optimizer](trained, foreach=False)

    def loss() -> torch.Tensor:
        # As in trainers, the logits do not outlive this function, but for what the backward pass needs.
        output = trained_model(**given)
        found: torch.Tensor = output.loss if "labels" in given else output[0].float().square().mean()
        return found

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    step()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    held = [*trained_model.parameters(), *trained_model.buffers(), *given.values(), *state]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values()) + _growth(step)


def _growth(run: Callable[[], None]) -> int:
    """How many bytes more than at its start a call has allocated at its peak."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    results: Any = profiled.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def foresee(case: Case, folder: Path) -> dict[str, Any]:
    """What `plan` says of a large model."""
    save_config(folder, case.config, case.architecture)
    started = time.process_time()
    found: PlanV1 = plan(
        base=str(folder),
        memory=case.memory,
        reserve=0,
        sequence_length=case.shape.length,
        images=case.shape.images,
        resolution=case.shape.resolution,
        batch_size=case.shape.batch_size,
        lora_rank=case.rank,
        dtype="bfloat16",
        progress=lambda step: print(f"{case.name}: {step.detail}", file=sys.stderr, flush=True),
    )
    return {
        "case": case.name,
        "step": case.step,
        "memory": case.memory,
        "paper": case.paper,
        "seconds": time.process_time() - started,
        "ratio": found.ratio,
        "parameters": found.base_model.parameters,
        "base": found.base_model.training.model_dump(),
        "inference": found.inference.model_dump(),
        "emulator": found.emulator.model_dump() if found.emulator else None,
    }


def main() -> None:
    """Run what is asked for, print the tables, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=["all", "accuracy", "cases"], default="all", help="others stay as recorded")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the accuracy on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    on_gpu = options.device != "cpu"
    name = "plan-cuda" if on_gpu else "plan"
    recorded = record.RESULTS / f"{name}.json"
    result = json.loads(recorded.read_text(encoding="utf-8")) if recorded.exists() else {}
    with tempfile.TemporaryDirectory(prefix="emloc-plan-") as folder:
        if options.part != "cases":
            rows = []
            for number, case in enumerate(ACCURACY):
                rows.append(accuracy(case, Path(folder) / f"accuracy-{number}", options.device))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            result["accuracy"] = {**record.circumstances("plan"), "goal": GOAL, "rows": rows}
        if options.part != "accuracy" and not on_gpu:
            foreseen = [foresee(case, Path(folder) / f"case-{number}") for number, case in enumerate(CASES)]
            result["cases"] = {**record.circumstances("plan"), "rows": foreseen}
    record.write(name, result, markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The results as a page. GB are 10^9 bytes, MB 10^6."""
    lines = ["# Foreseen memory"]
    if "accuracy" in result:
        lines += ["", *_table_of_accuracy(result["accuracy"])]
    if "cases" in result:
        lines += ["", record.sentence(result["cases"]), "", *_table_of_cases(result["cases"]["rows"])]
    return "\n".join(lines) + "\n"


def _table_of_accuracy(result: dict[str, Any]) -> list[str]:
    """What was foreseen and what was measured."""
    worst = max(abs(row["error"]) for row in result["rows"])
    verdict = "met" if worst <= result["goal"] else "not met"
    lines = [
        record.sentence(result),
        "",
        "| model | ratio | dtype | checkpointing | optimizer | foreseen, MB | measured, MB | error |",
        "|---|--:|---|---|---|--:|--:|--:|",
    ]
    for row in result["rows"]:
        figures = f"{row['predicted'] / 1e6:.1f} | {row['measured'] / 1e6:.1f} | {row['error']:+.2%}"
        checkpointing = "yes" if row["checkpointing"] else "no"
        lines.append(
            f"| {row['case']} | {row['ratio']:g} | {row['dtype']} | {checkpointing} | {row['optimizer']} | {figures} |"
        )
    return [*lines, "", f"- every prediction within {result['goal']:.0%} (largest error {worst:.2%}): {verdict}"]


def _table_of_cases(rows: list[dict[str, Any]]) -> list[str]:
    """What is foreseen of large models, in GB, with the parts of the emulator's peak."""
    lines = [
        "| model | step | base, inference | base, LoRA | paper | ratio | emulator, LoRA | paper | of it weights "
        "| LoRA and optimizer | activations | logits |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        of_paper = [f"{value:g}" for value in row["paper"]] if row["paper"] else ["", ""]
        cells = [row["case"], row["step"], _gb(row["inference"]["total"]), _gb(row["base"]["total"]), of_paper[0]]
        if row["emulator"] is None:
            cells += ["", "the base fits", of_paper[1], "", "", "", ""]
        else:
            parts = row["emulator"]["training"]
            cells += [f"{row['ratio']:g}", _gb(parts["total"]), of_paper[1]]
            cells += [_gb(parts[name]) for name in ("weights", "training_state", "activations", "logits")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f}"


if __name__ == "__main__":
    main()
