"""The model card of an artifact: what it is, how it was made and used, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator

from emloc_tools.files.emulator_writer import CARD as CARD_OF_EMULATOR
from emloc_tools.files.manifest import AdapterManifest, BaseRecord, CalibrationManifest, EmulatorManifest
from emloc_tools.hub.artifact import Artifact
from emloc_tools.hub.licenses import License
from emloc_tools.hub.privacy import is_on_hub, shown_command, shown_name
from emloc_tools.hub.results import results
from emloc_tools.hub.text import code, one_line, prose, yaml_header
from emloc_tools.records import Library

MARK = "<!-- Written by emloc-tools push. Without this line it is yours, and push keeps it. -->"
OF_PEFT = ("# Model Card for Model ID", "Provide a quick summary of what the model is/does")
TITLES = {
    "calibration": "EMLoC calibration of {base}",
    "emulator": "EMLoC emulator of {base}",
    "adapter": "LoRA for {base}",
}
TRAINED = "LoRA trained on {base}"
TRUST: dict[Library, str] = {
    "transformers": "with `trust_remote_code`, as its class is code in this folder",
    "diffusers": "after `import emloc_tools`, or through `AutoModel` with `trust_remote_code`",
}
HUB_ID = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*){1,2}", re.ASCII)


def card(artifact: Artifact, repo: str, license: License | None) -> str:
    """The text of README.md: a YAML header that the Hub reads, and sections for people.

    The base is named by its Hub id, or by the last part of its path where it was a local folder.
    """
    base = base_of(artifact)
    name = shown_name(base.id) if base else shown_name(trained_on(artifact) or "an unnamed model")
    trained = artifact.kind == "adapter" and artifact.manifest is None
    title = TRAINED if trained else TITLES[artifact.kind]
    sections = [
        yaml_header(_header(artifact, base, license)),
        MARK,
        f"# {title.format(base=prose(name))}",
        _summary(artifact, prose(name)),
        "## Use",
        *_use(artifact, repo, base),
        "## How it was made",
        *_made(artifact, base, license),
        *results(artifact),
    ]
    return "\n\n".join(sections) + "\n"


def base_of(artifact: Artifact) -> BaseRecord | None:
    """What the manifest says of the base; None for a LoRA without one."""
    return artifact.manifest.base if artifact.manifest is not None else None


def trained_on(artifact: Artifact) -> str | None:
    """The model that a LoRA's configuration names."""
    name = artifact.config.get("base_model_name_or_path")
    return one_line(name) or None if isinstance(name, str) else None


def is_of_a_user(text: str) -> bool:
    """Whether a README.md was written by somebody: not by push, `build-emulator` or as PEFT's empty form."""
    if MARK in text or all(part in text for part in OF_PEFT):
        return False
    # The card in an emulator's folder differs by what was filled in, which may go over two lines.
    parts = re.split(r"\{[^{}]*\}", CARD_OF_EMULATOR)
    return re.fullmatch(r"[^\n]*(?:\n   [^\n]*)?".join(map(re.escape, parts)), text) is None


def _header(artifact: Artifact, base: BaseRecord | None, license: License | None) -> dict[str, str | list[str] | None]:
    on_hub = base is not None and is_on_hub(base)
    adapter = artifact.kind == "adapter"
    library = "peft" if adapter and artifact.library == "transformers" else artifact.library
    return {
        "library_name": library if artifact.kind != "calibration" else None,
        "base_model": "/".join(base.id.split("/")[:2]) if base is not None and on_hub else None,
        "base_model_relation": "adapter" if adapter and on_hub else None,
        "license": license.id if license else None,
        "license_name": license.name if license else None,
        "license_link": license.link if license else None,
        "tags": ["emloc", "lora" if adapter else artifact.kind],
    }


