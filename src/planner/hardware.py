"""What a machine can do: rates of computing, of memory and of the links between its ranks.

GPUs come with their published numbers, of which a stated share is taken to be reached; a machine
that was measured (`plan.py --calibrate`) comes with its own rates, from a YAML file.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from src.errors import UserError
from src.trainer.activations import USABLE

GB = 1e9


@dataclass(frozen=True)
class Rates:
    """What one rank reaches while all others work, too.

    products, attention: FLOP/s; elements, weights: bytes/s that are read and written between the
    products, and of weights that these read; layer: seconds of a layer however little it does, as
    kernels are launched; call: of a pass.
    """

    products: float
    attention: float
    elements: float
    weights: float
    layer: float
    call: float = 0.0


@dataclass(frozen=True)
class Link:
    """An exchange: seconds that it takes at least, and bytes/s of each rank, in and out."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Links:
    """Between ranks of one node, or of several.

    reduce: sums of all ranks; gather: parts put together, or sums dealt out; send: rank to rank.
    """

    reduce: Link
    gather: Link
    send: Link


@dataclass(frozen=True)
class Hardware:
    """Nodes of `per_node` ranks each.

    memory: bytes of a rank; score, train, decode: passes without gradients, with them, and a token
    for each of some sequences; numbers: an optimizer's, updated in a second; session: bytes/s of
    weights that are made ready before a first token; copies, fresh: bytes/s that are copied to
    memory in use, and to new memory; peak: FLOP/s that the MFU is of; kind: of the device.
    """

    name: str
    memory: float
    per_node: int
    score: Rates
    train: Rates
    decode: Rates
    numbers: float
    session: float
    copies: float
    fresh: float
    node: Links
    network: Links
    peak: float
    kind: str = "cuda"

    @property
    def overlaps(self) -> bool:
        """Whether ranks exchange while they compute."""
        return self.kind == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in where nothing else is said."""
        return torch.float32 if self.kind == "cpu" else torch.bfloat16

    def links(self, first: int, size: int, count: int = 1) -> Links:
        """Inside of each of `count` runs of `size` ranks, the first from number `first` on.

        All wait for those that lie on several nodes, if there are such.
        """
        starts = range(first, first + size * count, size)
        return self.node if all(self.is_within(start, size) for start in starts) else self.network

    def is_within(self, first: int, size: int) -> bool:
        """Whether so many ranks lie on one node."""
        return first // self.per_node == (first + size - 1) // self.per_node

    def write(self, path: str, head: str) -> None:
        """As a file that `read` takes. head: a comment at the top."""
        text = f"# {head}\n" + yaml.safe_dump(asdict(self), sort_keys=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, path: str) -> "Hardware":
        """From a file that `plan.py --calibrate` wrote. Raises UserError."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise UserError(f"--hardware {path}: cannot be read: {reason}") from None
        try:
            return made(cls, values)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--hardware {path}: {error}; plan.py --calibrate {path} writes such a file"
            ) from None


def made(kind: Any, values: Any) -> Any:
    """A dataclass of plain numbers and others like it. Raises ValueError for what is missing."""
    if not isinstance(values, Mapping):
        raise ValueError(f"no {kind.__name__.lower()}, but {values!r}")
    found: dict[str, Any] = {}
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"does not know {', '.join(unknown)}")
    for name, field in known.items():
        if name not in values:
            continue
        of: Any = field.type
        if of in (Rates, Link, Links):
            found[name] = made(of, values[name])
        elif of in (float, int):
            number = of(values[name])
            least = 0 if name in ("layer", "call", "latency") else sys.float_info.min
            if not (math.isfinite(number) and number >= least):
                raise ValueError(f"{name} is {values[name]!r}, and must be a number above 0")
            found[name] = number
        else:
            found[name] = values[name]
    return kind(**found)


# --- Published numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A GPU by its vendor's data sheet.

    tflops, tflops_fp32: dense products in bf16 and fp16, and in fp32 (some state twice as much,
    "with sparsity"); memory_gb, memory_tb_s;
    link_gb_s: to the other GPUs of a node, in each direction; network_gb_s: a GPU's share of the
    node's network, as the vendor's own systems have it.
    """

    name: str
    tflops: float
    tflops_fp32: float
    memory_gb: float
    memory_tb_s: float
    link_gb_s: float
    network_gb_s: float


GPUS = {
    "a100-40": Published("A100 SXM 40 GB", 312, 19.5, 40, 1.555, 300, 25),
    "a100": Published("A100 SXM 80 GB", 312, 19.5, 80, 2.039, 300, 25),
    "h100": Published("H100 SXM 80 GB", 989, 67, 80, 3.35, 450, 50),
    "h100-pcie": Published("H100 PCIe 80 GB", 756, 51, 80, 2.0, 64, 25),
    "h200": Published("H200 SXM 141 GB", 989, 67, 141, 4.8, 450, 50),
    "b200": Published("B200 SXM 180 GB", 2250, 80, 180, 7.7, 900, 50),
    "l40s": Published("L40S 48 GB", 362, 91.6, 48, 0.864, 32, 12.5),
    "4090": Published("GeForce RTX 4090 24 GB", 165, 82.6, 24, 1.008, 32, 3.1),
    "mi300x": Published("Instinct MI300X 192 GB", 1307, 163.4, 192, 5.3, 448, 50),
}


@dataclass(frozen=True)
class Reached:
    """The share of published numbers that is taken to be reached, and seconds that nobody states.

    Large products on an H100 or A100 come to 0.6 to 0.75 of the data sheet's rate, kernels that
    only move bytes to about 0.8; a launch takes some 4 µs, in a CUDA graph 1.5. Measure yours:
    `plan.py --calibrate`.
    """

    products: float = 0.65
    attention: float = 0.35
    memory: float = 0.8
    link: float = 0.75
    network: float = 0.8
    launch: float = 4e-6
    graph_launch: float = 1.5e-6
    latency: float = 15e-6
    network_latency: float = 30e-6


KERNELS = {"score": 14, "train": 44, "decode": 10}  # of a layer
ADAM_BYTES = 30  # read and written for each number: both averages, master, gradient, weight


def published(
    name: str, per_node: int, dtype: torch.dtype = torch.bfloat16, reached: Reached = Reached()
) -> Hardware:
    """A GPU of the table, so many to a node. Raises UserError for a name that is not in it."""
    if name not in GPUS:
        raise UserError(
            f"--gpu {name}: is not in the table ({', '.join(GPUS)}); measure it with plan.py "
            "--calibrate FILE, and give --hardware FILE"
        )
    gpu = GPUS[name]
    memory = gpu.memory_tb_s * 1e12 * reached.memory
    flops = 1e12 * (gpu.tflops_fp32 if dtype == torch.float32 else gpu.tflops)

    def rates(launches: int, launch: float) -> Rates:
        return Rates(
            flops * reached.products,
            flops * reached.attention,
            memory,
            memory,
            launches * launch,
        )

    def links(gb_s: float, share: float, latency: float) -> Links:
        return Links(*[Link(latency, gb_s * GB * share)] * 3)

    return Hardware(
        gpu.name,
        gpu.memory_gb * GB * USABLE,
        per_node,
        rates(KERNELS["score"], reached.launch),
        rates(KERNELS["train"], reached.launch),
        rates(KERNELS["decode"], reached.graph_launch),
        memory / ADAM_BYTES,
        memory,
        memory / 2,
        memory / 2,
        links(gpu.link_gb_s, reached.link, reached.latency),
        links(gpu.network_gb_s, reached.network, reached.network_latency),
        flops,
    )
