"""A layer's place in its model is read off its name, whatever the family calls its blocks."""

from __future__ import annotations

import pytest

from emloc_tools.reporting.kinds import Place, depth_text, grids, places

# Names as the model classes have them, and what a person who knows the models says of them.
LLAMA = [f"model.layers.{n}.{kind}" for n in range(12) for kind in ("self_attn.q_proj", "mlp.down_proj")]
FLUX = [f"transformer_blocks.{n}.{kind}" for n in range(3) for kind in ("attn.to_q", "ff.net.0.proj", "ff.net.2")]
UNET = [
    f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1.to_q" for i in range(2) for j in range(2)
]  # the last number is 0 everywhere
EXPERTS = [f"model.layers.{n}.mlp.experts.down_proj" for n in range(4)]


@pytest.mark.parametrize(
    ("names", "name", "place"),
    [
        (LLAMA, "model.layers.11.mlp.down_proj", Place("model.layers.*", (11,), "mlp.down_proj")),
        (FLUX, "transformer_blocks.2.ff.net.0.proj", Place("transformer_blocks.*", (2,), "ff.net.0.proj")),
        (FLUX, "transformer_blocks.1.ff.net.2", Place("transformer_blocks.*", (1,), "ff.net.2")),
        (
            UNET,
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            Place("down_blocks.*.attentions.*", (1, 0), "transformer_blocks.0.attn1.to_q"),
        ),
        (EXPERTS, "model.layers.3.mlp.experts.down_proj", Place("model.layers.*", (3,), "mlp.experts.down_proj")),
        (["model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj", Place("model.layers.*", (0,), "mlp.up_proj")),
        ([*LLAMA, "x_embedder"], "x_embedder", Place("", (), "x_embedder")),
        (["head.0", "head.1"], "head.1", Place("head.*", (1,), "head.*")),
    ],
)
def test_depth_and_kind_are_those_that_the_model_has(names: list[str], name: str, place: Place) -> None:
    assert places(names)[name] == place


def test_the_first_number_of_a_constant_part_counts_no_depth() -> None:
    """The control: were every number counted, FLUX's feed-forward layers would lie in blocks of their own."""
    assert {place.blocks for place in places(FLUX).values()} == {"transformer_blocks.*"}


def test_a_grid_holds_every_layer_once_in_order_of_depth() -> None:
    (grid,) = grids(reversed(LLAMA))
    assert grid.depths == [(n,) for n in range(12)]  # not 0, 1, 10, 11, 2 …
    assert sorted(grid.names.values()) == sorted(LLAMA)
    assert all(grid.names[(n,), "mlp.down_proj"] == f"model.layers.{n}.mlp.down_proj" for n in range(12))


def test_towers_get_grids_of_their_own() -> None:
    tower = [f"vision.blocks.{n}.attn.qkv" for n in range(2)]
    assert [(grid.blocks, len(grid.depths)) for grid in grids([*LLAMA, *tower])] == [
        ("model.layers.*", 12),
        ("vision.blocks.*", 2),
    ]


def test_depths_are_written_as_they_are_counted() -> None:
    assert [depth_text(depth) for depth in ((3,), (1, 0), ())] == ["3", "1.0", "-"]
