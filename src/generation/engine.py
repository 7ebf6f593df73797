"""Generation with continuous batching: a finished sequence's slot takes the next prompt at once.

The running sequences always fill the first n slots, so that decoding works on slices, never on
copies, of the cache. A prompt of which several samples are wanted is prefilled once.
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from src.generation.cache import Cache, Decode, Prefill
from src.generation.sampling import Sampling, choose, constrained
from src.models.transformer import Transformer
from src.parallel.layers import packed_weights
from src.parallel.setup import Parallel
from src.parallel.vocab import pack_bits, vocab_range

CONTEXT_STEP = 32  # attention reads the cache up to a multiple of this
# slots that read the same length of the cache, on the CPU: no more than the longest of them needs
NEIGHBOURS = 16
PREFILL_TOKENS = 16384  # of one forward, at most
OnTokens = Callable[[list[int], list[int]], None]


@dataclass
class Completion:
    """What one prompt brought.

    stop_reason: "stop" (a stop token, kept as the last of `tokens`, or a string) or "length";
    kept: when asked for, which tokens of this rank's part of the vocabulary each choice was among,
    as bits, [tokens, bytes].
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str
    kept: Tensor | None = None


@dataclass(frozen=True)
class Stop:
    """What ends a response: any of the ids, or any of the strings in its text (by `decode`)."""

    ids: frozenset[int] | set[int]
    strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    def tail(self) -> int:
        """How many of the last tokens can hold a stop string.

        A token has at least a byte, but for a few special ones.
        """
        return max((len(string.encode()) for string in self.strings), default=0) + 8


@dataclass
class Request:
    """A prompt and the ids of those who wait for a sample of it."""

    prompt: list[int]
    waiting: list[int] = field(default_factory=list)


class Slots:
    """The running sequences' state, one row per slot."""

    def __init__(self, n: int, max_new_tokens: int, device: torch.device) -> None:
        self.requests = [-1] * n
        self.host_lengths = [0] * n  # the same as `lengths`
        self.samples = torch.zeros(n, dtype=torch.long, device=device)
        self.lengths = torch.zeros(n, dtype=torch.long, device=device)  # tokens in the cache
        # those of them that were the prompt
        self.prompts = torch.zeros(n, dtype=torch.long, device=device)
        self.limits = torch.zeros(n, dtype=torch.long, device=device)  # new tokens allowed
        self.steps = torch.zeros(n, dtype=torch.long, device=device)  # new tokens so far
        self.last = torch.zeros(n, dtype=torch.long, device=device)  # the newest token
        self.tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n, max_new_tokens, device=device)
        # tokens of this rank's vocabulary that a sequence holds, [n, vocabulary / ranks]
        self.seen: Tensor | None = None
        # bits of what was kept at each choice, [n, max_new_tokens, bytes]
        self.kept: Tensor | None = None

    def move(self, source: int, target: int) -> None:
        self.requests[target] = self.requests[source]
        self.host_lengths[target] = self.host_lengths[source]
        states = (
            self.samples,
            self.lengths,
            self.prompts,
            self.limits,
            self.steps,
            self.last,
            self.tokens,
            self.logprobs,
        )
        for state in (*states, self.seen, self.kept):
            if state is not None:
                state[target] = state[source]


