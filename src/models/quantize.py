"""Frozen weights kept in 4 or 8 bits, by bitsandbytes.

QLoRA: arXiv 2305.14314; LLM.int8(): arXiv 2208.07339. `F.linear` takes such a weight as it takes
any other. Backward dequantises again instead of keeping what forward made. Each block of 64 values
along a row has its own scale and there is no statistic over more than a block, so that a rank's
shard is the whole matrix's quantised values wherever it is cut at a multiple of 64.
"""

import functools
import logging
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.kernels import cpu, runtime
from src.kernels.codes import BLOCK, MOST_ROWS, product_by_codes
from src.parallel import deterministic

KINDS = ("nf4", "int8")


@functools.cache
def library():
    """bitsandbytes' operators.

    But for this its import takes 6 s, to compile what nothing here calls, and warns of an optional
    CPU kernel.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda f: f)):
        import bitsandbytes  # noqa: F401
    return torch.ops.bitsandbytes


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """What int8's 256 codes stand for: k / 127 for k of -127 ... 127 (one of them, zero, twice)."""
    levels = torch.arange(-127, 128) / 127
    return torch.cat([levels[:127], torch.zeros(1), levels[127:]]).to(device)


@functools.cache
def levels_of_bytes(kind: str, device: torch.device) -> Tensor:
    """What each byte stands for, where the scale is 1: [256, numbers in it], fp32."""
    per_byte = 2 if kind == "nf4" else 1
    codes = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(0)
    scales = torch.ones(1, 256 * per_byte // BLOCK, device=device)
    each = Quantized(codes, scales, kind, 256 * per_byte, torch.float32)
    return each.dequantized(torch.float32).view(256, per_byte).contiguous()


class Quantized(Tensor):
    """A weight [..., out, in] of which only codes and one fp32 scale per block are kept.

    dtype: what it is computed in.
    """

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, kind: str, in_features: int, dtype: torch.dtype
    ):
        shape = (*codes.shape[:-1], in_features)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(
        self, codes: Tensor, scales: Tensor, kind: str, in_features: int, dtype: torch.dtype
    ) -> None:
        self.codes, self.scales, self.kind = codes, scales, kind

    def _like(self, change, dtype: torch.dtype | None = None) -> "Quantized":
        return Quantized(
            change(self.codes), change(self.scales), self.kind, self.shape[-1], dtype or self.dtype
        )

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "nf4":
            padded = (*self.codes.shape[:-1], self.codes.shape[-1] * 2)
            whole = library().dequantize_4bit(self.codes, self.scales, BLOCK, "nf4", padded, dtype)
        else:
            whole = library().dequantize_blockwise(
                self.codes, self.scales, _levels(self.codes.device), BLOCK, dtype
            )
        return whole[..., : self.shape[-1]]

    def __repr__(self, *, tensor_contents=None):
        return f"Quantized({self.kind}, {tuple(self.shape)}, {self.dtype}, device={self.device})"

    # With its inverse, what nn.Module.to asks of a parameter that is such a tensor.
    def __tensor_flatten__(self):
        return ["codes", "scales"], (self.kind, self.shape[-1], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride) -> "Quantized":
        return Quantized(inner["codes"], inner["scales"], *context)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod  # torch declares it as an attribute, which mypy takes for a plain method
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        weight, aten, kwargs = args[0], torch.ops.aten, kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return weight._like(func)
        if func is aten.clone.default:
            return weight._like(torch.clone)
        if func is aten._to_copy.default:
            device, dtype = kwargs.get("device"), kwargs.get("dtype")
            return weight._like(lambda t: t.to(device, copy=True), dtype)
        # of a stack, one expert or each
        if func is aten.select.int and weight.dim() == 3 and args[1] == 0:
            return weight._like(lambda t: t[args[2]])
        if func is aten.unbind.int and weight.dim() == 3 and args[1:] in ((), (0,)):
            return [weight._like(lambda t, e=e: t[e]) for e in range(weight.size(0))]
        if func is aten.new_empty.default:
            like = {"dtype": weight.dtype, "device": weight.device}
            return torch.empty(args[1], **{**like, **kwargs})
        raise NotImplementedError(f"{func} of a quantised weight: take dense(weight)")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        needs_x, _, needs_bias = ctx.needs_input_grad
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return grad @ ctx.weight.dequantized(grad.dtype) if needs_x else None, None, grad_bias


def _linear(input: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    product = _few_rows_product(input, bias)
    if product is not None:
        levels = levels_of_bytes(weight.kind, input.device)
        return product(input, weight.codes, weight.scales, levels, bias)
    return _Linear.apply(input, weight, bias)


def _few_rows_product(x: Tensor, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """What multiplies a decode step's few rows by codes as they are, if anything does."""
    if x.dim() != 2 or torch.is_grad_enabled() or deterministic.is_on():
        return None
    if len(x) <= cpu.FEW_BY_CODES and cpu.takes(x, bias):
        return cpu.few_rows_by_codes
    if len(x) <= MOST_ROWS and runtime.takes(x):
        return product_by_codes
    return None


@torch.no_grad()
def quantized(weight: Tensor, kind: str) -> nn.Parameter:
    """A frozen parameter that keeps [out, in], or a stack [experts, out, in], in this kind of code.

    Rows that are no multiple of 64 long are padded with zeros, which change no block's scale.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    rows, in_features = weight.shape[:-1], weight.shape[-1]
    padded = F.pad(weight, (0, -in_features % BLOCK)).contiguous()
    if kind == "nf4":
        codes, scales = library().quantize_4bit(padded, BLOCK, "nf4", torch.uint8)
    else:
        codes, scales = library().quantize_blockwise(padded, _levels(weight.device), BLOCK)
    inner = Quantized(
        codes.view(*rows, -1), scales.view(*rows, -1), kind, in_features, weight.dtype
    )
    return nn.Parameter(inner, requires_grad=False)


def dense(weight: Tensor) -> Tensor:
    """The weight as a plain tensor of its dtype: dequantised if it is quantised."""
    return weight.dequantized(weight.dtype) if isinstance(weight, Quantized) else weight


def plain_parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that hold it."""
    return [weight.codes, weight.scales] if isinstance(weight, Quantized) else [weight]


def stored_bytes(weight: Tensor) -> int:
    """The bytes that it holds in memory."""
    return sum(part.nbytes for part in plain_parts(weight))
