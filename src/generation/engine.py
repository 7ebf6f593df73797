"""Generation with continuous batching: a finished sequence's slot takes the next prompt at once.

The running sequences always fill the first n slots, so that decoding works on slices, never on copies, of the cache. A prompt
of which several samples are wanted is prefilled once.
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
NEIGHBOURS = 16  # slots that read the same length of the cache, on the CPU: no more than the longest of them needs
PREFILL_TOKENS = 16384


@dataclass
class Completion:
    """What one prompt brought. `stop_reason`: "stop" (a stop token, kept as the last of `tokens`, or a string) or "length".

    kept: when asked for, which tokens of this rank's part of the vocabulary each choice was among, as bits, [tokens, bytes].
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str
    kept: Tensor | None = None


@dataclass(frozen=True)
class Stop:
    """What ends a response: any of the token ids, or its text (by `decode`) holding any of the strings."""

    ids: frozenset[int] | set[int]
    strings: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    def tail(self) -> int:
        """How many of the last tokens can hold a stop string: a token has at least a byte, but for a few special ones."""
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
        self.prompts = torch.zeros(
            n, dtype=torch.long, device=device
        )  # those of them that were the prompt
        self.limits = torch.zeros(n, dtype=torch.long, device=device)  # new tokens allowed
        self.steps = torch.zeros(n, dtype=torch.long, device=device)  # new tokens so far
        self.last = torch.zeros(n, dtype=torch.long, device=device)  # the newest token
        self.tokens = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n, max_new_tokens, device=device)
        self.seen: Tensor | None = (
            None  # tokens of this rank's vocabulary that a sequence holds, [n, vocabulary / ranks]
        )
        self.kept: Tensor | None = (
            None  # bits of what was kept at each choice, [n, max_new_tokens, bytes]
        )

    def move(self, source: int, target: int) -> None:
        self.requests[target], self.host_lengths[target] = (
            self.requests[source],
            self.host_lengths[source],
        )
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
        """max_batch_size: sequences at a time, at most; fewer when the cache would take more than kv_cache_gb per rank, or,

        when that is not given, more than half the free memory. max_seq_len: prompt and response together never exceed it.
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
        on_tokens: Callable[[int, int, int], None] | None = None,
        on_completion: Callable[[int, Completion], None] | None = None,
        keep_masks: bool = False,
    ) -> list[Completion]:
        """A completion for each prompt (ids, BOS included), in their order.

        samples: an id for each prompt that, with the seed, fixes what is drawn (its index by default); on_tokens(finished, new
        tokens, running) is called once a step, on_completion(index, completion) as each is done; keep_masks: see Completion.
        """
        stop = stop if isinstance(stop, Stop) else Stop(stop)
        limits = [
            min(sampling.max_new_tokens, self.max_seq_len - len(prompt)) for prompt in prompts
        ]
        done: list[Completion | None] = [
            None if limit > 0 else Completion([], [], "length") for limit in limits
        ]
        for i, completion in enumerate(done):
            if completion is not None and on_completion:
                on_completion(i, completion)
        waiting = self._queue(prompts, [i for i, c in enumerate(done) if c is None])
        if not waiting:
            return done
        cache_length = max(
            len(prompts[i]) + limits[i] for request in waiting for i in request.waiting
        )
        n_slots = self._slots_that_fit(
            sum(len(request.waiting) for request in waiting), cache_length
        )
        device = self.parallel.device
        cache, slots = (
            Cache(self.model, n_slots, cache_length),
            Slots(n_slots, sampling.max_new_tokens, device),
        )
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
                news = self._admit(waiting, n_slots - running)
                if news:
                    rows = slice(running, running + sum(len(request.waiting) for request in news))
                    logits = self._prefill(news, cache, slots, rows, samples, limits)
                else:
                    rows = slice(0, running)
                    logits = self._decode(slots, running, cache)
                self._choose(logits, slots, rows, sampling, stops)
                running = max(running, rows.stop)
                ended = self._ended(slots, rows, stops, stop)
                for slot, by_stop, steps in reversed(ended):
                    i = slots.requests[slot]
                    done[i] = Completion(
                        slots.tokens[slot, :steps].tolist(),
                        slots.logprobs[slot, :steps].tolist(),
                        "stop" if by_stop else "length",
                        None if slots.kept is None else slots.kept[slot, :steps].clone(),
                    )
                    if on_completion:
                        on_completion(i, done[i])
                    running -= 1
                    if slot != running:
                        cache.copy(running, slot, slots.host_lengths[running])
                        slots.move(running, slot)
                if on_tokens:
                    on_tokens(len(ended), rows.stop - rows.start, running)
        return done

    def _queue(self, prompts: list[list[int]], wanted: list[int]) -> deque[Request]:
        """Each different prompt once, longest first."""
        requests: dict[tuple[int, ...], Request] = {}
        for i in wanted:
            requests.setdefault(tuple(prompts[i]), Request(prompts[i])).waiting.append(i)
        return deque(sorted(requests.values(), key=lambda request: -len(request.prompt)))

    def _admit(self, waiting: deque[Request], free: int) -> list[Request]:
        """What to start now, longest first: as much as there are free slots and fits a forward's token budget."""
        news: list[Request] = []
        while waiting and free > 0:
            head = waiting[0]
            if news and (len(news) + 1) * len(news[0].prompt) > PREFILL_TOKENS:
                break  # a prompt longer than the budget goes by itself
            now, later = head.waiting[:free], head.waiting[free:]
            news.append(Request(head.prompt, now))
            free -= len(now)
            if later:
                head.waiting = later
            else:
                waiting.popleft()
        return news

    def _prefill(
        self,
        news: list[Request],
        cache: Cache,
        slots: Slots,
        rows: slice,
        samples: list[int] | None,
        limits: list[int],
    ) -> Tensor:
        """The new requests' state and cache, and the logits after each prompt: first one slot per prompt, then its copies."""
        device = self.parallel.device
        lengths = [len(request.prompt) for request in news]
        tokens = torch.tensor(
            [token for request in news for token in request.prompt], device=device
        )
        layout = Prefill(lengths, cache, rows.start, device)
        logits = self.model.logits(self.model(tokens, layout, layout.ends))
        source = [
            *range(len(news)),
            *(g for g, request in enumerate(news) for _ in request.waiting[1:]),
        ]
        requests = [request.waiting[0] for request in news] + [
            i for request in news for i in request.waiting[1:]
        ]
        if len(requests) > len(news):
            copies = torch.arange(rows.start + len(news), rows.stop, device=device)
            cache.copy(
                torch.tensor(source[len(news) :], device=device) + rows.start, copies, max(lengths)
            )
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
                self._see(
                    slots.seen[slot : slot + 1], torch.tensor([news[g].prompt], device=device)
                )
        return logits

    def _decode(self, slots: Slots, n: int, cache: Cache) -> Tensor:
        width = NEIGHBOURS if self.parallel.device.type == "cpu" else n
        contexts = []
        for first in range(0, n, width):
            longest = max(slots.host_lengths[first : min(first + width, n)]) + 1
            context = min(-(-longest // CONTEXT_STEP) * CONTEXT_STEP, cache.length)
            if contexts and contexts[-1][2] == context:
                contexts[-1] = (contexts[-1][0], min(first + width, n), context)
            else:
                contexts.append((first, min(first + width, n), context))
        logits = self.model.logits(
            self.model(
                slots.last[:n], Decode(cache, slots.lengths[:n], slots.prompts[:n], contexts)
            )
        )
        slots.lengths[:n] += 1
        for slot in range(n):
            slots.host_lengths[slot] += 1
        return logits

    def _choose(
        self, logits: Tensor, slots: Slots, rows: slice, sampling: Sampling, stops: Tensor
    ) -> None:
        steps = slots.steps[rows]
        z = constrained(
            logits, sampling, steps, stops, None if slots.seen is None else slots.seen[rows]
        )
        tokens, logprobs, kept = choose(z, sampling, slots.samples[rows], steps)
        slots.last[rows] = tokens
        slots.tokens[rows].scatter_(1, steps.unsqueeze(1), tokens.unsqueeze(1))
        slots.logprobs[rows].scatter_(1, steps.unsqueeze(1), logprobs.unsqueeze(1))
        if slots.seen is not None:
            self._see(slots.seen[rows], tokens.unsqueeze(1))
        if slots.kept is not None:
            slots.kept[rows.start + torch.arange(len(steps), device=steps.device), steps] = (
                pack_bits(kept)
            )
        slots.steps[rows] += 1

    def _see(self, seen: Tensor, tokens: Tensor) -> None:
        """Mark the tokens, [n, any], in [n, vocabulary / ranks] of this rank."""
        start, stop = vocab_range(seen.size(-1))
        here = (tokens >= start) & (tokens < stop)
        row, column = here.nonzero(as_tuple=True)
        seen[row, tokens[row, column] - start] = True

    def _ended(
        self, slots: Slots, rows: slice, stops: Tensor, stop: Stop
    ) -> list[tuple[int, bool, int]]:
        """(slot, whether by a stop, new tokens) of the sequences that just ended, in order of slots."""
        stopped = torch.isin(slots.last[rows], stops)
        if stop.strings:
            stopped |= torch.tensor(self._holds_string(slots, rows, stop), device=stopped.device)
        ended = (stopped | (slots.steps[rows] >= slots.limits[rows])).nonzero().squeeze(1)
        # The one look at the device per step: which sequences ended, and why.
        found = torch.stack((ended, stopped[ended], slots.steps[rows][ended]), 1).tolist()
        return [(rows.start + offset, bool(by_stop), steps) for offset, by_stop, steps in found]

    def _holds_string(self, slots: Slots, rows: slice, stop: Stop) -> list[bool]:
        tail, found = stop.tail(), []
        steps, tokens = slots.steps[rows].tolist(), slots.tokens[rows].tolist()
        for step, row in zip(steps, tokens):
            text = stop.decode(row[max(0, step - tail) : step])
            found.append(any(string in text for string in stop.strings))
        return found

    def _slots_that_fit(self, wanted: int, length: int) -> int:
        """As many as are wanted, allowed, and fit the memory for the cache on the fullest rank; one at least."""
        config, dtype = self.model.config, self.model.norm.weight.dtype
        per_slot = (
            2 * config.n_layers * self.model.kv_heads * config.head_dim * length * dtype.itemsize
        )
        room = (
            _free_bytes(self.parallel.device) // 2
            if self.kv_cache_gb is None
            else int(self.kv_cache_gb * 1e9)
        )
        fits = torch.tensor(
            min(wanted, self.max_batch_size, room // per_slot), device=self.parallel.device
        )
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
    on_tokens: Callable[[int, int, int], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """`Engine.generate` over the data-parallel ranks: each takes its share of the prompts, all get all completions.

    on_completion is called on the rank that has it. Samples of one prompt stay on one rank, where it is prefilled once,

    unless there are too few different prompts for that.
    """
    parallel = engine.parallel
    different: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        different.setdefault(tuple(prompt), []).append(i)
    together = (
        list(different.values())
        if len(different) >= parallel.dp_size
        else [[i] for i in range(len(prompts))]
    )
    together.sort(key=lambda requests: -len(prompts[requests[0]]))
    mine = [i for requests in together[parallel.dp_rank :: parallel.dp_size] for i in requests]
    ids = [samples[i] if samples else i for i in mine]

    def report(
        finished: int, new_tokens: int, running: int
    ) -> None:  # the other ranks are about as far
        if on_tokens:
            on_tokens(
                finished * parallel.dp_size,
                new_tokens * parallel.dp_size,
                running * parallel.dp_size,
            )

    def finish(place: int, completion: Completion) -> None:
        if on_completion:
            on_completion(mine[place], completion)

    completions = engine.generate([prompts[i] for i in mine], sampling, stop, ids, report, finish)
    if parallel.dp_size == 1:
        gathered = [list(zip(mine, completions))]
    else:
        gathered = [None] * parallel.dp_size
        dist.all_gather_object(gathered, list(zip(mine, completions)), group=parallel.dp_group)
    whole = dict(pair for part in gathered for pair in part)
    return [whole[i] for i in range(len(prompts))]
