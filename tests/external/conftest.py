"""Pipelines whose training and serving happen in environments without emloc-tools, once per session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.external.environments import NAMES, REMEDY, Environment
from tests.external.workshop import FAMILIES, FOREIGN, Case, make_case, run_in_both, train_script, without_one_tensor

Results = dict[str, Any]


@pytest.fixture(scope="session")
def environments() -> tuple[str, ...]:
    """The environments' names; missing or stale ones fail every test that needs them."""
    for environment in map(Environment, NAMES):
        if not environment.is_current():
            pytest.fail(f"{environment.folder.name} is missing or not current: {REMEDY}", pytrace=False)
    return NAMES


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A base and its emulators for every family."""
    root = tmp_path_factory.mktemp("external")
    return {family: make_case(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def outputs(environments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each environment's results."""
    return {name: tmp_path_factory.mktemp(name) for name in environments}


@pytest.fixture(scope="session")
def trained(cases: dict[str, Case], outputs: dict[str, Path]) -> dict[str, Results]:
    """What each environment did with the emulators."""
    script = train_script(next(iter(outputs.values())).parent)
    jobs = [case.job() for case in cases.values()]
    common = {"foreign": FOREIGN, "train_script": str(script), "cases": jobs}
    run_in_both("load_and_train", {name: {**common, "output": str(path)} for name, path in outputs.items()})
    return {name: json.loads((path / "results.json").read_text()) for name, path in outputs.items()}


@pytest.fixture(scope="session")
def served(trained: dict[str, Results], cases: dict[str, Case], outputs: dict[str, Path]) -> dict[str, Results]:
    """What each environment did with the adapters that it trained, after they were corrected here without clamp."""
    from emloc_tools.stages.correct import correct

    jobs: dict[str, dict[str, Any]] = {}
    for name, output in outputs.items():
        jobs[name] = {"output": str(output), "cases": []}
        for case in cases.values():
            adapter, corrected = output / case.name / "adapter", output / case.name / "corrected"
            if "error" not in trained[name]["cases"][case.name]:
                correct(emulator=case.emulator, adapter=adapter, base=str(case.base), output=corrected, clamp=None)
                incomplete = without_one_tensor(corrected, output / case.name / "incomplete")
                adapters = {"corrected": str(corrected), "incomplete": str(incomplete)}
                jobs[name]["cases"].append({**case.job(), **adapters})
    run_in_both("use_corrected", jobs)
    return {name: json.loads((path / "corrected.json").read_text()) for name, path in outputs.items()}


@pytest.fixture(params=NAMES)
def environment(request: pytest.FixtureRequest) -> str:
    """One environment's name."""
    return str(request.param)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    """One family's base and emulators."""
    return cases[request.param]


@pytest.fixture
def output(environment: str, outputs: dict[str, Path]) -> Path:
    """The folder of one environment's results."""
    return outputs[environment]


@pytest.fixture
def training(trained: dict[str, Results], environment: str, case: Case) -> Results:
    """What one environment did with one family's emulators."""
    return _without_error(trained[environment]["cases"][case.name])


@pytest.fixture
def serving(served: dict[str, Results], environment: str, case: Case) -> Results:
    """What one environment did with one family's corrected adapter."""
    return _without_error(served[environment].get(case.name, {"error": "its training failed"}))


def _without_error(result: Results) -> Results:
    if "error" in result:
        pytest.fail(result["error"], pytrace=False)
    return result
