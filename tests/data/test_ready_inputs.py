"""Ready model inputs pass as they are, after a check against the model's vocabulary and positions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emloc_tools.data.batches import Batch, count_samples, count_tokens, load_batches
from emloc_tools.errors import InputError
from emloc_tools.models.source import Source, open_source
from tests import pico

POSITIONS = pico.LLAMA["max_position_embeddings"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A Llama of 128 positions and 260 tokens."""
    folder = tmp_path_factory.mktemp("model")
    pico.save_model(folder)
    return open_source(str(folder))


def load(path: Path, source: Source, *, samples: int | None = None, seed: int = 0) -> list[Batch]:
    """`load_batches` with the options that ready inputs do not heed left at fixed values."""
    return load_batches(path, source, samples=samples, max_length=None, batch_size=1, seed=seed)


def ready(path: Path, **tensors: torch.Tensor) -> Path:
    """A file of ready inputs; `a_b__0` stands for the name `0/a_b`."""
    save_file({"/".join(reversed(name.split("__"))): tensor for name, tensor in tensors.items()}, path)
    return path


def test_ready_inputs_are_passed_on_as_they_are(source: Source, tmp_path: Path) -> None:
    values = {
        f"pixel_values__{n}": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 2, 10)
    }
    path = ready(tmp_path / "data.safetensors", **values, flag__10=torch.tensor(True))
    batches = load(path, source)
    assert [sorted(batch.inputs) for batch in batches] == [["pixel_values"], ["pixel_values"], ["flag", "pixel_values"]]
    for batch, tensor in zip(batches, values.values(), strict=True):
        assert torch.equal(batch.inputs["pixel_values"], tensor)
        assert batch.mask is None
        assert batch.targets is None
    assert (count_samples(batches), count_tokens(batches)) == (6, 6)
    chosen = load(path, source, samples=2, seed=1)
    places = sorted(random.Random(1).sample(range(3), 2))
    for batch, place in zip(chosen, places, strict=True):
        assert torch.equal(batch.inputs["pixel_values"], batches[place].inputs["pixel_values"])


def test_the_padding_of_ready_inputs_is_their_attention_mask(source: Source, tmp_path: Path) -> None:
    tokens, mask = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    path = ready(
        tmp_path / "data.safetensors",
        input_ids__0=tokens,
        attention_mask__0=mask,
        input_ids__1=tokens.clone(),
        attention_mask__1=torch.ones_like(mask),
        pixel_values__1=torch.zeros(7, 2),
    )
    first, second = load(path, source)
    assert first.mask is not None
    assert torch.equal(first.mask, mask.bool())
    assert second.mask is None
    assert (count_samples([first]), count_tokens([first])) == (2, 5)
    assert (count_samples([second]), count_tokens([second])) == (2, 6)  # not the seven patches


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, "the tensor 'input_ids' is not named <n>/<argument>"),
        ({"input_ids__00": torch.zeros(1, 2, dtype=torch.long)}, "the tensor '00/input_ids' is not named"),
        (
            {"input_ids__3": torch.tensor([[5, 260]])},
            r"3/input_ids: token 260 is outside the model's vocabulary of 260",
        ),
        ({"input_ids__3": torch.tensor([[-1, 5]])}, r"3/input_ids: token -1 is outside the model's vocabulary of 260"),
        ({"input_ids__3": torch.tensor([5, 6])}, r"3/input_ids: torch\.int64 \[2\] found, expected integers"),
        ({"input_ids__3": torch.ones(1, 2)}, r"3/input_ids: torch\.float32 \[1, 2\] found, expected integers"),
        ({"input_ids__3": torch.ones(1, 0, dtype=torch.long)}, "3/input_ids: .* found, expected integers"),
        (
            {"input_ids__3": torch.ones(1, POSITIONS + 1, dtype=torch.long)},
            f"3/input_ids: {POSITIONS + 1} tokens long, but the model has {POSITIONS} positions",
        ),
        (
            {
                "input_ids__3": torch.ones(2, 4, dtype=torch.long),
                "attention_mask__3": torch.ones(2, 5, dtype=torch.long),
            },
            r"3/input_ids: \[2, 4\] tokens, but the attention_mask has shape \[2, 5\]",
        ),
    ],
)
def test_bad_ready_inputs_are_refused_with_file_and_tensor(
    tensors: dict[str, torch.Tensor], message: str, source: Source, tmp_path: Path
) -> None:
    path = ready(tmp_path / "data.safetensors", **tensors)
    with pytest.raises(InputError, match=rf"data\.safetensors: {message}"):
        load(path, source)


def test_ready_inputs_up_to_the_limits_are_taken(source: Source, tmp_path: Path) -> None:
    tokens = torch.full((1, POSITIONS), pico.VOCABULARY - 1)
    (batch,) = load(ready(tmp_path / "data.safetensors", input_ids__0=tokens), source)
    assert torch.equal(batch.inputs["input_ids"], tokens)


def test_a_damaged_or_empty_file_of_ready_inputs_is_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match=r"data\.safetensors.*expected model inputs named <n>/<argument>"):
        load(path, source)
    save_file({}, path)
    with pytest.raises(InputError, match=r"data\.safetensors holds no tensor"):
        load(path, source)
