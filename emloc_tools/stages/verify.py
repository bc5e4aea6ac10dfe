"""verify: whether an adapter applies to a base, key by key, and to the programs that serve it; and how to mend it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from emloc_tools.adapters.consumers import RELEASES, Served, Serving, serving
from emloc_tools.adapters.examination import Examination, Group, examine
from emloc_tools.adapters.naming import Naming
from emloc_tools.adapters.rewriting import rewrite
from emloc_tools.errors import EmlocError, InputError, MismatchError, UnsupportedError
from emloc_tools.files.adapter import CONFIG as ADAPTER
from emloc_tools.files.adapter_renamed import RenamedAdapter, open_renamed
from emloc_tools.files.diffusers_lora import WEIGHTS as DIFFUSERS_ADAPTER
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.manifest import made_by
from emloc_tools.models.adapted import require_pair_shape
from emloc_tools.models.diffusion import DiffusersConfig
from emloc_tools.models.skeleton import build_skeleton, compute_dtype, load_config, model_class
from emloc_tools.models.source import Source, open_source
from emloc_tools.records import Library
from emloc_tools.stages.corrector import refuse_saved_factors, require_same_architecture, require_trained_on
from emloc_tools.stages.merge_checks import require_meant
from emloc_tools.stages.refusals import require_apart, require_artifact, require_original, require_plain_lora


@dataclass(frozen=True)
class Verification:
    """Whether an adapter applies, and what was found on the way.

    `matching` of `tensors` have the names and shapes under which PEFT finds them on the base. `groups` has a row for
    the pairs of all blocks together, `passed_on` counts by its kind what belongs to no pair. `problems` are lines that
    say why it does not apply, `warnings` what else to mind; `serving` is for each program that was asked for.
    `refusal` is the first of the problems, also of the programs', and None if there are none.

    With `output`, the adapter that was written there is what all of this is about, except for `renamed`, `settings`
    and `folded`, which say what was changed to get it: names of tensors, fields of the configuration, and modules whose
    B was multiplied, with the factors.
    """

    adapter: Path
    base: str
    architecture: str
    component: str | None
    corrected: bool
    tensors: int
    matching: int
    groups: list[Group]
    passed_on: dict[str, int]
    problems: list[str]
    warnings: list[str]
    serving: list[Serving]
    refusal: str | None = None
    output: Path | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Base:
    """A base's class on meta, and what tells how adapters name its modules."""

    source: Source
    model: nn.Module
    library: Library
    component: str | None
    tied_head: bool


def verify(
    *,
    adapter: Path,
    base: str,
    emulator: Path | None = None,
    consumers: Sequence[str] = (),
    fix: bool = False,
    fold_scaling: bool = False,
    output: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.verify",
) -> Verification:
    """Compare every tensor of an adapter with the modules of `base`, as PEFT would find them.

    Of the base the configuration is read, and no weights; of the emulator the headers. `consumers` are keys of
    `consumers.RELEASES`, whose published limits are checked as well. With `output`, an adapter is written: `fix` gives
    its tensors the base's names and lets its configuration mean exactly their modules, `fold_scaling` gives all pairs
    one `lora_alpha`, so that programs that read no more compute the right scaling. It is verified before it gets its
    name; if it still does not apply, or nobody can tell what a name means, `MismatchError` is raised and nothing is
    written.

    Otherwise what does not apply is in `problems` and raises nothing. `FormatError` for an adapter that is damaged,
    `InputError` for unusable paths, `UnsupportedError` for kinds of adapters that cannot be followed.
    """
    _require_use(consumers, output, rewriting=fix or fold_scaling)
    require_original(base)
    if not (adapter / DIFFUSERS_ADAPTER).is_file():
        require_artifact(adapter, ADAPTER, "a PEFT adapter")
    if emulator is not None:
        require_artifact(emulator, EMULATOR, "an emulator")
    if output is not None:
        require_apart(output, [adapter, Path(base), *([emulator] if emulator else [])])
        check_output(output, overwrite=overwrite)
    opened = _open(base, revision, trust_remote_code)
    found, result = _verification(adapter, base, opened, emulator, consumers)
    with contextlib.closing(found):
        if output is None:
            return _judged(result)
        _require_rewritable(found, fix=fix, fold=fold_scaling)
        with new_folder(output, overwrite=overwrite) as folder:
            made = made_by(command, opened.library)
            changes = rewrite(found, opened.model, folder, fix=fix, fold=fold_scaling, made_by=made)
            written, after = _verification(folder, base, opened, emulator, consumers)
            written.close()
            if after.problems:
                raise MismatchError(f"{after.problems[0].replace(str(folder), str(adapter))}; nothing was written")
    shown = [_at(each, folder, output) for each in after.serving]
    warnings = [warning.replace(str(folder), str(output)) for warning in after.warnings]
    return _judged(replace(after, adapter=adapter, output=output, warnings=warnings, serving=shown, **vars(changes)))


