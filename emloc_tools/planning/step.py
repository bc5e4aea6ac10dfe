"""The peak memory of one training step of a LoRA, and of one forward pass, without allocating either."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.models.source import first_line
from emloc_tools.planning.ledger import Ledger, Memory

ALL_LINEAR = "all-linear"

# As trainers run them on a GPU: fused, which takes no temporary copies of all parameters at once.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, foreach=False),
}


@dataclass(frozen=True)
class Training:
    """How a LoRA is trained: what its step's memory depends on, beside the model and its inputs.

    `lora_targets` are names of modules as PEFT takes them (a module is meant by the end of its name), or
    `all-linear`. `lora_dtype` is that of A and B; PEFT's default is float32.
    """

    lora_rank: int = 16
    lora_targets: Sequence[str] | str = ALL_LINEAR
    lora_dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = True
    optimizer: str = "adamw"


def training_memory(model: nn.Module, inputs: Mapping[str, Any], training: Training) -> Memory:
    """The peak of a training step in steady state, of a model on meta with its weights as they would be on a device.

    The step is a forward pass with loss, a backward pass, and the update; the optimizer's state is there from the step
    before. `model` is changed: it gets a LoRA, and is of no further use. Raises `InputError` for LoRA targets that are
    not in the model, and where it has no gradient checkpointing; `UnsupportedError` where it cannot run so.
    """
    ledger = Ledger(vocabulary_of(model))
    _add_lora(model, training)
    model.train()
    if training.gradient_checkpointing:
        _checkpoint(model)
    ledger.fake_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[training.optimizer](trained)

    def count(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # it was just accumulated
        ledger.hold([parameter.grad], "training_state")

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
    with _quiet(), _blaming(model, inputs), ledger:
        inputs = _copied(inputs)
        with ledger.counting_as("training_state"):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        ledger.start()
        loss_of(model, inputs).backward()  # type: ignore[no-untyped-call]
        with ledger.counting_as("training_state"):
            optimizer.step()
            optimizer.zero_grad()
    return ledger.peak


def inference_memory(model: nn.Module, inputs: Mapping[str, Any]) -> Memory:
    """The peak of one forward pass without gradients, of a model on meta; of a language model with its cache."""
    ledger = Ledger(vocabulary_of(model))
    ledger.fake_parameters(model.eval())
    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": True, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in accepted}
    with _quiet(), _blaming(model, inputs), torch.no_grad(), ledger:
        given = _copied(inputs)
        labels = given.pop("labels", None)
        if labels is not None and "decoder_input_ids" in accepted:  # they stood for what the decoder reads
            given.setdefault("decoder_input_ids", labels)
        ledger.start()
        model(**given, **options)
    return ledger.peak


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The model's own loss where the inputs have labels, else the mean square of its first output in float32."""
    output = model(**inputs)
    if "labels" in inputs:
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if not isinstance(loss, torch.Tensor):
            raise UnsupportedError(f"{type(model).__name__} gives no loss for its labels")
        return loss
    first = output[0].float()
    return F.mse_loss(first, torch.zeros_like(first))


def vocabulary_of(model: Any) -> int | None:
    """How many logits the model's head gives for a token; None for a model without such a head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return getattr(head, "out_features", None)


def _add_lora(model: nn.Module, training: Training) -> None:
    """Let PEFT put a LoRA in `model`, frozen otherwise."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = training.lora_targets
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_rank,
        target_modules=targets if targets == ALL_LINEAR else list(targets),
    )
    model.requires_grad_(False)
    try:
        with _quiet():
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"--lora-targets: {first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters():
                if ".lora_" in f".{name}":
                    parameter.data = parameter.data.to(training.lora_dtype)


def _checkpoint(model: Any) -> None:
    """Let the model recompute its blocks in the backward pass, as the libraries do it by default."""
    name = type(model).__name__
    kwargs = {"use_reentrant": False}
    try:
        with _quiet():
            if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers
                model.enable_gradient_checkpointing()
            elif hasattr(model, "activation_checkpointing_enable"):
                model.activation_checkpointing_enable(kwargs)
            else:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            if hasattr(model, "enable_input_require_grads"):  # PEFT does so with every model that checkpoints
                model.enable_input_require_grads()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(f"{name} has no gradient checkpointing; plan with --no-gradient-checkpointing") from error


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs as tensors of this step, which count."""
    copied: dict[str, Any] = tree_map(lambda tensor: tensor.clone(), dict(inputs))
    return copied


@contextlib.contextmanager
def _blaming(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a model says of inputs that it cannot take into an error that names them."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        shapes = ", ".join(f"{name} {list(getattr(value, 'shape', value))}" for name, value in inputs.items())
        raise UnsupportedError(
            f"{type(model).__name__} cannot be run in thought on {shapes}: {first_line(error)}; --data may give it "
            "other inputs"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings, which speak of a training that is not going to happen."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback beside the error that it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
