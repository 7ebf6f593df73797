"""Quantised weights are what the papers say, the same in a shard as in the whole.

`F.linear` trains through them.
"""

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from src.models.quantize import KINDS, Quantized, dense, quantized, stored_bytes
from src.parallel.layers import ColumnParallelLinear, RowParallelLinear

# QLoRA (arXiv 2305.14314), appendix E
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)  # fmt: skip
LEVELS = {"nf4": NF4, "int8": (np.arange(-127, 128) / 127).astype(np.float32)}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype)


def by_hand(weight: torch.Tensor, kind: str) -> tuple[np.ndarray, torch.Tensor]:
    """Each value as its block's nearest level times the block's largest magnitude.

    And how far apart the levels are.
    """
    values, scales = weight.float().numpy(), np.empty(weight.shape, dtype=np.float32)
    for start in range(0, values.shape[-1], 64):
        block = slice(start, start + 64)
        scales[..., block] = np.abs(values[..., block]).max(axis=-1, keepdims=True)
    distances = np.abs((values / scales)[..., None] - LEVELS[kind])  # [*weight, levels]
    nearest = distances.argmin(axis=-1)
    return LEVELS[kind][nearest] * scales, torch.from_numpy(scales * np.diff(LEVELS[kind]).max())


@pytest.mark.parametrize("shape", [(48, 128), (16, 100), (1, 64), (7, 33), (3, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_nearest_levels_of_each_block(kind, dtype, shape):
    weight = draw(*shape, dtype=dtype)
    ours = dense(quantized(weight, kind))
    assert (ours.shape, ours.dtype) == (weight.shape, dtype)
    values, step = by_hand(weight, kind)
    reference = torch.from_numpy(values).to(dtype)
    if kind == "nf4":
        assert torch.equal(ours, reference)
    else:  # bitsandbytes finds int8's nearest level to within 0.002 of a step
        assert ((ours - reference).abs() <= 1.01 * step + 0.01 * reference.abs()).all()
        equal = torch.isclose(ours, reference, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
        assert equal.float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_is_the_whole_quantised_values(kind):
    weight = draw(32, 256)
    whole = dense(quantized(weight, kind))
    for degree in (2, 4):
        for dim in (0, 1):
            shards = [dense(quantized(shard, kind)) for shard in weight.chunk(degree, dim)]
            assert torch.equal(torch.cat(shards, dim), whole)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_its_gradient(kind, dtype, recomputed):
    weight, target = quantized(draw(24, 160), kind), draw(5, 24, dtype=dtype)
    x, x_too = (draw(5, 160, dtype=dtype).requires_grad_() for _ in range(2))
    bias, bias_too = (draw(24, dtype=dtype).requires_grad_() for _ in range(2))

    def layer(x):
        return F.silu(F.linear(x, weight, bias))

    y = checkpoint(layer, x, use_reentrant=False) if recomputed else layer(x)
    reference = F.silu(F.linear(x_too, dense(weight).to(dtype), bias_too))
    (y * target).sum().backward()
    (reference * target).sum().backward()
    assert torch.equal(y, reference) and y.dtype == dtype
    torch.testing.assert_close(x.grad, x_too.grad)
    torch.testing.assert_close(bias.grad, bias_too.grad)
    assert x.grad.abs().sum() > 0 and weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantised_copy_waits_for_backward(kind):
    weight, x, saved = quantized(draw(72, 448), kind), draw(5, 448).requires_grad_(), []

    def save(tensor):
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = F.linear(x * 2, weight)
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    kept = [t for t in tensors if t.shape == weight.shape and t.is_floating_point()]
    assert y.requires_grad and not kept and weight.shape not in saved


@pytest.mark.parametrize("kind,bytes_each", [("nf4", 0.5 + 4 / 64), ("int8", 1 + 4 / 64)])
def test_bytes(kind, bytes_each):
    weight = draw(16, 128, dtype=torch.bfloat16)
    assert stored_bytes(quantized(weight, kind)) == weight.numel() * bytes_each
    assert stored_bytes(weight) == weight.numel() * 2 and dense(weight) is weight


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_of_a_stack(kind):
    stack, x = draw(3, 8, 96), draw(5, 96)
    weight = quantized(stack, kind)
    for expert, each in enumerate(weight):
        assert torch.equal(dense(weight[expert]), dense(quantized(stack[expert], kind)))
        assert torch.equal(F.linear(x, each), F.linear(x, dense(weight)[expert]))
    assert F.linear(x[:0], weight[0]).shape == (0, 8)


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("kind", KINDS)
def test_in_our_layers(kind, layer):
    module, x = layer(quantized(draw(16, 128), kind)), draw(5, 128)
    assert torch.equal(module(x), F.linear(x, dense(module.weight)))
    assert type(module.weight.new_empty(2, 3)) is torch.Tensor
    twin = copy.deepcopy(module).to(torch.bfloat16)
    assert isinstance(twin.weight, Quantized) and isinstance(twin.weight, torch.nn.Parameter)
    assert twin.weight.dtype == torch.bfloat16 and module.weight.dtype == torch.float32
    assert not twin.weight.requires_grad
    assert stored_bytes(twin.weight) == stored_bytes(module.weight)
    assert torch.equal(dense(twin.weight), dense(module.weight).bfloat16())


def test_refusals():
    with pytest.raises(ValueError, match="int4"):
        quantized(draw(8, 64), "int4")
    with pytest.raises(NotImplementedError, match="dense"):
        quantized(draw(8, 64), "nf4") + 1
