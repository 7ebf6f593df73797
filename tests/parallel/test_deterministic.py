"""`--deterministic`: what a row gives does not depend on the rows beside it."""

import os

import pytest
import torch
import torch.nn.functional as F

from src.errors import UserError
from src.models.batch import Batch, Sequence, response_logprobs, response_loss
from src.models.config import ModelConfig
from src.models.transformer import build
from src.parallel import deterministic, shared_memory
from src.parallel.layers import linear, packed_weights
from src.parallel.setup import start, stop
from src.parallel.vocab import row_sums

COUNTS = (1, 2, 5, 15, 16, 17, 40)


@pytest.fixture
def on(monkeypatch):
    """A run with --deterministic."""
    monkeypatch.setenv(deterministic.WORKSPACE, "")
    monkeypatch.delenv(deterministic.WORKSPACE)
    parallel = start(1, deterministic=True)
    torch.set_num_threads(1)
    yield parallel
    stop()
    assert not deterministic.is_on() and not torch.are_deterministic_algorithms_enabled()


def by_the_number_of_rows(x, weight, bias=None):
    """A product like a library's, which computes otherwise where there are other rows."""
    out = x @ weight.t() * (1 + len(x) / 1024)
    return out if bias is None else out + bias


def rows_alike(function, x: torch.Tensor) -> bool:
    whole = function(x)
    return all(torch.equal(function(x[:n]), whole[:n]) for n in COUNTS)


def test_products_and_sums_by_tiles_do_not_depend_on_the_number_of_rows(on, monkeypatch):
    x, weight = torch.randn(40, 24), torch.randn(8, 24)
    monkeypatch.setattr(F, "linear", by_the_number_of_rows)
    monkeypatch.setattr(torch.Tensor, "sum", lambda x, dim: x.mean(dim) * len(x))
    for function in (lambda x: linear(x, weight, weight[:, 0]), row_sums):
        assert rows_alike(function, x)
        assert rows_alike(function, x.t().contiguous().t())  # not contiguous
        assert function(x[:0]).shape[:1] == (0,)
        with monkeypatch.context() as off:
            off.setattr(deterministic, "_tile_rows", None)
            assert not rows_alike(function, x)


def test_on_the_cpu_too_rows_are_alike_to_the_bit(on):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(40, 512).to(dtype), torch.randn(96, 512).to(dtype)
        assert rows_alike(lambda x, weight=weight: linear(x, weight), x)


def model_of(dtype: torch.dtype, n_experts: int = 0):
    experts = dict(n_experts=n_experts, experts_per_token=2 if n_experts else 0)
    config = ModelConfig(64, 2, 4, 2, 16, 96, 50, max_seq_len=64, **experts)
    model = build(config, 0, 1, dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_experts", [0, 4])
def test_a_sequence_s_numbers_do_not_depend_on_its_neighbours(on, n_experts, dtype):
    model, draw = model_of(dtype, n_experts), torch.Generator().manual_seed(1)
    sequences = [
        Sequence(torch.randint(3, 50, (n,), generator=draw).tolist(), 1) for n in (3, 2, 30, 7)
    ]
    together = Batch.of(sequences, on.device)
    with torch.no_grad():
        logprobs, entropies = (
            x.split(together.responses) for x in response_logprobs(model, together)
        )
        for i, sequence in enumerate(sequences):
            alone = response_logprobs(model, Batch.of([sequence], on.device))
            assert torch.equal(alone[0], logprobs[i]) and torch.equal(alone[1], entropies[i])
        with packed_weights(model, on):
            whole = response_logprobs(model, together)[0].split(together.responses)
            one = response_logprobs(model, Batch.of(sequences[:1], on.device))[0]
            assert torch.equal(one, whole[0])
    # and in training they are the same bits: the first ratio stays 1
    seen = []
    response_loss(model, together, lambda x, *_: seen.append(x.detach()) or -x.sum())
    assert torch.equal(torch.cat(seen), torch.cat(logprobs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_one_product(on, dtype):
    x = torch.randn(40, 24).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((8, 24), (8,)))
    grad = torch.randn(40, 8).to(dtype)
    ours = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), grad)
    theirs = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
    frozen = torch.autograd.grad(linear(x, weight.detach()), x, grad)[0]  # as under an adapter
    assert torch.allclose(frozen, theirs[0], rtol=1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_ranks_are_added_in_their_order(on, monkeypatch):
    parts = torch.tensor([[1e8], [1.0], [-1e8]])  # 0 in the order of ranks, 1 in another
    monkeypatch.setattr(shared_memory, "gathered", lambda x, group: parts)
    x = torch.zeros(1)
    assert float(shared_memory.summed(x, on.mp_group)) == 0.0
    shared_memory.all_reduce(x, on.mp_group)
    assert float(x) == 0.0
    parts = parts[[0, 2, 1]]
    assert float(shared_memory.summed(x, on.mp_group)) == 1.0


def test_what_is_set_before_cuda_starts(on):
    assert os.environ[deterministic.WORKSPACE] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with deterministic.known_order():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


def test_another_workspace_is_refused(monkeypatch):
    monkeypatch.setenv(deterministic.WORKSPACE, ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        start(1, deterministic=True)
    assert not deterministic.is_on()
