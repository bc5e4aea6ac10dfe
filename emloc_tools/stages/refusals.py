"""What several stages refuse before they start, so that no hour of work ends in an error that could be foreseen."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import MANIFEST as EMULATOR
from emloc_tools.files.exported import NOTE as EXPORT
from emloc_tools.files.folders import require_folder
from emloc_tools.models.base import weight_name
from emloc_tools.records import Layer

KINDS = {
    "use_dora": "DoRA's magnitudes belong to the weights that it was trained on",
    "lora_bias": "a LoRA bias cannot be merged into layers without bias",
    "use_qalora": "QA-LoRA pools its inputs",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only",
    "layer_replication": "replicated layers have no counterpart in the base",
    "kasa_config": "KaSA cuts small singular values off the base weights",
}
# These leave the base's weights alone. The others of PEFT 0.21 (pissa, pissa_niter_N, olora, corda, loftq, lora_ga)
# train beside `W - s B₀ A₀` or a quantised W, which PEFT makes from W again, or forgets, when it loads the adapter.
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")


def require_apart(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is or holds one of the inputs: to replace it would delete what was read.

    An input that begins with `~` may be meant as it stands, or in a home as `open_source` reads it; neither may go.
    """
    target = output.resolve()
    for path in inputs:
        # Path.expanduser raises where there is no such home; os.path leaves a name such as `~draft.jsonl` as it is.
        for meant in {path, Path(os.path.expanduser(path))}:  # noqa: PTH111
            if target in (meant.resolve(), *meant.resolve().parents) and meant.exists():
                raise InputError(f"--output {output} would replace the input {path}; choose another --output")


def require_artifact(path: Path, marker: str, what: str) -> None:
    """Refuse a path that is not a folder with the file `marker`, naming what was expected there."""
    require_folder(path, what)
    if not (path / marker).exists():
        raise InputError(f"{path} holds no {marker}; expected the folder of {what}")


def require_original(base: str) -> None:
    """Refuse an emulator, as factors or dense, where the model that it stands for is meant."""
    for note in (EMULATOR, EXPORT):
        if (Path(os.path.expanduser(base)) / note).is_file():  # noqa: PTH111
            raise InputError(f"--base {base} is an emulator; pass the model that it was made from, which {note} names")


def require_own_weights(layers: Iterable[Layer], source_of: Mapping[str, str]) -> None:
    """Refuse layers whose weight belongs to another module, too: it cannot be replaced for one of them alone."""
    users = Counter(source_of.values())
    for layer in layers:
        if users[source_of[weight_name(layer)]] > 1:
            raise UnsupportedError(
                f"{layer.name} shares its weight with another module, such as an embedding, and cannot become factors "
                "alone; leave it out with --exclude"
            )


def require_plain_lora(adapter: Adapter) -> None:
    """Refuse kinds of adapters whose effect on a layer is not `s B A x` alone."""
    for key, reason in KINDS.items():
        if adapter.config.get(key):
            raise UnsupportedError(f"{adapter.folder} was trained with {key}: {reason}; use plain LoRA or rsLoRA")
    init = adapter.config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS)):
        raise UnsupportedError(
            f"{adapter.folder} was trained with init_lora_weights={reprlib.repr(init)}, which rewrites the weights "
            "of the model that it trains on; convert it to a plain LoRA with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion), or train with init_lora_weights=True"
        )
    bias = adapter.config.get("bias", "none")
    if bias != "none":
        raise UnsupportedError(
            f'{adapter.folder} was trained with bias="{bias}", which changes the biases of the base; use bias="none"'
        )
