"""The journeys that the matrix's tests look at, one per family."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.architectures.catalogue import BY_NAME, HERE
from tests.architectures.journey import Journey
from tests.architectures.measures import Measures


@pytest.fixture(scope="module", params=HERE)
def measures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measures:
    """What is measured of a family, which takes its journey as far as a test asks."""
    transformers.logging.set_verbosity_error()  # it reports every head that a class makes anew
    root: Path = tmp_path_factory.mktemp("family")
    return Measures(Journey(BY_NAME[request.param], root))
