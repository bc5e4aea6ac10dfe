"""Emulators of InternVL2.5-38B have the ranks and sizes that arithmetic gives, and planning them takes no memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
RATIOS = ("0.1", "0.25", "0.5")
BF16 = 2  # bytes
# Rows and columns of the published weights: (out, in) and how many of them a block has.
TOWER = [((3200, 3200), 4), ((12800, 3200), 1), ((3200, 12800), 1)]  # q, k, v and output; the MLP
LANGUAGE = [((5120, 5120), 2), ((1024, 5120), 2), ((27648, 5120), 2), ((5120, 27648), 1)]  # q, o; k, v; gate, up; down
LINEARS = [(shape, 45 * count) for shape, count in TOWER] + [(shape, 64 * count) for shape, count in LANGUAGE]


@pytest.fixture(scope="module")
def found() -> Any:
    """What the package says, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.models.vision_shapes", *RATIOS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def parameters() -> int:
    """All parameters of the model by its published sizes."""
    tower_block = 4 * 3200**2 + 3200 + 2 * 3200 * 12800 + 12800 + 3200  # biases of the output and of the MLP
    tower_block += 6 * 3200  # norms of the block, of queries and of keys, and the two layer scales
    tower = 45 * tower_block + 3200 + 1025 * 3200 + (3 * 14 * 14 + 1) * 3200  # class token, positions, patches
    projector = 2 * 12800 + (12800 + 1) * 5120 + (5120 + 1) * 5120
    block = 2 * 5120**2 + 5120 + 2 * (1024 * 5120 + 1024) + 3 * 5120 * 27648 + 2 * 5120
    return tower + projector + 64 * block + 5120 + 2 * 151674 * 5120  # last norm, embeddings and head


def rank(shape: tuple[int, int], ratio: str) -> int:
    """The paper's rank, exactly."""
    rows, columns = shape
    return int(Fraction(ratio) * rows * columns / (rows + columns))


def emulator_bytes(ratio: str) -> int:
    """Factors of all linear layers of the blocks, and everything else as it is."""
    replaced = sum(count * rows * columns for (rows, columns), count in LINEARS)
    factors = sum(count * rank(shape, ratio) * (sum(shape) + 1) for shape, count in LINEARS)
    return BF16 * (parameters() - replaced + factors)


def test_the_model_has_its_published_size(found: Any) -> None:
    assert found["parameters"] == parameters()
    assert round(parameters() / 1e9, 1) == 38.4


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_layer_of_tower_and_language_model_gets_the_rank_of_the_ratio(ratio: str, found: Any) -> None:
    ranks = found["emulators"][ratio]["ranks"]
    assert sorted(ranks.values()) == sorted(rank(shape, ratio) for shape, count in LINEARS for _ in range(count))
    language, tower = "model.language_model.layers", "model.vision_tower.encoder.layer"
    for name, shape in {
        f"{tower}.44.attention.q_proj": (3200, 3200),
        f"{tower}.0.mlp.fc2": (3200, 12800),
        f"{language}.63.self_attn.v_proj": (1024, 5120),
        f"{language}.0.mlp.gate_proj": (27648, 5120),
    }.items():
        assert ranks[name] == rank(shape, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_emulator_has_the_bytes_of_its_ranks_and_size_finds_them(ratio: str, found: Any) -> None:
    emulator = found["emulators"][ratio]
    assert emulator["bytes"] == emulator_bytes(ratio)
    assert emulator["fits"]
    assert not emulator["fits in less"]


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_page_names_these_sizes(ratio: str) -> None:
    page = (ROOT / "docs" / "vision-language.md").read_text(encoding="utf-8")
    down_proj, fc1 = rank((5120, 27648), ratio), rank((12800, 3200), ratio)
    assert f"| {ratio} | {emulator_bytes(ratio) / 1e9:.1f} GB | {down_proj} | {fc1} |" in page


def test_nothing_is_allocated_on_the_way(found: Any) -> None:
    """The process, its code included, stays below the size of one of the model's 109 blocks."""
    assert found["on meta"]
    block = BF16 * (2 * 5120**2 + 2 * 1024 * 5120 + 3 * 5120 * 27648)
    assert found["peak bytes"] < block
