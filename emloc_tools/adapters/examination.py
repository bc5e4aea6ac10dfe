"""Compare the tensors of an adapter, key by key, with the modules of a base and with what PEFT makes of it there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_tools.adapters.naming import Naming
from emloc_tools.adapters.peft_keys import PeftKeys, expected_keys
from emloc_tools.errors import MismatchError
from emloc_tools.files.adapter import LoraKeys
from emloc_tools.files.adapter_keys import EMBEDDING, parse_key
from emloc_tools.files.adapter_renamed import RenamedAdapter
from emloc_tools.models.layers import describe

KINDS = {  # of tensors beside the pairs, by the end of their names
    "base_layer.weight": "copies of adapted weights",
    "token_adapter.trainable_tokens_delta": "trained rows of embeddings",
    "lora_magnitude_vector": "magnitudes of DoRA",
    "lora_B.bias": "biases of LoRAs",
    "base_layer.bias": "biases of adapted layers",
}
LATER = ".lora_monteclora_sampler."  # which PEFT makes only once the weights are there
SAVED = "tensors of modules saved as a whole"
OTHERS = "tensors of other parts of the pipeline"


@dataclass(frozen=True)
class Group:
    """The pairs of one module in all blocks: how many there are, and how many have a module of their shape."""

    layer: str
    pairs: int
    found: int
    shape: str
    rank: str
    scaling: str


@dataclass
class Examination:
    """What was found; `problems` are lines that say why the adapter does not apply, `warnings` what else to mind.

    `matching` tensors are found by PEFT as they are, `passed_on` counts by their kind those that belong to no pair.
    """

    matching: int = 0
    groups: list[Group] = field(default_factory=list)
    passed_on: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine(adapter: RenamedAdapter, model: nn.Module, base: str, naming: Naming) -> Examination:
    """Examine an adapter whose tensors `naming` has named. `base` is how messages call the model."""
    return _Examiner(adapter, model, f"{base} ({type(model).__name__})", naming).run()


def targets_found(adapter: RenamedAdapter, model: nn.Module, settings: dict[str, object]) -> bool:
    """Whether PEFT adapts every module that the adapter has a pair of, with `settings` in its configuration.

    The readers of diffusers' file take the modules from its tensors.
    """
    if adapter.component is not None:
        return True
    try:
        expected = expected_keys(model, {**adapter.config, **settings})
    except MismatchError:
        return False
    return all(name in expected.adapter for name in _pair_names(adapter))


def _pair_names(adapter: RenamedAdapter) -> list[str]:
    pairs = (*adapter.loras.values(), *adapter.embeddings.values())
    return [name.removeprefix(adapter.prefix) for keys in pairs for name in (keys.A, keys.B)]


class _Examiner:
    def __init__(self, adapter: RenamedAdapter, model: nn.Module, owner: str, naming: Naming) -> None:
        self._adapter, self._model, self._owner, self._naming = adapter, model, owner, naming
        self._modules = dict(model.named_modules())
        self._pairs: dict[str, LoraKeys] = {**adapter.loras, **adapter.embeddings}
        self._stored = {new: old for old, new in adapter.renamed.items()}
        self._found = Examination()
        self._expected: PeftKeys | None = None

    def run(self) -> Examination:
        fitting = {module for module in self._pairs if self._fits(module)}
        self._report_unclear()
        self._report_shapes(module for module in self._pairs if module in self._modules and module not in fitting)
        self._report_renamed()
        self._ask_peft()
        beside = self._examine_beside()
        counted = [name for module in fitting for name in self._of_pair(module)]
        self._found.matching = sum(self._is_read(name) for name in [*counted, *beside])
        self._found.groups = self._groups(fitting)
        return self._found

    def _of_pair(self, module: str) -> list[str]:
        """The tensors of a module's pair; in the file of diffusers its alpha may be one."""
        alpha = f"{self._adapter.prefix}{module}.alpha"
        keys = self._pairs[module]
        return [keys.A, keys.B, *([alpha] if alpha in self._adapter.tensors else [])]

    def _fits(self, module: str) -> bool:
        shape = self._shape(module)
        return shape is not None and self._adapter.pair_shape(module) == shape

    def _shape(self, module: str) -> tuple[int, int] | None:
        """The shape of a module's weight as `B A` must have it; None for a module without, and for other kinds."""
        found = self._modules.get(module)
        if module in self._adapter.embeddings:
            return (found.num_embeddings, found.embedding_dim) if isinstance(found, nn.Embedding) else None
        if not isinstance(found, (nn.Linear, Conv1D)):
            return None
        layer = describe(module, found)
        return layer.out_features, layer.in_features

    def _report_unclear(self) -> None:
        unclear = self._naming.unclear
        nowhere = [name for name, meant in unclear.items() if not meant]
        experts = [name for name in nowhere if self._of_expert(name)]
        if experts:
            self._found.problems.append(
                f"{len(experts)} LoRA tensors of {self._adapter.folder}, such as {experts[0]}, are of single experts, "
                f"which {self._owner} holds fused; whether PEFT converts them is not checked, leave experts out of "
                "target_modules"
            )
        missing = [name for name in nowhere if name not in experts]
        if missing:
            total = sum(parse_key(name).of_lora for name in self._adapter.tensors.names())
            none = len(missing) == total
            count = f"none of the {total}" if none else f"{total - len(missing)} of the {total}"
            self._found.problems.append(
                f"{count} LoRA tensors of {self._adapter.folder} match a layer of {self._owner}: found {missing[0]}, "
                f"the base has {self._naming.nearest(missing[0])}; the adapter was trained on another model"
            )
        several = next((name for name, meant in unclear.items() if meant), None)
        if several is not None:
            self._found.problems.append(
                f"{several} in {self._adapter.folder} may mean {' or '.join(sorted(unclear[several])[:3])} of "
                f"{self._owner}; rename it to the one that is meant"
            )

    def _of_expert(self, name: str) -> bool:
        """Whether a tensor is of one expert of a module that holds those of all in one tensor."""
        match = re.fullmatch(r"(.+)\.\d+\.\w+", parse_key(name).paths()[-1])
        holder = self._modules.get(match[1]) if match else None
        return holder is not None and next(holder.parameters(recurse=False), None) is not None

    def _report_shapes(self, modules: Iterable[str]) -> None:
        for module in modules:
            shape, pair = self._shape(module), self._adapter.pair_shape(module)
            kind = type(self._modules[module]).__name__
            what = f"is {shape[0]} x {shape[1]}" if shape else f"is a {kind}, to which no pair can be added"
            self._found.problems.append(
                f"the LoRA pair of {module} is for {pair[0]} x {pair[1]}, the layer of {self._owner} {what}; the "
                "adapter was trained on another model"
            )

    def _report_renamed(self) -> None:
        renamed = {old: new for old, new in self._adapter.renamed.items() if old not in self._naming.unclear}
        if renamed:
            old, new = next(iter(renamed.items()))
            self._found.problems.append(
                f"{len(renamed)} of {len(self._adapter.tensors.names())} tensors of {self._adapter.folder} have other "
                f"names than PEFT reads on {self._owner}, and would be left out without an error: found {old}, "
                f"expected {new}; write an adapter that has these with --fix and --output"
            )

    def _ask_peft(self) -> None:
        """What PEFT makes of the configuration, if it is one of PEFT's."""
        if self._adapter.component is not None or self._naming.unclear:
            return
        try:
            self._expected = expected_keys(self._model, self._adapter.config)
        except MismatchError as error:
            self._found.problems.append(f"{self._adapter.config_path}: {error}; --fix names the modules instead")
            return
        unmeant = [name for name in _pair_names(self._adapter) if name not in self._expected.adapter]
        if unmeant:
            self._found.problems.append(
                f"{self._adapter.config_path} means no {parse_key(unmeant[0]).path}, so PEFT would leave "
                f"{len(unmeant)} tensors out without an error; --fix names the modules of all pairs in target_modules"
            )
        stored = {name.removeprefix(self._adapter.prefix) for name in self._adapter.tensors.names()}
        missing = [name for name in self._expected.adapter if name not in stored and parse_key(name).of_lora]
        if missing:
            modules = sorted({parse_key(name).path for name in missing})
            self._found.warnings.append(
                f"{self._adapter.config_path} means {len(modules)} modules that the adapter has no pair of, such as "
                f"{modules[0]}; PEFT warns of them and leaves them as they are"
            )

    def _examine_beside(self) -> list[str]:
        """Tensors that belong to no pair; returns those that the base has a place for."""
        pairs = {name for keys in self._adapter.embeddings.values() for name in (keys.A, keys.B)}
        kinds: Counter[str] = Counter()
        placed = []
        for name in self._adapter.other_tensors:
            key = parse_key(name)
            if name in pairs:
                kinds["LoRAs on embeddings"] += key.part == EMBEDDING[0]
                continue
            if not name.startswith(self._adapter.prefix):
                kinds[OTHERS] += 1
                placed.append(name)
                continue
            kinds[KINDS.get(key.part, SAVED)] += 1
            if self._has_place(name):
                placed.append(name)
        self._found.passed_on = dict(kinds)
        return placed

    def _has_place(self, name: str) -> bool:
        if self._expected is None:
            return False
        short = name.removeprefix(self._adapter.prefix)
        if LATER in short and self._adapter.config.get("monteclora_config"):
            return True
        shape = self._expected.adapter.get(short) or self._expected.model.get(short)
        stored = self._adapter.tensors.spec(name).shape
        if shape is None:
            self._found.warnings.append(
                f"{self._owner} has no {short}: load the base by the class that has it, such as that with the new "
                "head; PEFT leaves it out of this one without an error"
            )
        elif shape != stored:
            self._found.problems.append(
                f"{short} in {self._adapter.folder} is {_by(stored)}, in {self._owner} it is {_by(shape)}; the model "
                "was resized in training, and the base must be, too"
            )
        return shape == stored

    def _is_read(self, name: str) -> bool:
        """Whether PEFT finds a tensor by the name that it has in the file."""
        short = name.removeprefix(self._adapter.prefix)
        if name in self._stored:
            return False
        return (
            self._expected is None or short in self._expected.adapter or short in self._expected.model or LATER in short
        )

    def _groups(self, fitting: set[str]) -> list[Group]:
        groups: dict[str, list[str]] = {}
        for module in self._pairs:
            groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module), []).append(module)
        return [self._group(name, modules, fitting) for name, modules in groups.items()]

    def _group(self, name: str, modules: list[str], fitting: set[str]) -> Group:
        pairs = [self._pairs[module] for module in modules]
        return Group(
            layer=name,
            pairs=len(modules),
            found=len(fitting.intersection(modules)),
            shape=_each(_by(self._adapter.pair_shape(module)) for module in modules),
            rank=_each(str(keys.rank) for keys in pairs),
            scaling=_each(f"{keys.scaling:.6g}" for keys in pairs),
        )


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _each(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))
