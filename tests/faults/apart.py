"""Two ranks that all-reduce tensors of different sizes, as a mistake of ours would."""

import torch
import torch.distributed as dist

from src.parallel.setup import start

if __name__ == "__main__":
    parallel = start(1, timeout=60)
    dist.all_reduce(torch.zeros(3 + parallel.rank))
