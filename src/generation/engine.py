"""Generation with continuous batching: a finished sequence's slot takes the next prompt at once.

The running sequences always fill the first n slots, so that decoding works on slices, never on copies, of the cache.
"""

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from src.generation.cache import Cache, Decode, Prefill
from src.generation.sampling import Sampling, choose
from src.models.transformer import Transformer
from src.parallel.setup import Parallel

CONTEXT_STEP = 32  # attention reads the cache up to a multiple of this
PREFILL_TOKENS = 16384


@dataclass
class Completion:
    """What one prompt brought. `stop_reason`: "stop" (a stop token, kept as the last of `tokens`) or "length"."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str


class Slots:
    """The running sequences' state, one row per slot."""

    def __init__(self, n: int, max_new_tokens: int, device: torch.device) -> None:
        self.requests = [-1] * n
        self.samples = torch.zeros(n, dtype=torch.long, device=device)
        self.lengths = torch.zeros(n, dtype=torch.long, device=device)  # tokens in the cache
        self.prompts = torch.zeros(n, dtype=torch.long, device=device)  # those of them that were the prompt
        self.limits = torch.zeros(n, dtype=torch.long, device=device)  # new tokens allowed
        self.steps = torch.zeros(n, dtype=torch.long, device=device)  # new tokens so far
        self.tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n, max_new_tokens, device=device)

    def move(self, source: int, target: int) -> None:
        self.requests[target] = self.requests[source]
        for state in (self.samples, self.lengths, self.prompts, self.limits, self.steps, self.tokens, self.logprobs):
            state[target] = state[source]


