"""Counts the bytes of all live tensors while a model runs, of which the weights and what follows from them are fake.

A fake tensor has a shape, a dtype and a storage of some size, but no memory. What does not depend on a weight (token
ids, masks, positions, grids of images) is real and computed as ever, so models may look at the values and branch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emloc_tools.errors import UnsupportedError
from emloc_tools.models.lowrank_layers import DerivedWeight

Kind = Literal["weights", "training_state", "activations", "logits"]

LARGEST_REAL = 1 << 22  # entries; larger results are fake whatever they are made of, such as masks of long texts


@dataclass(frozen=True)
class Memory:
    """Bytes in use at one moment.

    `weights` are the model's frozen parameters and its buffers; `training_state` the LoRA's parameters, their
    gradients and what the optimizer keeps; `logits` every tensor over the vocabulary, its gradients included;
    `activations` all the rest.
    """

    weights: int
    training_state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return self.weights + self.training_state + self.activations + self.logits

    def split(self) -> dict[str, int]:
        """The sum and its parts by name."""
        return {"total": self.total, **asdict(self)}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, every storage that an operation makes counts from its making to its end. `peak` is the most.

    Tensors over `vocabulary` entries in their last dimension count as logits. Memory that a kernel takes and gives
    back within one operation is not seen.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._vocabulary = vocabulary
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._live: dict[int, tuple[int, Kind]] = {}
        self._kind: Kind = "activations"
        self._now: dict[Kind, int] = dict.fromkeys(("weights", "training_state", "activations", "logits"), 0)
        self._most = 0
        self.peak = Memory(0, 0, 0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        guess = None
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            # An optimizer scales its step by such a value, and takes the same memory whatever it is.
            is_scale = func is torch.ops.aten._local_scalar_dense.default and self._kind == "training_state"
            guess = (lambda tensor: 1.0) if is_scale else GUESSES.get(func)
        try:
            if guess is not None:
                result = guess(*args, **kwargs)
            elif _entries(args, given) > LARGEST_REAL:
                with self._fake:
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedError(
                f"the model decides by values that only a real run would have ({func}), so its memory cannot be "
                "foreseen"
            ) from error
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf)
        return result

    def fake_parameters(self, model: nn.Module) -> None:
        """Put fake tensors in place of the model's parameters on meta, tied ones the same; and count these.

        Those that require a gradient count as training state, all others and the buffers as weights.
        """
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._faked(parameter)
                module._parameters[name] = made[id(parameter)]
        for parameter in made.values():
            self.hold([parameter], "training_state" if parameter.requires_grad else "weights")
        self.hold(model.buffers(), "weights")

    def hold(self, tensors: Iterable[torch.Tensor], kind: Kind) -> None:
        """Count tensors that are there already, or count them otherwise from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                self._leave(key, forget=False)
                del self._live[key]
                self._add(key, tensor.untyped_storage().nbytes(), kind)
            else:
                self._enter(tensor, kind)

    @contextmanager
    def counting_as(self, kind: Kind) -> Iterator[None]:
        """What is made inside counts as `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def start(self) -> None:
        """Forget the peak so far."""
        self._most = sum(self._now.values())
        self.peak = Memory(**self._now)

    @property
    def now(self) -> Memory:
        """What is in use now."""
        return Memory(**self._now)

    def _faked(self, parameter: nn.Parameter) -> nn.Parameter:
        if not parameter.is_meta:  # the Linear of a LoRA, say, that PEFT left where it was made
            return parameter
        # A CPU's fakes: its kernels keep for the backward pass what those of CUDA keep.
        fake = self._fake.fake_tensor_converter.from_meta_and_device(
            self._fake, parameter.detach(), torch.device("cpu")
        )
        return nn.Parameter(fake, requires_grad=parameter.requires_grad)

    def _enter(self, tensor: torch.Tensor, kind: Kind | None = None) -> None:
        if isinstance(tensor, DerivedWeight) or tensor.layout != torch.strided:
            return  # a wrapper without memory of its own
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        if kind is None:
            over_vocabulary = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
            kind = "logits" if over_vocabulary and self._kind == "activations" else self._kind
        self._add(key, storage.nbytes(), kind)
        weakref.finalize(storage, self._leave, key)

    def _add(self, key: int, nbytes: int, kind: Kind) -> None:
        self._live[key] = (nbytes, kind)
        self._now[kind] += nbytes
        total = sum(self._now.values())
        if total > self._most:
            self._most, self.peak = total, Memory(**self._now)

    def _leave(self, key: int, *, forget: bool = True) -> None:
        nbytes, kind = self._live[key]
        self._now[kind] -= nbytes
        if forget:
            del self._live[key]


def _entries(args: tuple[Any, ...], given: list[torch.Tensor]) -> int:
    """How many entries the result of an operation on real tensors has, about; 0 where a tensor is fake already."""
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in given):
        return 0
    if not given:  # an operation that makes a tensor of a given shape, if it is one
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return torch.Size(sizes).numel() if all(isinstance(size, int) for size in sizes) else 0
    try:
        shape: torch.Size = torch.broadcast_shapes(*(tensor.shape for tensor in given))  # type: ignore[no-untyped-call]
        return shape.numel()
    except RuntimeError:
        return 0


def _balanced(tensor: torch.Tensor, weights: Any = None, minlength: int = 0) -> torch.Tensor:
    """The counts of a bincount whose values are spread evenly over `minlength` numbers: what a router aims at."""
    each, rest = divmod(tensor.numel(), max(minlength, 1))
    return torch.tensor([each + (number < rest) for number in range(max(minlength, 1))])


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, *rest: Any, **more: Any) -> Any:
    """A product of shapes alone for each group of rows, of which torch foresees those in bfloat16 only."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None  # the groups are cut out of the dimension that is summed over
        return a.new_empty(offs.numel(), a.shape[0], b.shape[1])
    if a.dim() == 2 or b.dim() == 2:
        return a.new_empty(a.shape[-2], b.shape[-1])
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


# For operations whose shape or value only a real run would tell: what is most likely.
GUESSES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bincount.default: _balanced,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
}
