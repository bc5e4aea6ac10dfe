"""What a new head of a model reads, kept once, and the model's own forward run on that alone.

The headed model runs once, streamed, with a random head, and what its *body* gives is kept: the outputs of the largest
modules of which the checkpoint lacks nothing. From then on the model's own forward runs with these outputs in the place
of those modules. So a head may be anything: a layer, several, code between them, a pooler inside of the body.

Heads read one token of each sample: decoders compute a score of every token and take that of the last one, encoders
take the first token or what is pooled from it. Which one it is, is told by the gradient of the logits. Only that row is
kept, as a sample of one token, after it is checked that the logits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from emloc_tools.data.batches import Batch
from emloc_tools.errors import UnsupportedError
from emloc_tools.models.heads import HeadedBase
from emloc_tools.streaming.forwards import OtherForward, without_hooks

# Of logits, relative: the body ran in the model's dtype and is replayed in that of the fit.
AGREEMENT = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ONE_ROW = 1e-4  # the same of one row instead of all, both in the dtype of the fit


class Features:
    """What the body of a model gave for samples of one token each, in order: `ids (samples, 1)` and its outputs."""

    def __init__(self, ids: torch.Tensor, outputs: list[list[Any]]) -> None:
        self.ids, self.outputs = ids, outputs

    def select(self, samples: torch.Tensor) -> Features:
        """Those of some samples, by their numbers."""
        index = samples.to(self.ids.device)
        return Features(self.ids[index], tree_map(lambda leaf: leaf[index] if _is_float(leaf) else leaf, self.outputs))

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """Those of all parts, one after the other."""
        flat = [tree_flatten(part.outputs) for part in parts]
        leaves = [
            torch.cat(column) if _is_float(column[0]) else column[0]
            for column in zip(*(leaves for leaves, _ in flat), strict=True)
        ]
        return Features(torch.cat([part.ids for part in parts]), tree_unflatten(leaves, flat[0][1]))


class Head:
    """The head of a headed base, to be run on what the body gave, in `dtype`; `stored` is the model's own."""

    def __init__(self, headed: HeadedBase, dtype: torch.dtype) -> None:
        self.model, self.dtype = headed.model, dtype
        self._name = headed.architecture
        self.stored = headed.model.get_parameter(headed.head[0]).dtype
        self._parts = list(_complete_parts(headed.model, frozenset(headed.head)))
        self._names = headed.head

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The head's tensors by name."""
        return {name: self.model.get_parameter(name) for name in self._names}

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give the head's tensors other values."""
        for name, parameter in self.parameters.items():
            parameter.data = values[name].detach().to(parameter.dtype).clone()

    def to(self, dtype: torch.dtype) -> None:
        """Put the head's tensors into a dtype."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None

    def round(self) -> dict[str, torch.Tensor]:
        """The head's tensors in the model's own dtype, which they are rounded to in `model`, too."""
        stored = {name: parameter.detach().to(self.stored) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = stored[name].to(self.dtype)
        return stored

    def watch(self, current: Callable[[], int]) -> Watch:
        """Keep what the body gives from now on; `current()` is the number of the running batch."""
        return Watch(self._parts, current)

    def logits(self, features: Features) -> torch.Tensor:
        """The logits `(samples, labels)` of features; differentiable in the head's tensors."""
        with without_hooks(self.model, keep=()):
            return self._replay({"input_ids": features.ids}, features.outputs)

    def cut(self, batch: Batch, outputs: list[list[Any]], logits: torch.Tensor) -> Features:
        """The features of a batch whose body gave `outputs` and whose `logits (batch, labels)` are those of the run.

        Raises `UnsupportedError` if the head reads more than one token of a sample, or is not all that computes logits.
        """
        ids = batch.inputs["input_ids"].to(logits.device)
        leaves, spec = tree_flatten(tree_map(self._as_leaf, outputs))
        inputs = {name: tensor.to(logits.device) for name, tensor in batch.inputs.items() if name != "labels"}
        with without_hooks(self.model, keep=()), torch.enable_grad():
            whole = self._replay(inputs, tree_unflatten(leaves, spec))
            self._require(whole, logits, AGREEMENT[self.stored])
            floats = [leaf for leaf in leaves if _is_float(leaf)]
            weights = torch.linspace(1, 2, whole.numel(), dtype=whole.dtype, device=whole.device).reshape(whole.shape)
            slopes = torch.autograd.grad((whole * weights).sum(), floats, allow_unused=True)
        read = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        for leaf, slope in zip(floats, slopes, strict=True):
            if slope is not None and _is_of_tokens(leaf, ids):
                read |= slope.flatten(2).ne(0).any(-1)
        if int(read.sum(1).max()) > 1:
            raise self._unlike()
        samples, rows = torch.arange(len(ids), device=ids.device), read.int().argmax(1)

        def row_of(leaf: Any) -> Any:
            if not _is_float(leaf):
                return leaf
            if len(leaf) != len(ids):
                raise self._unlike()
            return leaf.detach()[samples, rows][:, None] if _is_of_tokens(leaf, ids) else leaf.detach()

        features = Features(ids[samples, rows][:, None], tree_unflatten([row_of(leaf) for leaf in leaves], spec))
        with torch.no_grad():
            self._require(self.logits(features), whole.detach(), ONE_ROW)
        return features

    def _as_leaf(self, leaf: Any) -> Any:
        return leaf.detach().to(self.dtype).requires_grad_() if _is_float(leaf) else leaf

    def _replay(self, inputs: Mapping[str, torch.Tensor], outputs: list[list[Any]]) -> torch.Tensor:
        """The model's own forward, in which every part of the body returns its next output."""
        stubs = []
        try:
            for part, given in zip(self._parts, outputs, strict=True):
                stubs.append(OtherForward(part, _giving(given)))
            return self.model(**inputs).logits  # type: ignore[no-any-return]
        except StopIteration:
            raise self._unlike() from None
        finally:
            for stub in reversed(stubs):
                stub.remove()

    def _require(self, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        difference = (found.detach().double() - expected.detach().double()).norm()
        if not difference <= tolerance * expected.detach().double().norm():
            raise self._unlike()

    def _unlike(self) -> UnsupportedError:
        return UnsupportedError(
            f"the head of {self._name} does more than read one token of each sample, so it cannot be fitted on stored "
            "features; train it on the base with any trainer, and pass the result as --base"
        )


class Watch:
    """Keeps what the parts of a body return, by batch, until it is fetched."""

    def __init__(self, parts: Sequence[nn.Module], current: Callable[[], int]) -> None:
        self._kept: dict[int, list[list[Any]]] = {}
        self._count, self._current = len(parts), current
        self._handles = [part.register_forward_hook(self._keep(number)) for number, part in enumerate(parts)]

    def take(self, batch: int) -> list[list[Any]]:
        """What each part returned for a batch, call by call."""
        return self._kept.pop(batch)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._kept.setdefault(self._current(), [[] for _ in range(self._count)])[number].append(output)

        return hook


def _giving(outputs: Sequence[Any]) -> Callable[..., Any]:
    left = iter(outputs)
    return lambda *args, **kwargs: next(left)


def _complete_parts(module: nn.Module, missing: frozenset[str], name: str = "") -> Iterator[nn.Module]:
    """The largest modules with parameters, of which none is missing, in order."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if not any(True for _ in child.parameters()):
            continue
        lacking = any(f"{path}.{parameter}" in missing for parameter, _ in child.named_parameters())
        if lacking or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _complete_parts(child, missing, path)
        else:
            yield child


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _is_of_tokens(leaf: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether a tensor holds a row of numbers for every token."""
    return leaf.dim() >= 3 and leaf.shape[:2] == ids.shape
