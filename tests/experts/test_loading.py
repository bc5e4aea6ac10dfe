"""How emulators with factored experts are loaded: by which implementations they run, and by what they are refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from emloc_tools.stages.build_emulator import build_emulator
from tests.experts.conftest import RATIO, Case
from tests.experts.emulators import densify, logits
from tests.experts.families import FAMILIES
from tests.stages.reference import close_to, read_json


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_it_follows_the_installed_experts_implementations(
    built: tuple[Case, Path], implementation: str, tmp_path: Path
) -> None:
    case, folder = built
    auto = transformers.AutoModelForCausalLM
    options = {"dtype": torch.bfloat16, "experts_implementation": implementation}
    model = auto.from_pretrained(folder, trust_remote_code=True, **options)
    assert model.config._experts_implementation == implementation
    expected = densify(case, folder)
    assert close_to(logits(model, case), logits(expected, case)) < 0.1  # bfloat16, and a token routed otherwise


@pytest.mark.parametrize(("rank", "grouped"), [(8, True), (9, False)])
def test_grouped_products_run_where_their_shapes_allow_it(
    case_of: Callable[[str], Case], rank: int, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls = case_of("mixtral"), []
    product_of = torch.nn.functional.grouped_mm

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return product_of(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counting)
    ranks = {stack: rank for stack in case.W if ".1." in stack}  # the first block's experts stay dense
    build_emulator(base=str(case.base), ranks=ranks, output=tmp_path / "emulator", dtype="bfloat16")
    auto, options = transformers.AutoModelForCausalLM, {"dtype": torch.bfloat16, "trust_remote_code": True}
    found = {}
    for implementation in ("grouped_mm", "eager"):
        model = auto.from_pretrained(tmp_path / "emulator", experts_implementation=implementation, **options)
        experts = model.model.layers[1].mlp.experts
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_(True)
        routed = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1], [2, 1], [1, 0]])  # expert 3 has no token
        calls.clear()
        y = experts(x, routed, torch.full((6, 2), 0.5))
        assert len(calls) == (4 if grouped and implementation == "grouped_mm" else 0)
        y.float().square().sum().backward()
        found[implementation] = y.detach(), x.grad
    for one, other in zip(*found.values(), strict=True):
        assert close_to(one, other) < 0.02  # of bfloat16
    assert float(found["eager"][1].norm()) > 0


def test_a_stock_class_does_not_load_it(built: tuple[Case, Path], tmp_path: Path) -> None:
    case, _ = built
    build_emulator(base=str(case.base), ratio=RATIO, targets=r"mlp\.experts", output=tmp_path / "experts")
    assert read_json(tmp_path / "experts" / "emulator.json")["layers"] == {}
    for folder in (built[1], tmp_path / "experts"):
        with pytest.raises(RuntimeError, match="mismatch"):
            getattr(transformers, FAMILIES[case.family].cls).from_pretrained(folder)


def test_transformers_4_is_refused_with_a_line_that_says_so(
    built: tuple[Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder = built
    build_emulator(base=str(case.base), ratio=RATIO, targets="q_proj|q_b_proj", output=tmp_path / "dense")
    dense = shutil.copytree(tmp_path / "dense", tmp_path / "copy")  # another name, so that its code is loaded anew
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, trust_remote_code=True)
    module = sys.modules[type(loaded).__module__]
    monkeypatch.setattr(module.transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"as transformers 5 does, and this is transformers 4\.57\.6"):
        type(loaded)(loaded.config)
    # Dense experts have the names of transformers 5 too, unless the checkpoint holds them fused.
    text = (dense / "modeling_emloc.py").read_text()
    assert ("        require_transformers_5()\n" in text) == (not FAMILIES[case.family].fused_on_disk)
