"""Generation with continuous batching, by a model in place: its own weights, no second copy.

`Engine.generate` answers a list of prompts. Underneath is a `Session` that others can drive, too:
add a request, take a step, see what is new, cancel what nobody wants any more. The scheduler says
who runs, the runner computes; a session hands each what the other found out.
"""

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from src.generation.cache import Cache, pages_for
from src.generation.runner import RUNS, STOPPED, Outcome, Runner
from src.generation.sampling import Sampling
from src.generation.scheduler import READ_ALONE, Request, Scheduler
from src.models.transformer import Transformer
from src.parallel import deterministic
from src.parallel.layers import packed_weights
from src.parallel.setup import Parallel

LOOK_EVERY = 4  # tokens, after which a response is searched for stop strings
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

    def first_end(self, tokens: list[int], looked_at: int) -> int | None:
        """How many tokens there are when a string has come, beyond the first `looked_at`, or None.

        First one look at all of these; only if they hold one, where it ends.
        """
        assert self.decode is not None  # it comes with the strings
        if not self._holds(tokens, looked_at + 1, len(tokens)):
            return None
        ends = range(looked_at + 1, len(tokens) + 1)
        return next((end for end in ends if self._holds(tokens, end, end)), None)

    def _holds(self, tokens: list[int], first_end: int, end: int) -> bool:
        assert self.decode is not None
        text = self.decode(tokens[max(0, first_end - self.tail()) : end])
        return any(string in text for string in self.strings)


@dataclass
class Step:
    """What a session's step brought: requests that have one more token, and those that ended.

    A request's `tokens`, `logprobs` and `stop_reason` say what it has come to.
    """

    new: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)


