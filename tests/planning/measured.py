"""The memory of real steps, by what torch's profiler sees of every allocation: an independent reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor, "sgd": torch.optim.SGD}


def peak_of_training(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    *,
    targets: list[str],
    rank: int = 4,
    checkpointing: bool = True,
    optimizer: str = "adamw",
) -> int:
    """Bytes at the peak of the second training step of a LoRA that PEFT puts on a real model."""
    peft = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    peft.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    steps = OPTIMIZERS[optimizer](trained, foreach=False)

    def step() -> None:
        peft(**inputs).loss.backward()
        steps.step()
        steps.zero_grad()

    step()
    state = [value for of_one in steps.state.values() for value in of_one.values() if isinstance(value, torch.Tensor)]
    return _bytes([*peft.parameters(), *peft.buffers(), *inputs.values(), *state]) + growth(step)


def peak_of_inference(model: Any, inputs: Mapping[str, torch.Tensor]) -> int:
    """Bytes at the peak of one forward pass with a cache, of which the last token's logits alone are wanted."""

    def forward() -> None:
        with torch.no_grad():
            model(**inputs, use_cache=True, logits_to_keep=1)

    return _bytes([*model.parameters(), *model.buffers(), *inputs.values()]) + growth(forward)


def growth(run: Callable[[], None]) -> int:
    """How many bytes more than at its start a call has allocated at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    with contextlib.suppress(KeyError):
        del storages[0]  # of tensors without any entry
    return sum(storages.values())
