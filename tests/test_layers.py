"""The rooms of the package import in one direction only. The table below is the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "emloc_tools"

ROOMS: dict[str, set[str]] = {
    "emloc_tools": {"emloc_tools.plugin", "emloc_tools.models.loading", "emloc_tools.models.recording"},  # on first use
    "plugin": {"emloc_tools.models.diffusers_quantizer"},  # once diffusers is imported
    "errors": set(),
    "records": {"torch"},
    "wording": set(),
    "linalg": {"torch", "errors", "records"},
    "files": {"torch", "numpy", "pydantic", "xxhash", "emloc_tools", "errors", "records"},
    "models": {
        "torch",
        "transformers",
        "diffusers",
        "bitsandbytes",
        "compressed_tensors",
        "PIL",
        "huggingface_hub",
        "files",
        "errors",
        "records",
    },
    "data": {"torch", "PIL", "models", "files", "errors", "records"},
    "streaming": {"torch", "numpy", "greenlet", "transformers", "data", "models", "errors", "records"},
    "planning": {"torch", "peft", "PIL", "data", "models", "linalg", "files", "errors", "records"},
    "reporting": {
        "torch",
        "transformers",
        "pydantic",
        "jinja2",
        "matplotlib",
        "models",
        "files",
        "errors",
        "records",
        "wording",
        "emloc_tools",
    },
    "adapters": {"torch", "transformers", "peft", "models", "files", "errors", "records"},
    "hub": {"huggingface_hub", "files", "errors", "records", "wording", "emloc_tools"},
    # Its programs run where nothing of emloc-tools is installed.
    "trainers": {"torch", "peft", "transformers", "accelerate", "trl", "unsloth", "datasets"},
    "stages": {
        "adapters",
        "hub",
        "trainers",
        "torch",
        "peft",
        "transformers",
        "reporting",
        "planning",
        "streaming",
        "data",
        "models",
        "linalg",
        "files",
        "errors",
        "records",
        "wording",
        "emloc_tools",
    },
    "cli": {"click", "rich", "stages", "reporting", "emloc_tools", "errors", "records", "wording"},
    "demo": {"torch", "transformers", "peft", "tokenizers"},
    "__main__": {"cli"},
}
# A stage never runs another stage; these modules of the room are no stages and serve several of them.
HELPERS_OF_STAGES = {
    "budget",
    "build_choices",
    "candidates",
    "corrector",
    "decomposer",
    "gradient_sums",
    "gram_sums",
    "head_fitting",
    "merge_checks",
    "merge_plan",
    "passes",
    "refinement",
    "refusals",
    "scoring",
    "selection",
}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "emloc_tools" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, those for type checking alone excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    ]
    for node in tree.body if top_level_only else ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            are_modules = [(PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists() for name in submodules]
            yield from submodules if any(are_modules) else [node.module or ""]


def needed_room(name: str) -> str:
    """What a table entry would have to name: a room of ours, or another package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "emloc_tools" and len(parts) > 1 else parts[0]


def violations(path: Path) -> list[str]:
    room = room_of(path)
    allowed = ROOMS[room] | {room}
    return [
        f"{path.relative_to(PACKAGE.parent)} imports {name}"
        for name in imports(path)
        if needed_room(name) not in sys.stdlib_module_names | allowed and name not in allowed
    ]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_is_in_a_room_of_the_table() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards_only(path: Path) -> None:
    assert violations(path) == []


def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a file in linalg that reads files and one in cli that would load torch."""
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "emloc_tools")
    culprit = tmp_path / "emloc_tools" / "linalg" / "culprit.py"
    culprit.parent.mkdir(parents=True)
    culprit.write_text(
        "def f():\n    from emloc_tools.files.tensors import read_json\n    import transformers.models\n"
    )
    assert violations(culprit) == [
        "emloc_tools/linalg/culprit.py imports emloc_tools.files.tensors",
        "emloc_tools/linalg/culprit.py imports transformers.models",
    ]


def test_no_stage_uses_another_stage() -> None:
    used = {
        (path.stem, name.split(".")[2])
        for path in (PACKAGE / "stages").glob("*.py")
        for name in imports(path)
        if name.startswith("emloc_tools.stages.")
    }
    assert {other for _, other in used} <= HELPERS_OF_STAGES
    assert not {stage for stage, _ in used} & HELPERS_OF_STAGES, "a helper uses no stage and no other helper"


def test_the_command_line_loads_nothing_heavy_at_module_level() -> None:
    heavy = {"torch", "transformers", "peft", "stages", "reporting", "files", "pydantic"}
    found = {
        (path.name, name)
        for path in (PACKAGE / "cli").glob("*.py")
        for name in imports(path, top_level_only=True)
        if needed_room(name) in heavy
    }
    assert found == set()


@pytest.mark.parametrize("arguments", [["--help"], ["calibrate", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    program = (
        "import sys; from emloc_tools.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    modules = set(ast.literal_eval(shown.strip().splitlines()[-1]))
    assert "click" in modules
    assert not modules & {"torch", "transformers", "peft", "numpy", "pydantic", "rich", "huggingface_hub"}
