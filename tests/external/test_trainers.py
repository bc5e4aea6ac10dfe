"""Trainers as they are released train emulators by what `trainer-config` writes, and refuse to without trust."""

from __future__ import annotations

import subprocess
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from emloc_tools.stages.correct import correct
from tests.external.environments import REMEDY, TRAINERS, Environment
from tests.external.trainers import STEPS, WAYS, Outcome, train_all
from tests.external.workshop import FOREIGN, INPUT_IDS, Case, factored_layers, make_case

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small Llama and its emulator."""
    if not Environment(TRAINERS).is_current():
        pytest.fail(f"{Environment(TRAINERS).folder.name} is missing or not current: {REMEDY}", pytrace=False)
    return make_case("llama", tmp_path_factory.mktemp("trainers") / "llama")


@pytest.fixture(scope="module")
def trained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What became of every way to train."""
    return train_all(case, tmp_path_factory.mktemp("trusting"), WAYS, trust=True)


@pytest.fixture(scope="module")
def refused(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The same without trust in the emulator's code."""
    return train_all(case, tmp_path_factory.mktemp("untrusting"), WAYS, trust=False)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def outcome(trained: Outcomes, way: str) -> Outcome:
    if trained[way].status:
        pytest.fail(trained[way].log[-3000:], pytrace=False)
    return trained[way]


def test_the_loss_falls(outcome: Outcome) -> None:
    """Every step sees other samples, but the first halves of all of them are alike."""
    assert len(outcome.losses) == STEPS
    assert sum(outcome.losses[-2:]) < sum(outcome.losses[:2])


def test_the_adapter_has_the_tensors_of_one_on_the_base(outcome: Outcome, case: Case) -> None:
    config = peft.LoraConfig.from_pretrained(outcome.adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base)
    expected = peft.get_peft_model_state_dict(peft.get_peft_model(base, config))
    found = load_file(outcome.adapter / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    assert len(found) == 2 * len(factored_layers(case.emulator))


def test_every_layer_learned(outcome: Outcome) -> None:
    for name, tensor in load_file(outcome.adapter / "adapter_model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.count_nonzero() > 0, name  # B starts at 0


def test_corrected_it_computes_on_the_base_what_it_computed_on_the_emulator(
    outcome: Outcome, case: Case, tmp_path: Path
) -> None:
    """Without clamp, (W + s B'' A'') x = (W_E + s B A) x for every x in the row space of the trained A.

    Up to the rounding of what is stored in the LoRA's own dtype, which TRL makes bfloat16 for emulators in 4 bits.
    """
    correct(emulator=case.emulator, adapter=outcome.adapter, base=str(case.base), output=tmp_path / "c", clamp=None)
    trained, corrected = (load_file(path / "adapter_model.safetensors") for path in (outcome.adapter, tmp_path / "c"))
    base, emulator = (load_file(path / "model.safetensors") for path in (case.base, case.emulator))
    for module in factored_layers(case.emulator):
        A, B = (trained[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        A2, B2 = (corrected[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        eps = torch.finfo(A.dtype).eps
        A, B = A.double(), B.double()
        U, S, Vh = (emulator[f"{module}.{factor}"].double() for factor in ("U", "S", "Vh"))
        W, X = base[f"{module}.weight"].double(), torch.linalg.qr(A.T).Q
        expected = (U @ torch.diag(S) @ Vh + 2 * B @ A) @ X  # alpha / r = 2
        # Each of A2 and B2 is off by half an eps of itself; float32 sums add a little to it.
        limit = eps * 2 * B2.abs() @ A2.abs() @ X.abs() + 1e-5 * expected.abs().max()
        assert (((W + 2 * B2 @ A2) @ X - expected).abs() <= limit).all(), module
        uncorrected = ((W + 2 * B @ A) @ X - expected).abs()
        assert uncorrected.max() > (100 if eps < 1e-6 else 5) * limit.max(), "correcting makes no difference here"


def test_corrected_it_loads_on_the_base_and_does_something(outcome: Outcome, case: Case, tmp_path: Path) -> None:
    correct(emulator=case.emulator, adapter=outcome.adapter, base=str(case.base), output=tmp_path / "corrected")
    base = transformers.AutoModelForCausalLM.from_pretrained(case.base).eval()
    with torch.no_grad():
        before = base(torch.tensor(INPUT_IDS)).logits
        model = peft.PeftModel.from_pretrained(base, tmp_path / "corrected")
        after = model.eval()(torch.tensor(INPUT_IDS)).logits
    status = model.load_adapter(tmp_path / "corrected", "again")
    assert (status.missing_keys, status.unexpected_keys) == ([], [])
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_two_processes_share_the_work(trained: Outcomes) -> None:
    assert "processes: 2 (MULTI_CPU)" in trained["ddp"].log


def test_4_bits_are_another_training(trained: Outcomes) -> None:
    """Same data, seed and steps: were the factors as they are in the file, all losses would be the same."""
    four, stored = trained["trl, 4 bits"].losses, trained["trl"].losses
    assert four != stored
    assert four == pytest.approx(stored, rel=0.05)  # on a random model of which half the weights are left anyway


def test_without_trust_nothing_is_trained(refused: Outcomes, way: str) -> None:
    outcome = refused[way]
    assert outcome.status != 0
    assert outcome.losses == []
    assert not (outcome.adapter / "adapter_model.safetensors").exists()
    assert WAYS[way].refusal.search(outcome.log), outcome.log[-2000:]


def test_nothing_of_emloc_tools_is_there() -> None:
    """TRL brings xxhash, which emloc-tools uses, too."""
    names = [name for name in FOREIGN if name != "xxhash"]
    program = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)], u.find_spec('trl') is None)"
    python = str(Environment(TRAINERS).python)
    shown = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["[]", "False"]
