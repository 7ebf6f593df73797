"""One rank of tests/parallel/test_vocab.py: `token_logprobs` of this rank's columns.

    vocab_worker.py CASES OUT

CASES.safetensors: "<case>/logits" [N, V], ".../targets", ".../temperature", ".../up" [2, N] (the
gradients that come from above). Rank 0 writes to OUT.safetensors the values and, columns joined,
the gradients, each by the same case.
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from src.parallel.setup import start, stop
from src.parallel.vocab import token_logprobs, vocab_range


def whole(columns, parallel):
    parts = [torch.empty_like(columns) for _ in range(parallel.mp_size)]
    dist.all_gather(parts, columns.contiguous(), group=parallel.mp_group)
    return torch.cat(parts, -1)


def main(cases: str, out: str) -> None:
    # checks that every rank issues the same collectives
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    parallel = start(timeout=120)
    tensors, results = load_file(cases), {}
    for case in sorted({key.split("/")[0] for key in tensors}):
        logits, targets, up = (tensors[f"{case}/{field}"] for field in ("logits", "targets", "up"))
        temperature = tensors[f"{case}/temperature"].item()
        first, end = vocab_range(logits.size(-1) // parallel.mp_size)
        for use, weights in {"both": (1, 1), "logprobs": (1, None), "entropy": (None, 1)}.items():
            part = logits[:, first:end].clone().requires_grad_()  # [N, V / n]
            before = part.detach().clone()
            values = token_logprobs(part, targets, temperature)  # each [N]
            used = [(value * row).sum() for value, row, w in zip(values, up, weights) if w]
            sum(used).backward()
            kept = [torch.equal(part.detach(), before), part.grad.dtype == logits.dtype]
            results |= {
                f"{case}/{use}/values": torch.stack([value.detach() for value in values]),
                f"{case}/{use}/grad": whole(part.grad, parallel),
                f"{case}/{use}/kept": whole(torch.tensor(kept).byte(), parallel),
            }
    if parallel.is_main:
        save_file({key: value.contiguous() for key, value in results.items()}, out)
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
