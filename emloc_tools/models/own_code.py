"""Bases whose class is Python code in their own folder: what an emulator of them needs of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from emloc_tools.errors import InputError, UnsupportedError
from emloc_tools.files.json_files import read_json
from emloc_tools.models.modeling import FILE, modeling_of_own_code
from emloc_tools.models.source import Source

REFERENCE = re.compile(r"([A-Za-z_]\w{0,100})\.([A-Za-z_]\w{0,200})", re.ASCII)


@dataclass(frozen=True)
class OwnCode:
    """The modeling file of an emulator, the `auto_map` for its config.json, and the base's Python files by name."""

    modeling: str
    auto_map: dict[str, str]
    files: dict[str, bytes]


def own_code(source: Source, architecture: str) -> OwnCode:
    """What an emulator takes over of a base whose model class is code in its folder. Nothing is run here.

    The emulator loads by the Auto classes of models that the base itself names for the class, and by the base's own
    configuration class where it has one. Raises `UnsupportedError` for code that is not all in the folder.
    """
    auto_map = read_json(source.folder / "config.json", "base config").get("auto_map") or {}
    modules = {}
    for auto, reference in auto_map.items():
        match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
        if auto.startswith("AutoModel") or auto == "AutoConfig":
            if match is None or not (source.folder / f"{match[1]}.py").is_file():
                raise UnsupportedError(
                    f"{source.id}: {auto} is {reference!r}, code that is not in the model's own folder; put it there, "
                    "as an emulator holds all that it needs"
                )
            modules[auto] = match
    autos = [auto for auto, match in modules.items() if auto != "AutoConfig" and match[2] == architecture]
    if not autos:
        raise UnsupportedError(
            f"{source.id}: no Auto class in its auto_map gives {architecture}, so no trainer could load its emulator"
        )
    files = {path.name: path.read_bytes() for path in sorted(source.folder.glob("*.py"))}
    if f"{FILE}.py" in files:
        raise InputError(f"{source.id} holds a {FILE}.py, the name of the file that an emulator adds; rename it")
    modeling, mapped = modeling_of_own_code(architecture, modules[autos[0]][1], autos)
    if "AutoConfig" in modules:
        mapped["AutoConfig"] = auto_map["AutoConfig"]
    return OwnCode(modeling, mapped, files)