class Session:
    """Requests that come and go, answered side by side. Use it in a `with`.

    All ranks of a model add, step and cancel alike; the weights stay as they are meanwhile.
    """

    def __init__(
        self,
        engine: "Engine",
        sampling: Sampling,
        stop: Stop,
        slots: int,
        longest: int,
        pages: int | None = None,
        keep_masks: bool = False,
        on_tokens: OnTokens | None = None,
        in_a_hurry: bool = True,
    ) -> None:
        """slots: requests that run at a time, at most; longest: tokens of one, prompt and response.

        in_a_hurry: somebody waits for each token, so that long prompts are read a little at a time.
        pages: that can be of use at all (by default as many as all slots can fill); there are
        fewer where the memory has no room for them. on_tokens(ended, running) is told after each
        forward how many tokens those responses have that ended, and those that run.
        """
        model, parallel = engine.model, engine.parallel
        wanted = pages or slots * pages_for(longest)
        besides = bytes_besides(model, slots, sampling, keep_masks)
        pages = engine.pages_that_fit(wanted, pages_for(longest), besides)
        config = model.config
        self.scheduler = Scheduler(
            slots,
            pages + 1,  # one is nobody's
            parallel.device.type,
            config.use_dynamic_ntk and longest > config.max_seq_len,
            deterministic.is_on(),
            in_a_hurry,
        )
        self.runner = Runner(
            model,
            parallel,
            slots,
            pages + 1,
            longest,
            sampling,
            stop.ids,
            keep_masks,
            engine.use_graphs,
        )
        self.longest, self.stop, self.on_tokens = longest, stop, on_tokens
        self.delay = engine.delay
        self._outcomes: deque[Outcome] = deque()
        self._weights = packed_weights(model, parallel)

    def __enter__(self) -> "Session":
        self._weights.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._outcomes.clear()
        self.runner.close()
        self._weights.__exit__(*exception)

    @property
    def is_idle(self) -> bool:
        return self.scheduler.is_idle

    def add(self, request: Request) -> None:
        """Have it answered. Raises ValueError for one that has no room."""
        length = len(request.prompt) + request.limit
        if request.limit < 1 or not request.prompt or length > self.longest:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and up to {request.limit} new ones: "
                f"both at least 1, and at most {self.longest} together"
            )
        self.scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget about it, whether it waits or runs; one that has ended stays as it is."""
        if not request.stop_reason:
            self.scheduler.remove(request)
            request.stop_reason = "cancelled"

    @torch.no_grad()
    def step(self) -> Step:
        """Read prompts, if it is time; then a token for all that runs."""
        scheduler, runner, step = self.scheduler, self.runner, Step()
        reading = scheduler.read()
        if reading.pieces:
            self._assign()
            self._expect(runner.read(reading), step)
        if scheduler.lacks_pages():
            self._settle(step, 0)  # what has ended has pages to give
            while scheduler.lacks_pages():
                youngest = scheduler.youngest()
                youngest.kept += runner.masks(youngest)
                scheduler.preempt(youngest)
        if scheduler.running:
            scheduler.grow()
            self._assign()
            context = max(request.cached for request in scheduler.running)
            self._expect(runner.decode([*scheduler.running], context), step)
        else:
            self._settle(step, 0)
        return step

    def _assign(self) -> None:
        self.runner.assign(self.scheduler.assigned)
        self.scheduler.assigned = []

    def _expect(self, outcome: Outcome | None, step: Step) -> None:
        if outcome is not None:
            self._outcomes.append(outcome)
            self._settle(step, self.delay)

    def _settle(self, step: Step, delay: int) -> None:
        """Hear of what forwards brought, but for the last `delay` of them."""
        while len(self._outcomes) > delay:
            outcome, ended = self._outcomes.popleft(), []
            for request, (token, logprob, state) in zip(outcome.requests, outcome.arrived()):
                # What it brought for those that had ended already, or were cancelled, is surplus.
                if not request.stop_reason:
                    request.tokens.append(int(token))
                    request.logprobs.append(logprob)
                    step.new.append(request)
                    request.stop_reason = self._reason(request, state)
                    if request.stop_reason:
                        ended.append(request)
            for request in ended:
                request.kept += self.runner.masks(request)
                self.scheduler.remove(request)
            step.ended += ended
            if self.on_tokens:
                begun = [len(request.tokens) for request in self.scheduler.begun()]
                self.on_tokens([len(request.tokens) for request in ended], begun)

    def _reason(self, request: Request, state: float) -> str:
        """Why the response ends with its newest token, or nothing; cut after a stop string."""
        length = len(request.tokens)
        if self.stop.strings and (state != RUNS or length % LOOK_EVERY == 0):
            looked_at = (length - 1) // LOOK_EVERY * LOOK_EVERY
            end = self.stop.first_end(request.tokens, looked_at)
            if end is not None:
                del request.tokens[end:], request.logprobs[end:]
                return "stop"
        if state == RUNS:
            return ""
        return "stop" if state == STOPPED else "length"


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
        """max_batch_size: sequences at a time, at most; max_seq_len: tokens of one, prompt and all.

        The cache takes kv_cache_gb per rank at most, or, when that is not given, half the free
        memory of a CPU and most of a GPU's. Sequences that find no room in it wait.
        """
        self.model, self.parallel, self.kv_cache_gb = model, parallel, kv_cache_gb
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.use_graphs = True  # on CUDA
        # How many forwards later the host hears of what one brought, so that the GPU need not wait.
        self.delay = 1 if parallel.device.type == "cuda" else 0

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
        default); on_tokens(new tokens of those that ended, of those that run) is called once a
        forward, on_completion(index, completion) as each is done; keep_masks: see Completion.
        """
        stop = stop if isinstance(stop, Stop) else Stop(stop)
        done: dict[int, Completion] = {}

        def finish(i: int, completion: Completion) -> None:
            done[i] = completion
            if on_completion:
                on_completion(i, completion)

        # Prompts that leave no room for a response are done.
        requests: list[Request] = []
        first: dict[tuple[int, ...], int] = {}
        for i, prompt in enumerate(prompts):
            first.setdefault(tuple(prompt), i)
            limit = min(sampling.max_new_tokens, self.max_seq_len - len(prompt))
            if limit > 0:
                requests.append(Request(prompt, limit, samples[i] if samples else i, i))
            else:
                finish(i, Completion([], [], "length"))
        if requests:
            # The longest first, and samples of one prompt together, which is read once for them.
            requests.sort(key=lambda r: (-len(r.prompt), first[tuple(r.prompt)]))
            lengths = [len(request.prompt) + request.limit for request in requests]
            slots = min(len(requests), self.max_batch_size)
            pages = sum(sorted(map(pages_for, lengths))[-slots:])
            session = Session(
                self, sampling, stop, slots, max(lengths), pages, keep_masks, on_tokens, False
            )
            with session:
                for request in requests:
                    session.add(request)
                while not session.is_idle:
                    for request in session.step().ended:
                        finish(request.name, completion_of(request))
            if session.scheduler.preempted and self.parallel.is_main:
                logging.getLogger(__name__).warning(
                    "The cache was full: %d times a sequence gave its room back and was read again "
                    "later. More memory (--kv_cache_gb) or fewer at a time (--max_batch_size) "
                    "spares that.",
                    session.scheduler.preempted,
                )
        return [done[i] for i in range(len(prompts))]

    def pages_that_fit(self, wanted: int, least: int, besides: int = 0) -> int:
        """As many as are wanted and fit the memory on the fullest rank; `least` in any case.

        besides: bytes that have to be left, of a GPU's memory.
        """
        if self.kv_cache_gb is None:
            room = _free_bytes(self.parallel.device, besides)
        else:
            room = int(self.kv_cache_gb * 1e9)
        fits = min(wanted, room // Cache.page_bytes(self.model))
        agreed = torch.tensor(fits, device=self.parallel.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.parallel.mp_group)
        return max(least, int(agreed))


def completion_of(request: Request) -> Completion:
    """What a request that ended came to."""
    kept = torch.cat(request.kept)[: len(request.tokens)] if request.kept else None
    return Completion(request.tokens, request.logprobs, request.stop_reason, kept)


def bytes_besides(model: Transformer, slots: int, sampling: Sampling, keep_masks: bool) -> int:
    """About what a session takes beside weights and cache: logits, prompts at work, masks."""
    size, part = model.dtype.itemsize, model.vocabulary_part
    # Logits in their dtype and in fp32, their exponentials, and what choosing makes of them.
    logits = slots * part * 24
    widest = max(model.config.hidden_dim, model.config.dim)
    masks = slots * sampling.max_new_tokens * part // 8 if keep_masks and sampling.leaves_out else 0
    return logits + READ_ALONE * 6 * widest * size + masks


def _free_bytes(device: torch.device, besides: int) -> int:
    """Memory that the cache of this rank may take.

    That is most of what is free on the GPU, or half of its share of the host's.
    """
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept_by_torch
        return max(0, free - besides) * 3 // 4
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available // ranks_here // 2


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
