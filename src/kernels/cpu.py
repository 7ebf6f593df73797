"""The CPU's kernels, in C: compiled once by the machine's own compiler, in a second.

Where there is none, or it cannot (Apple's has no OpenMP), `takes` says no, and PyTorch's operators
do the same work. PyTorch's OpenMP library runs them: the number of threads is its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "cpu_kernels.h")]
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FEW = {torch.float32: 4, torch.bfloat16: 1}  # rows, up to which `few_rows` is the quickest
FEW_BY_CODES = 16  # the same of `few_rows_by_codes`, beside dequantising
POINTER, NUMBER, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {  # as cpu_kernels.h has them
    "paged_attention": [*[POINTER] * 4, NUMBER, *[POINTER] * 2, *[NUMBER] * 6, FLOAT],
    "few_rows": [*[POINTER] * 4, *[NUMBER] * 3],
    "few_rows_gated": [*[POINTER] * 3, *[NUMBER] * 3],
    "few_rows_by_codes": [*[POINTER] * 6, *[NUMBER] * 4],
    "add_rms_norm": [*[POINTER] * 5, *[NUMBER] * 2, FLOAT],
    "swiglu": [*[POINTER] * 2, *[NUMBER] * 2],
    "rotate_and_write": [*[POINTER] * 8, NUMBER, *[POINTER] * 2, *[NUMBER] * 5, FLOAT],
}
DRAW = [*[POINTER] * 2, *[NUMBER] * 3, *[POINTER] * 4]
_decodes = False


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler that can."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    reason = "there is no C compiler (cc)"
    if compiler is not None:
        try:
            return _declared(ctypes.CDLL(str(_compiled(compiler))))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} could not compile {SOURCES[0]}: {error.stderr.strip()[-300:]}"
        except (OSError, RuntimeError) as error:  # the latter where nobody has a home
            reason = str(error)
    logging.getLogger(__name__).info("no kernels for the CPU: %s", reason)
    return None


def _compiled(compiler: str) -> Path:
    """The file of the kernels, compiled if this machine has not done so yet."""
    sources = b"".join(source.read_bytes() for source in SOURCES)
    # another machine may share the folder, and not the instructions
    key = hashlib.sha256(sources + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    folder = _folder()
    compiled = folder / f"cpu-{key}.so"
    if not compiled.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            part, whole = Path(work) / "cpu.o", Path(work) / "cpu.so"
            for command in (
                [compiler, *FLAGS, "-c", str(SOURCES[0]), "-o", str(part)],
                # OpenMP's functions are found in the library that PyTorch has loaded.
                [compiler, "-shared", "-nostdlib", str(part), "-lm", "-o", str(whole)],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(whole, compiled)
    return compiled


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    for_dtypes = {
        f"{name}_{dtype}": ARGUMENTS[name] for name in ARGUMENTS for dtype in DTYPES.values()
    }
    for name, types in {**for_dtypes, "draw": DRAW}.items():
        getattr(kernels, name).argtypes = types
    return kernels


def _folder() -> Path:
    """Where compiled kernels stay: this user's alone."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "own-your-rlhf"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.geteuid() or owner.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and work on these: contiguous, on the CPU, of one dtype."""
    dtype = None
    for x in tensors:
        if x is None:
            continue
        dtype = dtype or x.dtype
        if x.dtype != dtype or not x.is_cpu or not x.is_contiguous():
            return False
    return dtype in DTYPES and library() is not None


@contextmanager
def decode_step() -> Iterator[None]:
    """Norms and SwiGLU are these kernels for a while: what has a gradient keeps its own bits."""
    global _decodes
    before, _decodes = _decodes, True
    try:
        yield
    finally:
        _decodes = before


def decodes(*tensors: Tensor | None) -> bool:
    """Whether this is a decode step, and the kernels work on these."""
    return _decodes and takes(*tensors)


def _kernel(name: str, x: Tensor):
    return _kernel_for(name, x.dtype)