class Engine:
    """Generates with a model in place, by its own weights."""

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        max_batch_size: int,
        max_seq_len: int,
        kv_cache_gb: float | None = None,
    ) -> None:
        """max_batch_size: sequences at a time, at most.

        They are fewer when the cache would take more than kv_cache_gb per rank, or, when that is
        not given, more than half the free memory. max_seq_len: prompt and response together never
        exceed it.
        """
        self.model, self.parallel, self.kv_cache_gb = model, parallel, kv_cache_gb
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        stop: Stop | set[int],
        samples: list[int] | None = None,
        on_tokens: OnTokens | None = None,
        on_completion: Callable[[int, Completion], None] | None = None,
        keep_masks: bool = False,
    ) -> list[Completion]:
        """A completion for each prompt (ids, BOS included), in their order.

        samples: an id for each prompt that, with the seed, fixes what is drawn (its index by
        default); on_tokens(finished, new tokens, running) is called once a step,
        on_completion(index, completion) as each is done; keep_masks: see Completion.
        """
        stop = stop if isinstance(stop, Stop) else Stop(stop)
        limits = [
            min(sampling.max_new_tokens, self.max_seq_len - len(prompt)) for prompt in prompts
        ]
        # Prompts that leave no room for a response are done.
        done = {i: Completion([], [], "length") for i, limit in enumerate(limits) if limit <= 0}
        for i, completion in done.items():
            if on_completion:
                on_completion(i, completion)
        waiting = self._queue(prompts, [i for i in range(len(prompts)) if i not in done])
        if not waiting:
            return [done[i] for i in range(len(prompts))]
        # The cache, for as many as run together at most, and the slots' state.
        cache_length = max(
            len(prompts[i]) + limits[i] for request in waiting for i in request.waiting
        )
        n_slots = self._slots_that_fit(
            sum(len(request.waiting) for request in waiting), cache_length
        )
        device = self.parallel.device
        cache = Cache(self.model, n_slots, cache_length)
        slots = Slots(n_slots, sampling.max_new_tokens, device)
        if sampling.repetition_penalty != 1:
            slots.seen = torch.zeros(
                n_slots, self.model.vocabulary_part, dtype=torch.bool, device=device
            )
        if keep_masks and sampling.leaves_out:
            slots.kept = torch.zeros(
                n_slots,
                sampling.max_new_tokens,
                -(-self.model.vocabulary_part // 8),
                dtype=torch.uint8,
                device=device,
            )
        stops = torch.tensor(sorted(stop.ids), dtype=torch.long, device=device)
        running = 0
        with packed_weights(self.model, self.parallel):
            while waiting or running:
                # One forward: new prompts into the free slots, or else a token for all that run.
                news = self._admit(waiting, n_slots - running)
                if news:
                    rows = slice(running, running + sum(len(request.waiting) for request in news))
                    logits = self._prefill(news, cache, slots, rows, samples, limits)
                else:
                    rows = slice(0, running)
                    logits = self._decode(slots, running, cache)
                self._choose(logits, slots, rows, sampling, stops)
                running = max(running, rows.stop)
                # What ended leaves its slot to the last that runs, from behind: that one has not
                # ended.
                ended = self._ended(slots, rows, stops, stop)
                for slot, by_stop, steps in reversed(ended):
                    i = slots.requests[slot]
                    completion = done[i] = Completion(
                        slots.tokens[slot, :steps].tolist(),
                        slots.logprobs[slot, :steps].tolist(),
                        "stop" if by_stop else "length",
                        None if slots.kept is None else slots.kept[slot, :steps].clone(),
                    )
                    if on_completion:
                        on_completion(i, completion)
                    running -= 1
                    if slot != running:
                        cache.copy(running, slot, slots.host_lengths[running])
                        slots.move(running, slot)
                if on_tokens:
                    on_tokens(
                        [steps for _, _, steps in ended],
                        [
                            length - len(prompts[i]) + 1  # the newest is not in the cache
                            for i, length in zip(slots.requests[:running], slots.host_lengths)
                        ],
                    )
        return [done[i] for i in range(len(prompts))]

    def _queue(self, prompts: list[list[int]], wanted: list[int]) -> deque[Request]:
        """Each different prompt once, longest first."""
        requests: dict[tuple[int, ...], Request] = {}
        for i in wanted:
            requests.setdefault(tuple(prompts[i]), Request(prompts[i])).waiting.append(i)
        return deque(sorted(requests.values(), key=lambda request: -len(request.prompt)))

    def _admit(self, waiting: deque[Request], free: int) -> list[Request]:
        """What to start now, longest first.

        As much as there are free slots and fits a forward's token budget.
        """
        admitted: list[Request] = []
        while waiting and free > 0:
            head = waiting[0]
            if admitted and (len(admitted) + 1) * len(admitted[0].prompt) > PREFILL_TOKENS:
                break  # a prompt longer than the budget goes by itself
            now, later = head.waiting[:free], head.waiting[free:]
            admitted.append(Request(head.prompt, now))
            free -= len(now)
            if later:
                head.waiting = later
            else:
                waiting.popleft()
        return admitted

    def _prefill(
        self,
        admitted: list[Request],
        cache: Cache,
        slots: Slots,
        rows: slice,
        samples: list[int] | None,
        limits: list[int],
    ) -> Tensor:
        """The new requests' state and cache, and the logits after each prompt.

        First one slot per prompt, then its copies.
        """
        device = self.parallel.device
        lengths = [len(request.prompt) for request in admitted]
        tokens = torch.tensor(
            [token for request in admitted for token in request.prompt], device=device
        )
        layout = Prefill(lengths, cache, rows.start, device)
        logits = self.model.logits(self.model(tokens, layout, layout.ends))
        # For each slot the admitted request whose prompt it has, and who waits for its sample.
        source = [
            *range(len(admitted)),
            *(g for g, request in enumerate(admitted) for _ in request.waiting[1:]),
        ]
        requests = [
            *(request.waiting[0] for request in admitted),
            *(i for request in admitted for i in request.waiting[1:]),
        ]
        if len(requests) > len(admitted):
            originals = torch.tensor(source[len(admitted) :], device=device) + rows.start
            copies = torch.arange(rows.start + len(admitted), rows.stop, device=device)
            cache.copy(originals, copies, max(lengths))
            logits = logits[torch.tensor(source, device=device)]
        slots.requests[rows] = requests
        slots.host_lengths[rows] = [lengths[g] for g in source]
        slots.lengths[rows] = slots.prompts[rows] = torch.tensor(
            slots.host_lengths[rows], device=device
        )
        slots.samples[rows] = torch.tensor(
            [samples[i] if samples else i for i in requests], device=device
        )
        slots.limits[rows] = torch.tensor([limits[i] for i in requests], device=device)
        slots.steps[rows] = 0
        if slots.seen is not None:
            slots.seen[rows] = False
            for slot, g in zip(range(rows.start, rows.stop), source):
                prompt = torch.tensor([admitted[g].prompt], device=device)
                self._mark_seen(slots.seen[slot : slot + 1], prompt)
        return logits

    def _decode(self, slots: Slots, n: int, cache: Cache) -> Tensor:
        """The logits after the newest token of each of the first n slots."""
        # On the CPU neighbours read as much of the cache as the longest of them needs; groups that
        # need the same are one.
        width = NEIGHBOURS if self.parallel.device.type == "cpu" else n
        contexts: list[tuple[int, int, int]] = []
        for first in range(0, n, width):
            end = min(first + width, n)
            longest = max(slots.host_lengths[first:end]) + 1
            context = min(-(-longest // CONTEXT_STEP) * CONTEXT_STEP, cache.length)
            if contexts and contexts[-1][2] == context:
                contexts[-1] = (contexts[-1][0], end, context)
            else:
                contexts.append((first, end, context))
        layout = Decode(cache, slots.lengths[:n], slots.prompts[:n], contexts)
        logits = self.model.logits(self.model(slots.last[:n], layout))
        slots.lengths[:n] += 1
        for slot in range(n):
            slots.host_lengths[slot] += 1
        return logits

    def _choose(
        self, logits: Tensor, slots: Slots, rows: slice, sampling: Sampling, stops: Tensor
    ) -> None:
        """The next token of the rows' sequences, into their state."""
        steps = slots.steps[rows]
        seen = None if slots.seen is None else slots.seen[rows]
        z = constrained(logits, sampling, steps, stops, seen)
        tokens, logprobs, kept = choose(z, sampling, slots.samples[rows], steps)
        slots.last[rows] = tokens
        slots.tokens[rows].scatter_(1, steps.unsqueeze(1), tokens.unsqueeze(1))
        slots.logprobs[rows].scatter_(1, steps.unsqueeze(1), logprobs.unsqueeze(1))
        if seen is not None:
            self._mark_seen(seen, tokens.unsqueeze(1))
        if slots.kept is not None and kept is not None:
            numbers = rows.start + torch.arange(len(steps), device=steps.device)
            slots.kept[numbers, steps] = pack_bits(kept)
        slots.steps[rows] += 1

    def _mark_seen(self, seen: Tensor, tokens: Tensor) -> None:
        """Mark the tokens, [n, any], in [n, vocabulary / ranks] of this rank."""
        start, stop = vocab_range(seen.size(-1))
        is_local = (tokens >= start) & (tokens < stop)
        row, column = is_local.nonzero(as_tuple=True)
        seen[row, tokens[row, column] - start] = True

    def _ended(
        self, slots: Slots, rows: slice, stops: Tensor, stop: Stop
    ) -> list[tuple[int, bool, int]]:
        """(slot, whether by a stop, new tokens) of the sequences that just ended, by slot."""
        stopped = torch.isin(slots.last[rows], stops)
        if stop.strings:
            stopped |= torch.tensor(self._holds_string(slots, rows, stop), device=stopped.device)
        ended = (stopped | (slots.steps[rows] >= slots.limits[rows])).nonzero().squeeze(1)
        # The one look at the device per step: which sequences ended, and why.
        states = torch.stack((ended, stopped[ended], slots.steps[rows][ended]), 1).tolist()
        return [(rows.start + offset, bool(by_stop), steps) for offset, by_stop, steps in states]

    def _holds_string(self, slots: Slots, rows: slice, stop: Stop) -> list[bool]:
        """Whether the end of each row's text has a stop string."""
        assert stop.decode is not None  # it comes with the strings
        tail, holds = stop.tail(), []
        steps, tokens = slots.steps[rows].tolist(), slots.tokens[rows].tolist()
        for step, row in zip(steps, tokens):
            text = stop.decode(row[max(0, step - tail) : step])
            holds.append(any(string in text for string in stop.strings))
        return holds

    def _slots_that_fit(self, wanted: int, length: int) -> int:
        """As many as are wanted, allowed, and fit the memory on the fullest rank; one at least."""
        config, device = self.model.config, self.parallel.device
        numbers = 2 * config.n_layers * self.model.kv_heads * config.head_dim * length
        per_slot = numbers * self.model.norm.weight.dtype.itemsize
        if self.kv_cache_gb is None:
            room = _free_bytes(device) // 2
        else:
            room = int(self.kv_cache_gb * 1e9)
        fits = torch.tensor(min(wanted, self.max_batch_size, room // per_slot), device=device)
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
    stop: Stop | set[int],
    samples: list[int] | None = None,
    on_tokens: OnTokens | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """`Engine.generate` over the data-parallel ranks: each takes its share, all get everything.

    on_completion is called on the rank that has it. Samples of one prompt stay on one rank, where
    it is prefilled once, unless there are too few different prompts for that.
    """
    parallel = engine.parallel
    different: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        different.setdefault(tuple(prompt), []).append(i)
    # What stays together, dealt out in turn, the longest prompts first.
    together = (
        list(different.values())
        if len(different) >= parallel.dp_size
        else [[i] for i in range(len(prompts))]
    )
    together.sort(key=lambda requests: -len(prompts[requests[0]]))
    local = [i for requests in together[parallel.dp_rank :: parallel.dp_size] for i in requests]
    local_prompts = [prompts[i] for i in local]
    local_samples = [samples[i] if samples else i for i in local]

    # The other ranks are about as far.
    def report(ended: list[int], running: list[int]) -> None:
        if on_tokens:
            on_tokens(ended * parallel.dp_size, running * parallel.dp_size)

    def finish(place: int, completion: Completion) -> None:
        if on_completion:
            on_completion(local[place], completion)

    completions = engine.generate(local_prompts, sampling, stop, local_samples, report, finish)
    parts = [list(zip(local, completions))] * parallel.dp_size
    if parallel.dp_size > 1:
        dist.all_gather_object(parts, list(zip(local, completions)), group=parallel.dp_group)
    completion_of = dict(pair for part in parts for pair in part)
    return [completion_of[i] for i in range(len(prompts))]