def _summary(artifact: Artifact, base: str) -> str:
    manifest = artifact.manifest
    of = f"**{base}**" + (f" ({prose(manifest.base.architecture)})" if manifest is not None else "")
    if artifact.kind == "calibration":
        return (
            f"Second moments of what passes through the linear layers of {of} on samples of a task, from which "
            "emloc-tools builds an emulator. It holds neither text nor weights."
        )
    if artifact.kind == "emulator":
        return (
            f"A light low-rank stand-in for {of}, on which a LoRA can be trained in little memory. It is not a model "
            "to use by itself."
        )
    if manifest is None:
        return (
            f"A LoRA as it was trained on {of}. If that is an EMLoC emulator, the LoRA has to be corrected for the "
            "emulator's base before it is used."
        )
    part = f", for the {prose(artifact.component)} of a pipeline," if artifact.component else ""
    return (
        f"A LoRA for {of}{part} that was trained on a light emulator of it and then corrected for the model itself"
        f"{', and refined on it' if getattr(manifest, 'refinements', None) else ''}. It is used like any other LoRA."
    )


def _use(artifact: Artifact, repo: str, base: BaseRecord | None) -> Iterator[str]:
    name = base.id if base is not None and is_on_hub(base) and HUB_ID.fullmatch(base.id) else "BASE"
    pull = f"emloc-tools pull {repo} --output {artifact.kind}"
    correct = "emloc-tools correct --emulator {} --adapter {} --base " + name + " --output corrected"
    match artifact.kind:
        case "calibration":
            build = f"emloc-tools build-emulator --base {name} --calibration calibration --ratio 0.25 --output emulator"
            yield code(f"{pull}\n{build}")
        case "emulator":
            yield f"Train a LoRA on it with any trainer, {TRUST[artifact.library]}. Then correct it for the base:"
            yield code(f"{pull}\n{correct.format('emulator', 'LORA')}")
            yield "Do not merge a LoRA into it."
        case "adapter" if artifact.manifest is None:
            yield code(f"{pull}\n{correct.format('EMULATOR', 'adapter')}")
        case "adapter" if artifact.component is not None:
            yield code(f'pipeline.load_lora_weights("{repo}")', "python")
        case "adapter":
            yield code(
                f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "
                f'"{repo}")  # base: the model {name}, as transformers loads it',
                "python",
            )
    if name == "BASE" and artifact.component is None:
        yield f"BASE is {prose(shown_name(base.id))}." if base else "BASE is the base of the emulator EMULATOR."


def _made(artifact: Artifact, base: BaseRecord | None, license: License | None) -> Iterator[str]:
    manifest = artifact.manifest
    if manifest is None or base is None:
        yield "Nobody recorded how it was trained."
    else:
        where = f"commit {prose(base.revision)}" if base.revision else "from a local folder"
        yield f"- base: {prose(shown_name(base.id))} ({prose(base.architecture)}), {where}\n" + "\n".join(
            f"- {fact}" for fact in _facts(manifest)
        )
        made = manifest.made_by
        libraries = ", ".join(f"{prose(name)} {prose(release)}" for name, release in made.libraries.items())
        yield f"emloc-tools {prose(made.emloc_tools)}, with {libraries}:"
        yield code(shown_command(made.command), "text")
    if license is None:
        yield "No license is named here, as that of the base is not known to the program that wrote this."


def _facts(manifest: CalibrationManifest | EmulatorManifest | AdapterManifest) -> Iterator[str]:
    if isinstance(manifest, CalibrationManifest):
        for data in manifest.data:
            yield f"data: {prose(data.file)}, {data.samples:,} samples, {data.tokens:,} tokens"
    elif isinstance(manifest, EmulatorManifest):
        if manifest.calibration is None:
            yield "calibration: none, the factors are plain SVDs"
        else:
            for data in manifest.calibration.data:
                yield f"calibrated on {prose(data.file)}: {data.samples:,} samples, {data.tokens:,} tokens"
        weighted = getattr(manifest, "weighting", None) is not None
        yield f"errors weighted by the loss gradient: {'yes' if weighted else 'no'}"
        yield f"ranks by {manifest.allocation} allocation"
    else:
        clamp = "none" if manifest.clamp is None else f"{manifest.clamp:g}"
        yield f"LoRA pairs corrected: {len(manifest.layers)}, clamp {clamp}"
        yield f"emulator: {manifest.emulator}"
