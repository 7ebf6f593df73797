"""Exchanges through shared memory on the ranks that started it, against gloo's.

Started as: shared_worker.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from src.parallel import shared_memory
from src.parallel.setup import start, stop

OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def main(out: str) -> None:
    parallel = start(timeout=60)
    results = {"used": parallel.mp_group in shared_memory._groups}
    shared_memory.SLOT_BYTES = 4096  # so that tensors go in pieces
    generator = torch.Generator().manual_seed(parallel.rank)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        for size in (1, 7, 1024, 5000):
            x = (torch.randn(size, 2, generator=generator) * 50).to(dtype)
            parts = [torch.empty_like(x) for _ in range(parallel.world_size)]
            dist.all_gather(parts, x, group=parallel.mp_group)
            whole = shared_memory.gathered(x.t(), parallel.mp_group)  # not contiguous
            alike = torch.equal(whole, torch.stack(parts).mT)
            results[f"{dtype} {size} gathered"] = [0.0, alike]
            x = (torch.randn(parallel.world_size, size, 2, generator=generator) * 50).to(dtype)
            row = shared_memory.scattered_sum(x, parallel.mp_group)
            alike = torch.equal(row, shared_memory.summed(x, parallel.mp_group)[parallel.rank])
            results[f"{dtype} {size} scattered"] = [0.0, alike]
            wanted = torch.empty_like(x)
            dist.all_to_all_single(wanted, x, group=parallel.mp_group)
            alike = torch.equal(shared_memory.all_to_all(x, parallel.mp_group), wanted)
            results[f"{dtype} {size} all to all"] = [0.0, alike]
            for name, op in OPERATIONS.items():
                x = (torch.randn(size, generator=generator) * 50).to(dtype)
                wanted, before = x.clone(), x.clone()
                dist.all_reduce(wanted, op=op, group=parallel.mp_group)
                if op is dist.ReduceOp.SUM:
                    assert not torch.equal(shared_memory.summed(x, parallel.mp_group), before)
                    assert torch.equal(x, before)
                shared_memory.all_reduce(x, parallel.mp_group, op)
                of_ranks = [None] * parallel.world_size
                dist.all_gather_object(of_ranks, x)
                error = (x.double() - wanted.double()).abs().max() / wanted.double().abs().max()
                alike = all(torch.equal(x, other) for other in of_ranks)
                results[f"{dtype} {size} {name}"] = [float(error), alike]
    # Whether a rank that waits soon sleeps, then many exchanges, one after the other.
    results["shares cores"] = (
        results["used"] and shared_memory._groups[parallel.mp_group].shares_cores
    )
    for turn in range(3000):
        x = torch.full((16,), float(turn * (parallel.rank + 1)))
        shared_memory.all_reduce(x, parallel.mp_group)
        assert float(x[0]) == float(x[15]) == turn * sum(range(1, parallel.world_size + 1)), turn
    if results["used"]:  # gloo would end the process
        try:
            shared_memory.all_reduce(torch.ones(3 + parallel.rank), parallel.mp_group)
            results["apart"] = "not noticed"
        except RuntimeError as error:
            results["apart"] = str(error)
    if parallel.rank == 0:
        Path(out).write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