@functools.cache
def _kernel_for(name: str, dtype: torch.dtype):
    return getattr(library(), f"{name}_{DTYPES[dtype]}")


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, window: int = 0
) -> Tensor:
    """`src.kernels.attention.paged_attention`, for tensors that `takes` takes."""
    n, heads, dim = q.shape
    kv_heads, page = keys.size(1), keys.size(2)
    # What a pointer goes to has a name until the call is over.
    table, lengths, out = _rows(table), lengths.contiguous(), torch.empty_like(q)
    _kernel("paged_attention", q)(
        *(q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(table.data_ptr(), table.stride(0), lengths.data_ptr(), out.data_ptr()),
        *(n, heads, kv_heads, page, dim, window, dim**-0.5),
    )
    return out


def _rows(table: Tensor) -> Tensor:
    """The table, whose rows are contiguous."""
    return table if table.stride(1) == 1 else table.contiguous()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: [n, in] → [n, out], for tensors that `takes` takes."""
    out = x.new_empty(x.size(0), weight.size(0))
    _kernel("few_rows", x)(
        *(x.data_ptr(), weight.data_ptr(), _place(bias), out.data_ptr()), *x.shape, weight.size(0)
    )
    return out


def few_rows_gated(x: Tensor, weight: Tensor) -> Tensor:
    """`swiglu(few_rows(x, weight))`: [n, in] → [n, out]; weight: [2 out, in]."""
    width = weight.size(0) // 2
    out = x.new_empty(x.size(0), width)
    _kernel("few_rows_gated", x)(
        *(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, width)
    )
    return out


def few_rows_by_codes(
    x: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`src.kernels.codes.product_by_codes`, for x and bias that `takes` takes."""
    rows, inside = x.shape
    out = x.new_empty(rows, codes.size(0))
    _kernel("few_rows_by_codes", x)(
        *(x.data_ptr(), codes.data_ptr(), scales.data_ptr(), levels.data_ptr(), _place(bias)),
        *(out.data_ptr(), rows, inside, codes.size(0), levels.numel() // 256),
    )
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`src.kernels.norm.add_rms_norm`, for tensors that `takes` takes."""
    total, out = x if delta is None else torch.empty_like(x), torch.empty_like(x)
    _kernel("add_rms_norm", x)(
        *(x.data_ptr(), _place(delta), weight.data_ptr(), total.data_ptr(), out.data_ptr()),
        *(x.numel() // x.size(-1), x.size(-1), eps),
    )
    return total, out


def swiglu(joined: Tensor) -> Tensor:
    """`src.kernels.swiglu.swiglu`, without a gradient, for tensors that `takes` takes."""
    rows, width = joined.size(0), joined.size(1) // 2
    out = joined.new_empty(rows, width)
    _kernel("swiglu", joined)(joined.data_ptr(), out.data_ptr(), rows, width)
    return out


def rotate_and_write(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`src.kernels.rotation.rotate_and_write`, for tensors that `takes` takes."""
    qkv, n, page, dim = qkv.contiguous(), qkv.size(0), keys.size(2), keys.size(3)
    q_rotary, k_rotary = (part.contiguous() for part in rotary)
    table, positions = _rows(table), positions.contiguous()
    out = qkv.new_empty(n, heads, dim)
    _kernel("rotate_and_write", qkv)(
        *(qkv.data_ptr(), q_rotary.data_ptr(), k_rotary.data_ptr(), _place(q_norm), _place(k_norm)),
        *(keys.data_ptr(), values.data_ptr(), table.data_ptr(), table.stride(0)),
        *(positions.data_ptr(), out.data_ptr(), n, heads, kv_heads, page, dim, eps),
    )
    return out


def draw(
    z: Tensor, top: Tensor, seed: int, samples: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens drawn by softmax(z), at the numbers that `src.generation.sampling.uniforms` gives.

    z: fp32 logits of the whole vocabulary that `takes` takes, [n, vocabulary]; top: the largest of
    each row. Returns tokens and fp32 log-probabilities, [n] and [n].
    """
    samples, steps, tokens = samples.contiguous(), steps.contiguous(), torch.empty_like(steps)
    logprobs, kernels = torch.empty_like(top), library()
    assert kernels is not None
    kernels.draw(
        *(z.data_ptr(), top.data_ptr(), *z.shape, seed, samples.data_ptr(), steps.data_ptr()),
        *(tokens.data_ptr(), logprobs.data_ptr()),
    )
    return tokens, logprobs
