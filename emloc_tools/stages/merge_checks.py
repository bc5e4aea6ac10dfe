"""What `merge` can tell about whether an adapter, a base and an emulator belong together."""

from __future__ import annotations

from pathlib import Path

from emloc_tools.errors import InputError, MismatchError
from emloc_tools.files.adapter import Adapter
from emloc_tools.files.emulator import Emulator
from emloc_tools.files.exported import emulator_in
from emloc_tools.files.merged import merged_adapter
from emloc_tools.models.base import BaseModel


def check_share(emulator: Path | None, interpolate: float | None) -> None:
    """Refuse one of --emulator and --interpolate without the other, and a share outside 0 to 1."""
    if (emulator is None) != (interpolate is None):
        given, missing = ("--emulator", "--interpolate") if interpolate is None else ("--interpolate", "--emulator")
        raise InputError(
            f"{given} needs {missing}: the base's weights are moved towards the emulator's by that share; without both "
            "merge takes a corrected adapter"
        )
    if interpolate is not None and not 0 <= interpolate <= 1:
        raise InputError(f"--interpolate {interpolate:g} is outside 0 (the base) to 1 (the emulator)")


def require_meant(trained: Adapter, bundle: Emulator | None) -> None:
    """Refuse a LoRA that fits neither the base as it is nor the base moved towards its emulator."""
    if bundle is not None and trained.corrected:
        raise MismatchError(
            f"{trained.folder} is corrected for the base already; merge it without --emulator and --interpolate, or "
            "pass the LoRA as it was trained"
        )
    if bundle is None and not trained.corrected and _names_emulator(trained):
        raise MismatchError(
            f"{trained.folder} was trained on the emulator {trained.config.get('base_model_name_or_path')} and is not "
            "corrected; run emloc-tools correct first, or pass --emulator and --interpolate"
        )


def _names_emulator(trained: Adapter) -> bool:
    """Whether an adapter's configuration shows that it was trained on an emulator. A moved emulator leaves no sign."""
    mapping = trained.config.get("auto_mapping")
    if isinstance(mapping, dict) and str(mapping.get("base_model_class")).startswith("Emloc"):
        return True
    named = trained.config.get("base_model_name_or_path")
    return isinstance(named, str) and emulator_in(Path(named)) is not None


def require_architecture(opened: BaseModel, trained: Adapter, bundle: Emulator | None) -> None:
    """Refuse a base of another class than that which the emulator or the corrected adapter was made for."""
    made = [(bundle.manifest.base, "emulator was made from")] if bundle else []
    made += [(trained.manifest.base, "adapter was corrected for")] if trained.manifest else []
    for expected, what in made:
        if expected.architecture != opened.architecture:
            raise MismatchError(
                f"{opened.source.id} is a {opened.architecture}, the {what} a {expected.architecture} "
                f"({expected.id}); pass that base"
            )


def require_unmerged(opened: BaseModel, trained: Adapter) -> None:
    """Refuse a base that has the adapter in its weights already: it would count twice."""
    if merged_adapter(opened.source.folder) == trained.hash:
        raise MismatchError(
            f"{opened.source.id} is a merged model and has {trained.folder} in its weights already; pass the base that "
            "its emloc-merge.json names"
        )


def what_was_checked(trained: Adapter, bundle: Emulator | None, compared: int) -> str:
    """What shows that the base is the right one; `compared` tensors had the hashes that the emulator records."""
    if bundle is not None:
        return f"{compared} tensors are those that the emulator was made from"
    if trained.manifest is not None:
        return (
            f"architecture, names and shapes; the adapter was corrected for {trained.manifest.base.id}, and holds no "
            "hashes that would tell whether the base is that very model"
        )
    return "names and shapes; an adapter does not tell whether the base is the very model that it was trained on"
