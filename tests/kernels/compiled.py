"""What `test_kernels.py` runs with Triton's compiler: kernels for a GPU that need not be there.

The interpreter takes what the compiler does not: a variable whose type changes in a loop, say.
"""

from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from src.kernels.attention import paged_attention
from src.kernels.codes import product_by_codes
from src.kernels.norm import add_rms_norm, rms_norm
from src.kernels.product import vector_product
from src.kernels.rotation import rotate, rotate_and_write
from src.kernels.swiglu import swiglu
from src.kernels.threshold import threshold

HOPPER, SHARED = 90, 99 * 1024  # bytes of shared memory: a consumer card's
launched = []


class Driver:
    """A GPU that takes kernels and does nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED},
        load_binary=lambda name, *rest: (name, name, 0, 0, 1024),
    )

    def launcher_cls(self, source, metadata):
        return lambda *args: launched.append(metadata.name)

    def get_current_target(self):
        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(Driver())
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bf16", "fp32"))


@pytest.fixture(autouse=True)
def nothing_launched():
    launched.clear()


@DTYPES
@pytest.mark.parametrize("n", (1, 256))
@pytest.mark.parametrize("heads, kv_heads, dim", ((32, 32, 128), (32, 8, 128), (7, 1, 12)))
def test_attention(n, heads, kv_heads, dim, dtype):
    q, table = torch.empty(n, heads, dim, dtype=dtype), torch.empty(n, 64, dtype=torch.int32)
    keys, lengths = torch.empty(2, kv_heads, 16, dim, dtype=dtype), torch.empty(n).long()
    paged_attention(q, keys, keys, table, lengths, window=100 * (n == 1))
    assert launched[0] == "attention_kernel"


@DTYPES
def test_attention_of_the_widest_heads(dtype):
    q, table = torch.empty(256, 8, 256, dtype=dtype), torch.empty(256, 64, dtype=torch.int32)
    for kv_heads in (1, 8):
        keys = torch.empty(2, kv_heads, 16, 256, dtype=dtype)
        paged_attention(q, keys, keys, table, torch.empty(256).long())


@DTYPES
def test_rotation(dtype):
    qkv, rotary = torch.empty(2, 48 * 128, dtype=dtype), torch.empty(2, 64, dtype=torch.complex64)
    keys, table = torch.empty(2, 8, 16, 128, dtype=dtype), torch.empty(2, 64, dtype=torch.int32)
    for norm in (None, torch.empty(128, dtype=dtype)):
        places = ((rotary, rotary), keys, keys, table, torch.empty(2).long())
        rotate_and_write(qkv, *places, 32, 8, norm, norm, 1e-5)
    x = qkv.unflatten(1, (-1, 128))[:, :32].requires_grad_()
    rotate(x, rotary).sum().backward()
    assert launched == 2 * ["rotate_and_write_kernel"] + 2 * ["rotate_kernel"]


@DTYPES
@pytest.mark.parametrize("shape", ((2, 4096), (2, 32, 128)))
def test_norms_and_swiglu(shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight = torch.empty(shape[-1], dtype=dtype, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    swiglu(x).sum().backward()
    add_rms_norm(x[0].detach().view(-1, 128), None, weight[:128], 1e-5)
    assert len(launched) == 5


def test_products_and_thresholds():
    for n in (1, 8):
        x, weight = torch.empty(n, 4096).bfloat16(), torch.empty(64, 4096).bfloat16()
        vector_product(x, weight, weight[:, 0].contiguous())
        vector_product(x, weight, paired=True)
    for n in (1, 64):
        for per_byte in (1, 2):
            codes = torch.empty(64, 4096 // per_byte, dtype=torch.uint8)
            for dtype in (torch.bfloat16, torch.float32):
                product_by_codes(
                    torch.empty(n, 4096, dtype=dtype),
                    codes,
                    torch.empty(64, 64),
                    torch.empty(256, per_byte),
                )
    z = torch.empty(2, 128256)
    for top_k, top_p in ((0, 0.9), (50, 1.0), (50, 0.9)):
        threshold(z, z[:, 0].contiguous(), top_k, top_p, 0.0)
    assert len(launched) == 15
