"""What an optimizer keeps of each parameter between steps: fp32 averages, or their 8-bit codes.

Codes are bitsandbytes' (arXiv 2110.02861): blocks of 256 numbers of the flattened tensor with the
largest of their magnitudes each, and a map of 256 levels. Its quantiser for the CPU is not exact
(what is 0 comes back as something else), so that there the nearest level is searched for here.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from src.models.quantize import library
from src.settings.run import TrainingRunSettings
from src.settings.training import OptimizerSettings

MEAN, SQUARE, MOMENTUM, STEP = "exp_avg", "exp_avg_sq", "momentum", "step"
ABSMAX = "_absmax"  # behind an average's name: the scales of its codes
BLOCK = 256  # numbers that share a scale
SMALLEST = 4096  # numbers; tensors with fewer keep averages in fp32, as bitsandbytes has it
NO_MEAN = 127  # the mean's code that stands for 0
FIRST_BITS = 2**15  # from here on the first 16 bits of a number, signed, count as an index
NUMBERS_AT_ONCE = 2**24  # of a part of the state that passes over a GPU
# Bytes of what is there at a time: parts that come, that are updated, and two that leave.
PASSING = 4 * NUMBERS_AT_ONCE * 3 * 4

Form = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name → (shape, dtype)


@dataclass(frozen=True)
class Method:
    """How weights are updated, and where what that needs rests.

    kind: "adamw", "adamw8bit" or "muon"; offload: masters and averages are in host memory between
    steps; on_cpu: and updated there.
    """

    kind: str = "adamw"
    offload: bool = False
    on_cpu: bool = False

    @classmethod
    def of(cls, optimizer: OptimizerSettings, run: TrainingRunSettings) -> "Method":
        """By a script's settings."""
        return cls(optimizer.optimizer, run.offload_optimizer, run.cpu_adam)


PLAIN = Method()


def form_of(kind: str, shape: tuple[int, ...], whole: int) -> Form:
    """What is kept of a parameter, without the counter of steps.

    kind: that of its group, see `Method`; shape: of a rank's part; whole: numbers of the whole
    tensor, which decide, so that a cut changes nothing.
    """
    if kind == "muon":
        return {MOMENTUM: (shape, torch.float32)}
    if kind == "adamw8bit" and whole >= SMALLEST:
        blocks = (-(-torch.Size(shape).numel() // BLOCK),)
        codes = dict.fromkeys((MEAN, SQUARE), (shape, torch.uint8))
        return codes | {name + ABSMAX: (blocks, torch.float32) for name in (MEAN, SQUARE)}
    return dict.fromkeys((MEAN, SQUARE), (shape, torch.float32))


def bytes_of_form(form: Form) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in form.values())


def is_for_muon(name: str, dims: int) -> bool:
    """Whether a parameter is a matrix between hidden features, or a matrix for each expert.

    An embedding, an output layer, a router and a score are read by single rows, and are AdamW's.
    """
    ends = ("tok_embeddings", "output", "score", "gate")
    return dims > 1 and name.split(".")[-2] not in ends


@functools.cache
def levels(name: str, device: torch.device) -> Tensor:
    """What the codes of an average stand for, where the scale is 1: [256], rising."""
    library()
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == MEAN).to(device)


def dequantized(codes: Tensor, absmax: Tensor, name: str) -> Tensor:
    """The average that codes stand for, in fp32 and of their shape."""
    scales = levels(name, codes.device)
    return library().dequantize_blockwise(codes, absmax, scales, BLOCK, torch.float32)


def quantized(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(the nearest codes, of x's shape, the scales: [blocks])."""
    if x.is_cuda:
        return library().quantize_blockwise(x, levels(name, x.device), BLOCK)
    blocks = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = torch.linalg.vector_norm(blocks, torch.inf, 1)
    scaled = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    start, middles = _search(name)
    # A guess by the first 16 bits, which no two middles have in common, is too low by one at most.
    flat = scaled.view(-1)[: x.numel()]
    codes = start[(flat.view(torch.int32) >> 16).add_(FIRST_BITS)]
    codes += flat > middles[codes]
    return codes.to(torch.uint8).view(x.shape), absmax


@functools.cache
def _search(name: str) -> tuple[Tensor, Tensor]:
    """(the code of the lowest number with each first 16 bits, what is half-way to the next)."""
    ordered = levels(name, torch.device("cpu"))
    middles = (ordered[1:] + ordered[:-1]) / 2
    first_bits = torch.arange(-FIRST_BITS, FIRST_BITS, dtype=torch.int32) << 16
    lowest = first_bits.view(torch.float32)
    below = (first_bits | 0xFFFF).view(torch.float32)  # a negative number's is the longest
    lowest = torch.where(torch.signbit(lowest), below, lowest).nan_to_num(0.0)
    return torch.bucketize(lowest, middles, out_int32=True), F.pad(middles, (0, 1), value=torch.inf)


def read(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and mean square in fp32: the state's own tensors, or what its codes stand for."""
    if MEAN + ABSMAX not in state:
        return state[MEAN], state[SQUARE]
    mean, square = (dequantized(state[name], state[name + ABSMAX], name) for name in (MEAN, SQUARE))
    return mean, square


def write(state: dict[str, Tensor], mean: Tensor, square: Tensor) -> None:
    """Keep what `read` gave and was changed since."""
    if MEAN + ABSMAX not in state:
        return
    for name, average in ((MEAN, mean), (SQUARE, square)):
        codes, absmax = quantized(average, name)
        state[name].copy_(codes)
        state[name + ABSMAX].copy_(absmax)
    # A square that is rounded to 0 beside a mean that is not would divide it by epsilon alone.
    moves = (state[MEAN] != NO_MEAN).to(torch.uint8)
    torch.maximum(state[SQUARE], moves, out=state[SQUARE])
