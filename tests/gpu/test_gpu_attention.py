"""Attention of packed sequences on the device in bf16, forward and backward."""

import pytest
import torch

from src.models.attention import Packed
from tests.gpu.models import CPU, apart

LENGTHS = {False: [33, 1, 150], True: [40, 7, 130]}  # with a prompt that others go on from, or not
PREFIXES = {False: None, True: [None, 0, 0]}


@pytest.mark.parametrize("has_prefix", (False, True))
@pytest.mark.parametrize("window", (0, 5, 16))
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", ((4, 4, 64), (8, 2, 128), (7, 1, 64), (4, 2, 80), (4, 4, 12))
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))
def test_packed_attention(device, dtype, heads, kv_heads, head_dim, window, has_prefix):
    lengths, prefixes = LENGTHS[has_prefix], PREFIXES[has_prefix]
    generator = torch.Generator().manual_seed(1)
    # rounded for both sides
    q, k, v, up = (
        torch.randn(sum(lengths), n, head_dim, generator=generator).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def result(where, dtype):
        inputs = [x.to(where, dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = Packed(lengths, where, prefixes).attend(0, *inputs, window)
        out.backward(up.to(where, dtype))
        return [out, *(x.grad for x in inputs)]

    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, wanted in zip(result(device, dtype), result(CPU, torch.float32), strict=True):
        assert apart(ours, wanted) <= limit
