"""An output is never put where an input lies, however the input is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emloc_tools.errors import InputError
from emloc_tools.stages.merge import merge
from emloc_tools.stages.refusals import require_apart
from tests.conftest import Run
from tests.stages.reference import contents


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, with a model in it; the working folder is another one."""
    (tmp_path / "home" / "models" / "base").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize("output", ["models/base", "models", "."])
def test_an_input_in_the_home_is_found(home: Path, output: str) -> None:
    with pytest.raises(InputError, match=r"would replace the input ~/models/base"):
        require_apart(home / output, [Path("~/models/base")])


@pytest.mark.parametrize("output", ["models/other", "models/base/inside", "~"])
def test_an_output_beside_or_inside_the_input_is_allowed(home: Path, output: str) -> None:
    require_apart(home / output, [Path("~/models/base")])


def test_an_input_whose_name_begins_with_a_tilde_is_found_as_it_stands(home: Path) -> None:
    for name in ("~nobody-of-this-name.jsonl", "~"):
        Path(name).write_text("{}\n")
        with pytest.raises(InputError, match=r"would replace the input"):
            require_apart(Path.cwd(), [Path(name)])
        Path(name).unlink()
        require_apart(Path.cwd(), [Path(name)])


def test_a_link_to_an_input_is_found(home: Path) -> None:
    Path("link").symlink_to(home / "models")
    with pytest.raises(InputError, match=r"would replace the input link/base"):
        require_apart(home / "models", [Path("link/base")])


def test_a_base_in_the_home_is_not_deleted_by_overwrite(home: Path, run: Run) -> None:
    """A merged model can be the base of the next merge, and then be asked to make room for it."""
    base = home / "models" / "base"
    base.rmdir()
    shutil.copytree(run.base, base)
    (base / "emloc-merge.json").write_text("{}")  # what says that it may be replaced
    before = contents(base)
    with pytest.raises(InputError, match=r"would replace the input ~/models/base"):
        merge(base="~/models/base", adapter=run.corrected, output=base, overwrite=True)
    assert contents(base) == before
