"""src/parallel/vocab.py: log-probabilities and entropies of split logits are torch's on the whole.

Gradients too.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.launch import launch, once

DEGREES = (1, 2, 4)
N, VOCABULARY = 24, 32
TEMPERATURES = (1.0, 0.6, 2.5)


def make_cases() -> dict:
    """The tensors of CASES.safetensors (vocab_worker.py)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cases = {}
    for temperature in TEMPERATURES:
        cases[f"fp32-{temperature}"] = 4 * drawn(N, VOCABULARY), temperature
        cases[f"bf16-{temperature}"] = (4 * drawn(N, VOCABULARY)).bfloat16(), temperature
    # Far from zero: exp overflows unless the whole row's maximum, not a rank's own, is taken off
    # first; most p are 0.
    cases["fp32-large"] = 3000 * drawn(N, VOCABULARY) + 20000, 1.0
    cases["bf16-large"] = (3000 * drawn(N, VOCABULARY) + 20000).bfloat16(), 1.0
    cases["fp32-flat"] = torch.full((N, VOCABULARY), 7.5), 0.5
    # every rank's first and last column is someone's target
    edges = torch.arange(VOCABULARY).repeat(2)[:N] + 8 * (torch.arange(N) % 2)
    tensors = {}
    for case, (logits, temperature) in cases.items():
        targets = torch.arange(N) * 31 % VOCABULARY if "flat" in case else edges % VOCABULARY
        tensors |= {
            f"{case}/logits": logits,
            f"{case}/targets": targets.clone(),
            f"{case}/temperature": torch.tensor(temperature, dtype=torch.float64),
            f"{case}/up": drawn(2, N),
        }
    return tensors


CASES = make_cases()
NAMES = sorted({key.split("/")[0] for key in CASES})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("vocab")
    save_file(CASES, root / "cases.safetensors")

    @once
    def run(n: int) -> dict:
        cases, out = root / "cases.safetensors", root / f"{n}.safetensors"
        launch(n, "tests/parallel/vocab_worker.py", str(cases), str(out))
        return load_file(out)

    return run


@pytest.fixture(scope="module", params=DEGREES)
def result(request, results) -> dict:
    return results(request.param)


def reference(case: str, use: str = "both"):
    """By torch's autograd in fp64 on the whole rows: values [2, N] and the gradient [N, V]."""
    logits, targets, up = (CASES[f"{case}/{field}"] for field in ("logits", "targets", "up"))
    z = logits.double().requires_grad_()
    logs = (z / CASES[f"{case}/temperature"].item()).log_softmax(-1)
    logprobs = logs.gather(1, targets[:, None])[:, 0]
    entropy = -torch.special.xlogy(logs.exp(), logs.exp()).sum(-1)
    # the same quantity without xlogy's infinite derivative at p = 0
    smooth = -(logs.exp() * logs).sum(-1)
    total = (logprobs * up[0] * (use != "entropy") + smooth * up[1] * (use != "logprobs")).sum()
    total.backward()
    return torch.stack((logprobs, entropy)).detach(), z.grad


@pytest.mark.parametrize("case", NAMES)
def test_values(result, case):
    values, _ = reference(case)
    ours = result[f"{case}/both/values"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), values, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("use", ("both", "logprobs", "entropy"))
@pytest.mark.parametrize("case", NAMES)
def test_gradients(result, case, use):
    _, wanted = reference(case, use)
    ours = result[f"{case}/{use}/grad"].double()
    # a bf16 result is off by half a unit in its 8 bits
    rounding = 2.0**-8 if case.startswith("bf16") else 1e-5
    atol = 2e-6 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(ours, wanted, rtol=rounding, atol=atol)


def test_gradient_by_finite_differences(result):
    """In fp64 numpy, with no autograd on either side."""
    case, step = "fp32-0.6", 1e-5
    fields = ("logits", "targets", "up")
    logits, targets, up = (CASES[f"{case}/{field}"].double().numpy() for field in fields)
    rows = np.arange(N)

    def total(z):  # [N, V] → [N]
        z = z / 0.6
        largest = z.max(-1, keepdims=True)
        logs = z - np.log(np.exp(z - largest).sum(-1, keepdims=True)) - largest
        return logs[rows, targets.astype(int)] * up[0] - (np.exp(logs) * logs).sum(-1) * up[1]

    numeric = np.empty_like(logits)
    for column in range(VOCABULARY):
        shift = np.zeros_like(logits)
        shift[:, column] = step
        numeric[:, column] = (total(logits + shift) - total(logits - shift)) / (2 * step)
    np.testing.assert_allclose(result[f"{case}/both/grad"].numpy(), numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", NAMES)
def test_logits_stay_as_they_were_and_the_gradient_has_their_dtype(result, case):
    for use in ("both", "logprobs", "entropy"):
        assert result[f"{case}/{use}/kept"].all()
