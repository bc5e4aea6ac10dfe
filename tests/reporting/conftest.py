"""The report of the finished pico run, read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_tools.reporting.collecting import Report, collect
from tests.conftest import Run


@pytest.fixture(scope="session")
def run_folder(run: Run) -> Path:
    """The folder that holds the run's folders."""
    return run.base.parent


@pytest.fixture(scope="session")
def collected(run_folder: Path) -> Report:
    """Everything in the run's folder."""
    return collect([run_folder])
