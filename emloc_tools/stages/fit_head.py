"""fit-head: give a base the head of a sequence classifier, fitted on what the base itself gives for labelled texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from emloc_tools.data.batches import Batch, count_tokens, load_batches, read_labels
from emloc_tools.errors import InputError
from emloc_tools.files.folders import check_output, new_folder
from emloc_tools.files.headed import Shards, write_rest, write_shards
from emloc_tools.files.manifest import BaseRecord, DataRecord, file_hash, made_by, manifest_dict
from emloc_tools.files.tensors import read_json
from emloc_tools.linalg.minimum import Minimum
from emloc_tools.models.base import choose_device
from emloc_tools.models.companions import copy_companions
from emloc_tools.models.heads import HeadedBase, open_headed
from emloc_tools.models.labels import numbered
from emloc_tools.records import Progress, Step, silent
from emloc_tools.stages.head_fitting import DECAYS, Quality, cross_validated, fit, quality, split
from emloc_tools.stages.passes import blaming_inputs
from emloc_tools.stages.refusals import require_apart, require_original
from emloc_tools.stages.scoring import forward_of, waves_of
from emloc_tools.streaming.head_features import Features, Head
from emloc_tools.streaming.stream import LockStep


@dataclass(frozen=True)
class FittedHead:
    """A finished folder. `head` are the tensors that were fitted, `labels` their rows.

    `tried` are the losses in cross-validation by which `weight_decay` was chosen; empty where it was given.

    `fitted` is measured on the samples of the fit, `before` (a random head) and `after` on those held out, None if
    there are none; all with the head in the dtype that is stored. `usual` is the part of the held-out samples that
    have the label which is most frequent in the fit. `pads` says whether the tokenizer pads with what the model takes
    for padding, the token `pad`.
    """

    output: Path
    base: BaseRecord
    architecture: str
    labels: dict[str, int]
    head: list[str]
    parameters: int
    weight_decay: float
    tried: dict[float, float]
    minimum: Minimum
    fitted: Quality
    before: Quality | None
    after: Quality | None
    usual: float | None
    pad: int
    pads: bool
    shards: Shards


def fit_head(
    *,
    base: str,
    data: Path,
    output: Path,
    revision: str | None = None,
    samples: int | None = None,
    max_length: int | None = 2048,
    batch_size: int = 1,
    seed: int = 0,
    held_out: float = 0.2,
    weight_decay: float | None = None,
    fit_dtype: Literal["float32", "float64"] = "float64",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    command: str = "emloc_tools.stages.fit_head",
    progress: Progress = silent,
) -> FittedHead:
    """Write to `output` the base as a sequence classifier whose head is fitted on labelled texts of `data`.

    The head is whatever the checkpoint lacks of the base's class for sequence classification; a pooler inside of the
    body counts. The base runs once for every `scoring.TOKENS_IN_FLIGHT` tokens, unit by unit, in `dtype`, and what the
    head reads is kept: one row per sample. Then the mean cross-entropy over the samples plus `weight_decay / 2` times
    the squared entries of the head's matrices is minimised in `fit_dtype`; without a `weight_decay` that of
    `head_fitting.DECAYS` is taken which is best in cross-validation over the same samples. For a head of one layer that
    has one minimum, for others the one that a start chosen by `seed` leads to. A part `held_out` (0 to 1) of the
    samples of every label is left out of the fit, to measure on.

    `output` is a model folder like any other, which every stage takes as its base. It shares the files of the base's
    weights, by hard links, where the file system can.

    Raises `InputError` for unusable data or a base that has a head, `UnsupportedError` for a base without a class for
    sequence classification or a head that reads several tokens, `MismatchError` for an incomplete checkpoint.
    """
    require_original(base)
    require_apart(output, [Path(base), data])
    check_output(output, overwrite=overwrite)
    if not 0 <= held_out < 1:
        raise InputError(f"--held-out {held_out:g} is outside 0 (no sample) to below 1; try 0.2")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise InputError(f"--weight-decay {weight_decay:g} must be 0 or more, such as {DECAYS[2]:g}")
    device = choose_device(device)
    try:
        labels = numbered(read_labels(data))
    except ValueError as error:
        raise InputError(f"{data}: {error}") from error
    headed = open_headed(
        base,
        labels,
        revision=revision,
        dtype=dtype,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    with headed.tensors:
        batches = load_batches(
            data,
            headed.source,
            samples=samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            trust_remote_code=trust_remote_code,
            config=headed.config,
        )
        wanted = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        chosen, left_out = split(wanted.tolist(), labels, held_out, seed)
        head = Head(headed, getattr(torch, fit_dtype))
        features = _features(headed, head, batches, device, progress)
        known = wanted.to(features.ids.device)
        before = quality(head, features.select(left_out), known[left_out]) if len(left_out) else None
        tried = cross_validated(head, features.select(chosen), known[chosen], seed) if weight_decay is None else {}
        if weight_decay is None:
            weight_decay = min(tried, key=tried.__getitem__, default=DECAYS[2])
        minimum = fit(head, features.select(chosen), known[chosen], weight_decay)
        stored = head.round()
        usual = wanted[chosen].bincount().argmax()
        with new_folder(output, overwrite=overwrite) as folder:
            shards = write_shards(folder, headed.tensors, headed.source.locate, stored, prefix=_new_prefix(headed))
            result = FittedHead(
                output=output,
                base=BaseRecord(id=base, revision=headed.source.revision, architecture=headed.original),
                architecture=headed.architecture,
                labels=labels,
                head=list(headed.head),
                parameters=sum(tensor.numel() for tensor in stored.values()),
                weight_decay=weight_decay,
                tried=tried,
                minimum=minimum,
                fitted=quality(head, features.select(chosen), known[chosen]),
                before=before,
                after=quality(head, features.select(left_out), known[left_out]) if len(left_out) else None,
                usual=float((wanted[left_out] == usual).double().mean()) if len(left_out) else None,
                pad=headed.config.get_text_config().pad_token_id,
                pads=headed.tokenizer_pads,
                shards=shards,
            )
            copy_companions(headed.source, folder)
            record = DataRecord(
                file=data.name,
                hash=file_hash(data),
                samples=len(wanted),
                tokens=count_tokens(batches),
                max_length=max_length,
                seed=seed,
            )
            note = _note(result, record, made_by(command))
            write_rest(folder, config=_config(headed), note=note, samples=len(chosen), pad=result.pad)
    return result


def _features(headed: HeadedBase, head: Head, batches: Sequence[Batch], device: str, progress: Progress) -> Features:
    """What the head reads of every sample, from a streamed run of the base; the head ends in the dtype of the fit."""
    stream = LockStep(headed.model, headed.weights, device=device)
    watch = head.watch(lambda: stream.current)
    waves = [[number for number, _ in wave] for wave in waves_of(batches, [-1])]
    stream.on_unit_done = _counting(progress, len(stream.units) * len(waves))
    parts = []
    for wave in waves:
        logits: dict[int, torch.Tensor] = {}
        head.to(head.stored)
        calls = [forward_of(headed.model, batches[number], stream.device, blaming_inputs) for number in wave]
        stream.run(calls, logits.__setitem__)
        head.to(head.dtype)
        parts += [head.cut(batches[number], watch.take(place), logits[place]) for place, number in enumerate(wave)]
    watch.close()
    stream.close()
    return Features.joined(parts)


def _counting(progress: Progress, total: int) -> Callable[[object], None]:
    done = 0

    def report(unit: object) -> None:
        nonlocal done
        done += 1
        progress(Step("features", min(done, total), total, str(getattr(unit, "name", ""))))

    return report


def _new_prefix(headed: HeadedBase) -> str:
    """What has to go before all names of a checkpoint of the body alone; empty for any other checkpoint."""
    prefix = f"{headed.model.base_model_prefix}."
    names = [name for name in headed.weights.stored_names() if name.startswith(prefix)]
    bare = any(headed.weights.copied_from(name) == name.removeprefix(prefix) for name in names)
    return prefix if bare else ""


def _config(headed: HeadedBase) -> dict[str, Any]:
    """The base's config.json as it is, but for what makes it that of the classifier."""
    config = read_json(headed.source.folder / "config.json", "base config")
    config.pop("auto_map", None)  # it names code of the base's own, and the class is one of transformers
    made = headed.config
    text = config["text_config"] if made.get_text_config() is not made and "text_config" in config else config
    text["pad_token_id"] = made.get_text_config().pad_token_id
    return config | {
        "architectures": [headed.architecture],
        "id2label": {str(number): label for number, label in made.id2label.items()},
        "label2id": made.label2id,
        "problem_type": made.problem_type,
    }


def _note(result: FittedHead, data: DataRecord, made: Any) -> dict[str, Any]:
    """What the folder was made from."""
    fields = ("weight_decay", "tried", "minimum", "fitted", "before", "after", "usual")
    figures = {name: value for name, value in asdict(result).items() if name in fields}
    return {
        "made_by": manifest_dict(made),
        "base": manifest_dict(result.base),
        "data": manifest_dict(data),
        "head": result.head,
        **figures,
    }
