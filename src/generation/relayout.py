"""Generation at another degree than training, on the same ranks.

Weights change hands in memory, never through disk. Training may need 8 ranks to hold a model that
generates faster as four models of 2 ranks each.
"""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from src.checkpoint.load import put
from src.generation.engine import Completion, Engine, Stop
from src.generation.sampling import Sampling
from src.models.layout import TensorSpec, tensor_table
from src.models.lora import merged_parts
from src.models.transformer import Transformer, build
from src.parallel.setup import Parallel


def exchanged(part: Tensor, spec: TensorSpec, parallel: Parallel, n: int) -> Tensor:
    """This rank's part of a weight at degree n, from those that a model's ranks hold at its own.

    A collective over these ranks. Each sends every other what that one's new part overlaps with;
    nobody holds the whole.
    """
    if spec.dim is None or n == parallel.mp_size:
        return part
    first_rank = parallel.rank - parallel.mp_rank
    start, stop = spec.local_range(parallel.mp_rank % n, n)
    new = part.new_zeros(spec.local_shape(n))
    sends, receives = [], []
    for owner, owned_start, owned_stop in spec.owners(parallel.mp_size):
        if owner == parallel.mp_rank:
            # What this rank has goes to whoever needs it, itself among them.
            for rank in range(parallel.mp_size):
                low, high = spec.local_range(rank % n, n)
                low, high = max(low, owned_start), min(high, owned_stop)
                if low < high:
                    piece = part.narrow(spec.dim, low - owned_start, high - low)
                    if rank == parallel.mp_rank:
                        new.narrow(spec.dim, low - start, high - low).copy_(piece)
                    else:
                        sends.append((rank, piece.contiguous()))
        else:
            low, high = max(start, owned_start), min(stop, owned_stop)
            if low < high:
                place = new.narrow(spec.dim, low - start, high - low)
                buffer = torch.empty_like(place, memory_format=torch.contiguous_format)
                receives.append((owner, place, buffer))
    operations = [
        dist.P2POp(dist.isend, piece, first_rank + rank, parallel.mp_group) for rank, piece in sends
    ]
    operations += [
        dist.P2POp(dist.irecv, buffer, first_rank + rank, parallel.mp_group)
        for rank, _, buffer in receives
    ]
    waits = dist.batch_isend_irecv(operations) if operations else []
    for wait in waits:
        wait.wait()
    for _, place, buffer in receives:
        place.copy_(buffer)
    return new


@torch.no_grad()
def relaid(model: Transformer, parallel: Parallel, division: Parallel) -> Transformer:
    """A copy of the model as `division` cuts it, adapters added in; in training mode as it is."""
    config, n = model.config, division.mp_size
    table = tensor_table(config)
    replicas = division.replicas(table["layers.0.attention.wk.weight"].copies(n))
    new = build(config, division.mp_rank, n, model.norm.weight.dtype, replicas)
    new.stack_projections(division.device)
    for name, part in merged_parts(model):
        put(new, name, exchanged(part, table[name], parallel, n), division.device)
    return new.requires_grad_(False).train(model.training)


class RelaidEngine:
    """An engine for rollouts that lays the model out at its own degree for each call.

    It drops the copy afterwards.
    """

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        mp_size: int,
        max_batch_size: int,
        max_seq_len: int,
        kv_cache_gb: float | None = None,
    ) -> None:
        self.model, self.parallel, self.division = model, parallel, parallel.divided(mp_size)
        self.limits = max_batch_size, max_seq_len, kv_cache_gb
        self.seconds = 0.0  # that the last change of layout took

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: Stop | set[int],
        samples: list[int],
        on_tokens=None,
    ) -> list[Completion]:
        """`Engine.generate` for prompts that all ranks of one (training) model give alike.

        All get all completions.
        """
        began = time.perf_counter()
        model = relaid(self.model, self.parallel, self.division)
        self.seconds = time.perf_counter() - began
        # The smaller models share the prompts.
        models = self.parallel.mp_size // self.division.mp_size
        local = list(range(self.parallel.mp_rank // self.division.mp_size, len(prompts), models))
        local_prompts, local_samples = [prompts[i] for i in local], [samples[i] for i in local]
        with self.division.active():
            engine = Engine(model, self.division, *self.limits)
            done = engine.generate(local_prompts, sampling, stop, local_samples, on_tokens)
        parts = [list(zip(local, done))] * self.parallel.mp_size
        dist.all_gather_object(parts, list(zip(local, done)), group=self.parallel.mp_group)
        completion_of = dict(pair for part in parts for pair in part)
        return [completion_of[i] for i in range(len(prompts))]