class Engine:
    """Generates with a model in place: no copy of its weights."""

    def __init__(self, model: Transformer, parallel: Parallel, max_batch_size: int, max_seq_len: int) -> None:
        """max_batch_size: sequences at a time, at most; fewer when the cache would not fit into half the free memory.

        max_seq_len: prompt and response together never exceed it.
        """
        self.model, self.parallel = model, parallel
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop_ids: set[int],
        samples: list[int] | None = None,
        on_tokens: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """A completion for each prompt (ids, BOS included), in their order.

        samples: an id for each prompt that, with the seed, fixes what is drawn (its index by default);
        on_tokens(finished, new tokens) is called once a step.
        """
        limits = [min(sampling.max_new_tokens, self.max_seq_len - len(prompt)) for prompt in prompts]
        done: list[Completion | None] = [None if limit > 0 else Completion([], [], "length") for limit in limits]
        waiting = deque(sorted((i for i, c in enumerate(done) if c is None), key=lambda i: -len(prompts[i])))
        if not waiting:
            return done
        cache_length = max(len(prompts[i]) + limits[i] for i in waiting)
        slots_wanted = min(self.max_batch_size, len(waiting))
        n_slots = self._slots_that_fit(slots_wanted, cache_length)
        device = self.parallel.device
        cache = Cache(self.model, n_slots, cache_length)
        slots = Slots(n_slots, sampling.max_new_tokens, device)
        stops = torch.tensor(sorted(stop_ids), device=device)
        running, longest = 0, 0  # slots in use; an upper bound on their lengths
        while waiting or running:
            news = self._admit(waiting, n_slots - running, prompts)
            finished = 0
            if news:
                rows = slice(running, running + len(news))
                slots.requests[rows] = news
                slots.samples[rows] = torch.tensor([samples[i] if samples else i for i in news], device=device)
                slots.lengths[rows] = slots.prompts[rows] = torch.tensor([len(prompts[i]) for i in news], device=device)
                slots.limits[rows] = torch.tensor([limits[i] for i in news], device=device)
                slots.steps[rows] = 0
                self._choose(self._prefill([prompts[i] for i in news], cache, running), slots, rows, sampling)
                longest = max(longest, len(prompts[news[0]]))
            else:
                rows = slice(0, running)
                context = min(-(-(longest + 1) // CONTEXT_STEP) * CONTEXT_STEP, cache_length)
                self._choose(self._decode(slots, running, cache, context), slots, rows, sampling)
                longest += 1
            last = slots.tokens[rows].gather(1, slots.steps[rows].unsqueeze(1) - 1).squeeze(1)
            stopped = torch.isin(last, stops)
            ended = (stopped | (slots.steps[rows] >= slots.limits[rows])).nonzero().squeeze(1)
            running = max(running, rows.stop)
            # The one look at the device per step: which sequences ended, and why.
            for offset, by_stop, steps in reversed(torch.stack((ended, stopped[ended], slots.steps[rows][ended]), 1).tolist()):
                slot = rows.start + offset
                done[slots.requests[slot]] = Completion(
                    slots.tokens[slot, :steps].tolist(), slots.logprobs[slot, :steps].tolist(), "stop" if by_stop else "length"
                )
                running -= 1
                finished += 1
                if slot != running:
                    cache.move(running, slot, min(longest + 1, cache_length))
                    slots.move(running, slot)
            if finished and running:
                longest = int(slots.lengths[:running].max())
            if on_tokens:
                on_tokens(finished, rows.stop - rows.start)
        return done

    def _admit(self, waiting: deque[int], free: int, prompts: list[list[int]]) -> list[int]:
        """The prompts to start now, longest first: as many as there are free slots and fit a forward's token budget."""
        news = []
        while waiting and len(news) < free and (len(news) + 1) * len(prompts[(news or waiting)[0]]) <= PREFILL_TOKENS:
            news.append(waiting.popleft())
        if not news and waiting and free:
            news.append(waiting.popleft())  # longer than the budget by itself
        return news

    def _prefill(self, prompts: list[list[int]], cache: Cache, first_slot: int) -> Tensor:
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self.parallel.device)
        layout = Prefill([len(prompt) for prompt in prompts], cache, first_slot, self.parallel.device)
        return self.model.logits(self.model(tokens, layout)[layout.ends])

    def _decode(self, slots: Slots, n: int, cache: Cache, context: int) -> Tensor:
        last = slots.tokens[:n].gather(1, slots.steps[:n].unsqueeze(1) - 1).squeeze(1)
        logits = self.model.logits(self.model(last, Decode(cache, slots.lengths[:n], context, slots.prompts[:n])))
        slots.lengths[:n] += 1
        return logits

    def _choose(self, logits: Tensor, slots: Slots, rows: slice, sampling: Sampling) -> None:
        tokens, logprobs = choose(logits, sampling, slots.samples[rows], slots.steps[rows])
        slots.tokens[rows].scatter_(1, slots.steps[rows].unsqueeze(1), tokens.unsqueeze(1))
        slots.logprobs[rows].scatter_(1, slots.steps[rows].unsqueeze(1), logprobs.unsqueeze(1))
        slots.steps[rows] += 1

    def _slots_that_fit(self, wanted: int, length: int) -> int:
        """At most `wanted`, as many as half the free memory of the fullest rank holds, one at least."""
        config = self.model.config
        dtype = self.model.norm.weight.dtype
        per_slot = 2 * config.n_layers * self.model.kv_heads * config.head_dim * length * dtype.itemsize
        fits = torch.tensor(min(wanted, _free_bytes(self.parallel.device) // 2 // per_slot), device=self.parallel.device)
        dist.all_reduce(fits, op=dist.ReduceOp.MIN, group=self.parallel.mp_group)
        return max(1, int(fits))


def _free_bytes(device: torch.device) -> int:
    """Memory that this rank may take: the GPU's free bytes, or its share of the host's."""
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available // ranks_here


def generate_sharded(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    stop_ids: set[int],
    samples: list[int] | None = None,
    on_tokens: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """`Engine.generate` over the data-parallel ranks: each takes its share of the prompts, all get all completions."""
    parallel = engine.parallel
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    mine = by_length[parallel.dp_rank :: parallel.dp_size]
    ids = [samples[i] if samples else i for i in mine]

    def report(finished: int, new_tokens: int) -> None:  # the other ranks are about as far
        if on_tokens:
            on_tokens(finished * parallel.dp_size, new_tokens * parallel.dp_size)

    completions = engine.generate([prompts[i] for i in mine], sampling, stop_ids, ids, report)
    if parallel.dp_size == 1:
        gathered = [list(zip(mine, completions))]
    else:
        gathered = [None] * parallel.dp_size
        dist.all_gather_object(gathered, list(zip(mine, completions)), group=parallel.dp_group)
    whole = dict(pair for part in gathered for pair in part)
    return [whole[i] for i in range(len(prompts))]