def _judged(result: Verification) -> Verification:
    """The result with its refusal."""
    found = [*result.problems, *(f"{each.release}: {line}" for each in result.serving for line in each.problems)]
    return replace(result, refusal=found[0] if found else None)


def _require_use(consumers: Sequence[str], output: Path | None, *, rewriting: bool) -> None:
    unknown = [name for name in consumers if name not in RELEASES]
    if unknown:
        raise InputError(f"{unknown[0]} is not among {', '.join(RELEASES)}")
    if rewriting and output is None:
        raise InputError("--fix and --fold-scaling write an adapter; add --output")
    if output is not None and not rewriting:
        raise InputError("--output needs --fix or --fold-scaling, which say what to write there")


def _open(base: str, revision: str | None, trust_remote_code: bool) -> _Base:
    """The base's class on meta; its weights are neither fetched nor opened."""
    source = open_source(base, revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    cls = model_class(config, source, trust_remote_code=trust_remote_code)
    if isinstance(config, DiffusersConfig):
        component = "unet" if "UNet" in config.architecture else "transformer"
        return _Base(source, build_skeleton(cls, config, dtype=compute_dtype(config)), "diffusers", component, False)
    vars(config).pop("quantization_config", None)
    model = build_skeleton(cls, config, dtype=compute_dtype(config))
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return _Base(source, model, "transformers", None, tied)


def _verification(
    folder: Path, base: str, opened: _Base, emulator: Path | None, consumers: Sequence[str]
) -> tuple[RenamedAdapter, Verification]:
    naming = Naming(opened.model, opened.component)
    adapter = open_renamed(folder, naming)
    try:
        examination = examine(adapter, opened.model, base, naming)
        if emulator is not None:
            examination.problems += _problems_with(adapter, emulator, base, type(opened.model).__name__)
        served = Served(adapter, opened.library, opened.tied_head)
        return adapter, _result(adapter, base, opened, examination, [serving(name, served) for name in consumers])
    except BaseException:
        adapter.close()
        raise


def _problems_with(adapter: RenamedAdapter, folder: Path, base: str, architecture: str) -> list[str]:
    """Why the adapter does not belong to an emulator, or cannot be corrected with it."""
    with contextlib.closing(Emulator(folder)) as bundle:
        try:
            require_same_architecture(architecture, bundle, base)
            if adapter.manifest is None:
                require_trained_on(adapter, bundle)
                require_plain_lora(adapter)
                refuse_saved_factors(adapter, bundle)
            elif adapter.manifest.emulator != bundle.hash:
                raise MismatchError(f"{adapter.folder} was corrected with another emulator than that in {folder}")
            for module in sorted(bundle.layers.keys() & adapter.loras.keys()):
                layer = bundle.layers[module]
                shape = (layer.out_features, layer.in_features)
                require_pair_shape(module, adapter.pair_shape(module), shape, "the emulator's layer")
        except EmlocError as error:
            return [str(error)]
    return []


def _provenance(adapter: RenamedAdapter, architecture: str) -> list[str]:
    """A warning if the adapter was trained on an emulator and not corrected since, or corrected for another class."""
    if adapter.manifest is not None and adapter.manifest.base.architecture != architecture:
        made_for = adapter.manifest.base
        return [
            f"{adapter.folder} was corrected for {made_for.id}, a {made_for.architecture}; this is a {architecture}"
        ]
    try:
        require_meant(adapter, None)
    except MismatchError:
        return [f"{adapter.folder} was trained on an emulator and is not corrected; run emloc-tools correct first"]
    return []


def _result(
    adapter: RenamedAdapter, base: str, opened: _Base, examination: Examination, served: list[Serving]
) -> Verification:
    return Verification(
        adapter=adapter.folder,
        base=base,
        architecture=type(opened.model).__name__,
        component=adapter.component,
        corrected=adapter.corrected,
        tensors=len(adapter.tensors.names()),
        matching=examination.matching,
        groups=examination.groups,
        passed_on=examination.passed_on,
        problems=examination.problems,
        warnings=[*examination.warnings, *_provenance(adapter, type(opened.model).__name__)],
        serving=served,
    )


def _require_rewritable(adapter: RenamedAdapter, *, fix: bool, fold: bool) -> None:
    """Refuse what one of the options alone cannot do, and scalings that cannot be folded."""
    if adapter.renamed and not fix:
        raise MismatchError(f"{adapter.folder} holds tensors under other names than PEFT reads; add --fix")
    if fold and adapter.component is not None:
        raise UnsupportedError(
            f"{adapter.folder} is in the file of diffusers, whose readers take every scaling; leave --fold-scaling out"
        )
    if fold:
        require_plain_lora(adapter)


def _at(served: Serving, folder: Path, output: Path) -> Serving:
    """What to use, with the final name of the folder."""
    return replace(served, options=[option.replace(str(folder), str(output)) for option in served.options])
