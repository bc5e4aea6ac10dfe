"""Help texts: summaries that fit, examples that parse, every option, the stages' defaults, and no heavy import."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from typing import Any

import click
import pytest

from emloc_tools.cli import help as grouped
from emloc_tools.cli import main
from emloc_tools.cli.group import SECTIONS
from emloc_tools.cli.help import COLUMN, GROUP_OF, GROUPS, LAST, GroupedCommand
from tests.cli.conftest import Invoke

COMMANDS = list(main.commands)
HEAVY = {"torch", "transformers", "peft", "rich", "numpy", "pydantic", "safetensors", "huggingface_hub"}
STAGES = [name for name in COMMANDS if name != "demo"]  # the demo's stage is a program of its own


def options_of(name: str) -> list[click.Option]:
    """The options of a command."""
    return [parameter for parameter in main.commands[name].params if isinstance(parameter, click.Option)]


def stage_of(name: str) -> Any:
    """The stage function of a command."""
    module = name.replace("-", "_")
    return getattr(importlib.import_module(f"emloc_tools.stages.{module}"), module)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_summary_every_option_and_an_example(name: str, invoke: Invoke) -> None:
    printed = invoke(name, "--help")
    assert printed.status == 0
    command = main.commands[name]
    summary = command.get_short_help_str(limit=200)
    assert summary
    assert summary[0].isupper()
    assert summary.endswith(".")
    for option in options_of(name):
        assert option.help, option.name
        assert all(spelling in printed.stdout for spelling in option.opts)
    assert f"  emloc-tools {name} " in printed.stdout.partition("Example")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_valid_command_lines_and_fit_in_80_columns(name: str) -> None:
    epilog = main.commands[name].epilog or ""
    lines = epilog.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in lines if line.strip().startswith("emloc-tools ")]
    assert examples
    for program, command, *arguments in examples:
        assert (program, command) == ("emloc-tools", name)
        main.commands[name].make_context(name, arguments)  # raises for an unknown or missing option
    assert max(map(len, epilog.splitlines())) <= 80


@pytest.mark.parametrize("columns", [80, 110])
def test_the_list_of_commands_is_in_order_of_work_and_not_cut(invoke: Invoke, columns: int) -> None:
    text = invoke("--help", columns=columns).stdout
    sections = text.partition("  -h, --help")[2].split("\n\n")[1:]
    assert [section.partition(":")[0] for section in sections] == list(SECTIONS)
    listed = [line for section in sections for line in section.splitlines()[1:]]
    assert [line.split()[0] for line in listed] == COMMANDS
    assert len({re.match(r"  \S+ +", line).end() for line in listed}) == 1  # all summaries begin in one column
    assert "..." not in "".join(listed)
    assert max(map(len, listed)) <= 80


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=str)
@pytest.mark.parametrize("columns", [80, 110])
def test_help_keeps_to_the_width(arguments: list[str], columns: int, invoke: Invoke) -> None:
    assert max(map(len, invoke(*arguments, "--help", columns=columns).stdout.splitlines())) <= columns


@pytest.mark.parametrize("name", STAGES)
def test_options_and_stage_parameters_correspond(name: str) -> None:
    stage = set(inspect.signature(stage_of(name)).parameters) - {"command", "progress"}
    command = {parameter.name for parameter in main.commands[name].params} - {"as_json", "quiet"}
    only_python = {"build-emulator": {"ranks"}}  # a rank per layer is no option
    only_shell = {"correct": {"dry_run"}, "build-emulator": {"preset", "from_plan"}}  # output=None; these set others
    assert stage - command == only_python.get(name, set())
    assert command - stage == only_shell.get(name, set())


@pytest.mark.parametrize("name", STAGES)
def test_options_and_stage_parameters_have_the_same_defaults(name: str) -> None:
    parameters = inspect.signature(stage_of(name)).parameters
    defaults = main.commands[name].make_context(name, [], resilient_parsing=True).params
    compared = []
    for option in options_of(name):
        if option.name not in parameters or option.required or option.name == "output":
            continue
        if (name, option.name) == ("build-emulator", "base"):  # --from-plan can take its place
            continue
        default = defaults[option.name]
        if option.name == "clamp":
            default = float(default)
        assert default == parameters[option.name].default, option.name
        compared.append(option.name)
    assert len(compared) >= (0 if name == "inspect" else 2)


@pytest.mark.parametrize("arguments", [["--help"], ["calibrate", "--help"], ["--version"], ["correct"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from emloc_tools.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    imported = set(json.loads(finished.stdout.splitlines()[-1]))
    assert {"click", "emloc_tools"} <= imported
    assert not imported & HEAVY


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_group_of_its_kind_and_once(name: str, invoke: Invoke) -> None:
    assert isinstance(main.commands[name], GroupedCommand), "make it with emloc_tools.cli.help.command"
    text = invoke(name, "--help", columns=100).stdout
    found: dict[str, list[str]] = {}
    for line in text.partition("Example")[0].splitlines():
        if re.fullmatch(r"[A-Z][\w ]*:", line):
            found[line[:-1]] = []
        elif found and (match := re.match(r"  (--[\w-]+|-h)\b", line)):
            found[list(found)[-1]].append(match[1])
    assert list(found) == [group for group in GROUPS if group in found]  # everywhere in the same order
    shown = [option for options in found.values() for option in options]
    assert sorted(shown) == sorted(["-h", *(option.opts[0] for option in options_of(name))])
    assert found[LAST][-3:] == ["--json", "--quiet", "-h"]
    for group, option in (
        ("Base", "--base"),
        ("Samples", "--data"),
        ("Layers", "--targets"),
        ("Computation", "--device"),
    ):
        assert (option in shown) == (option in found.get(group, []))
    beginnings = {match.end() for line in text.splitlines() if (match := re.match(r"  -.{1,24}?  +(?=\S)", line))}
    assert beginnings == {2 + COLUMN + 2}  # all texts begin in one column


def test_a_command_by_itself_has_the_same_names_for_its_help(invoke: Invoke) -> None:
    """click keeps the help option that was asked for first, whatever context asked."""
    by_itself = grouped.command()(lambda: None)
    assert by_itself.get_help_option(click.Context(by_itself)).opts == ["-h", "--help"]


def test_groups_name_only_options_that_some_command_has() -> None:
    names = {parameter.name for command in main.commands.values() for parameter in command.params}
    assert set(GROUP_OF) <= names


@pytest.mark.parametrize("name", COMMANDS)
def test_no_help_speaks_of_clicks_types(name: str, invoke: Invoke) -> None:
    assert not re.search(r"INTEGER|FLOAT|RANGE|x>=", invoke(name, "--help").stdout)
