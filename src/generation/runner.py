"""One step of generation over buffers that stay where they are.

What a sequence is at lies in its slot, a row of `state`; a step names the slots it is for. It waits
for nothing on the host, so that on CUDA it is captured as a graph, for a few numbers of sequences,
and replayed; rows that only fill it up are of a slot that is nobody's. On the CPU the same function
is simply called.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from src.generation.cache import Cache, Chunk, Decode, pages_for
from src.generation.sampling import Sampling, choose, constrained
from src.generation.scheduler import Reading, Request
from src.kernels import cpu
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.parallel.vocab import pack_bits, vocab_range

# The columns of `state`: the newest token; tokens in the cache, in the response, in the prompt, and
# allowed in the response; what fixes the draws; why it ended.
LAST, LENGTH, STEP, PROMPT, LIMIT, SAMPLE, ENDED = range(7)
RUNS, STOPPED, FULL = range(3)  # of the column ENDED
GRAPH_SIZES = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 4097, 32)]


@dataclass
class Outcome:
    """What a forward brings, on its way to the host: a row (token, log-probability, ENDED) each."""

    requests: list[Request]
    rows: Tensor  # [n, 3], fp64
    event: torch.cuda.Event | None = None

    def arrived(self) -> list[list[float]]:
        if self.event is not None:
            self.event.synchronize()
        return self.rows.tolist()


class Runner:
    """The cache and the slots' state, and the forwards over them."""

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        slots: int,
        pages: int,
        longest: int,
        sampling: Sampling,
        stop_ids: set[int] | frozenset[int],
        keep_masks: bool = False,
        use_graphs: bool = True,
    ) -> None:
        """longest: tokens of a prompt and its response at most; keep_masks: see `Completion`."""
        self.model, self.device, self.sampling = model, parallel.device, sampling
        self.slots, self.longest, self.new_tokens = slots, longest, sampling.max_new_tokens
        self.cache = Cache(model, pages)
        # One slot more than there are sequences: nobody's.
        self.state = torch.zeros(slots + 1, 7, dtype=torch.long, device=self.device)
        self.state[slots, ENDED] = FULL
        width = pages_for(longest)
        self.table = torch.zeros(slots + 1, width, dtype=torch.int32, device=self.device)
        # the slots of a step's rows, and the same as the host knows it
        self.rows = torch.full((_graph_size(slots),), slots, dtype=torch.long, device=self.device)
        self._rows: list[int] = []
        # Which tokens of the whole vocabulary end a response, and which columns of this rank's.
        part = model.vocabulary_part
        n_tokens = part * parallel.mp_size
        self.is_stop = torch.zeros(n_tokens, dtype=torch.bool, device=self.device)
        self.is_stop[[i for i in sorted(stop_ids) if 0 <= i < n_tokens]] = True
        start, stop = vocab_range(part)
        columns = [i - start for i in sorted(stop_ids) if start <= i < stop]
        self.stop_columns = torch.tensor(columns, dtype=torch.long, device=self.device)
        # tokens of this rank's vocabulary that a sequence holds, [slots + 1, vocabulary / ranks]
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(slots + 1, part, dtype=torch.bool, device=self.device)
        # bits of what was kept at each choice, [slots + 1, new tokens + 1, bytes]
        self.kept: Tensor | None = None
        if keep_masks and sampling.leaves_out:
            shape = slots + 1, self.new_tokens + 1, -(-part // 8)
            self.kept = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] | None = (
            {} if use_graphs and can_capture(model, parallel) else None
        )
        self._held: list[Tensor | None] = []  # what graphs read, and the model may replace

    def assign(self, assigned: list[tuple[int, int, int]]) -> None:
        """Write new pages, (slot, place, page), into the table."""
        if assigned:
            places = [slot * self.table.size(1) + place for slot, place, _ in assigned]
            places_pages = self._upload([places, [page for _, _, page in assigned]])
            self.table.view(-1).index_copy_(0, places_pages[0], places_pages[1].int())

    def read(self, reading: Reading) -> Outcome | None:
        """One forward over prompts, and the first tokens of those that are whole."""
        pieces = reading.pieces
        layout = Chunk(
            self.cache,
            [stop - start for _, start, stop in pieces],
            [start for _, start, _ in pieces],
            [request.pages for request, _, _ in pieces],
            [len(request.prompt) for request, _, _ in pieces],
            self.device,
        )
        tokens = [token for request, start, stop in pieces for token in request.text[start:stop]]
        # The last rows of the pieces that end a text; those that have the same one share it.
        ends = sorted({piece for _, piece in reading.read})
        rows = layout.ends[self._upload(ends)]
        hidden = self.model(self._upload(tokens), layout, rows)
        if not reading.read:
            return None
        if reading.copies:
            sources, targets = self._upload([list(pair) for pair in zip(*reading.copies)])
            self.cache.copy(sources, targets)
        requests = [request for request, _ in reading.read]
        source = self._upload([ends.index(piece) for _, piece in reading.read])
        logits = self.model.logits(hidden)[source]
        slots = self._upload([request.slot for request in requests])
        state = self._upload([_state_of(request) for request in requests])
        if self.seen is not None:
            self._mark_texts(requests)
        return self._to_host(requests, self._choose(slots, state, logits))

    def decode(self, requests: list[Request], context: int) -> Outcome:
        """A token for each; context: more than the longest of them has in the cache."""
        n = len(requests)
        size = n
        if self._graphs is not None:
            # One that is not much larger is not worth another capture.
            near = [size for size in self._graphs if n <= size <= n * 3 // 2]
            size = min(near, default=_graph_size(n))
            context = self.longest + 1
        self._set_rows([request.slot for request in requests], size)
        if self._graphs is None:
            return self._to_host(requests, self._step(size, context))
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, context)
        graph, rows = self._graphs[size]
        graph.replay()
        return self._to_host(requests, rows[:n])

    def _step(self, n: int, context: int) -> Tensor:
        """The static step: the next token of the first n rows' sequences."""
        slots = self.rows[:n]
        state = self.state.index_select(0, slots)
        width = min(pages_for(context), self.table.size(1))
        table = self.table[:, :width].index_select(0, slots)
        layout = Decode(self.cache, table, state[:, LENGTH], state[:, PROMPT], context)
        with cpu.decode_step():
            logits = self.model.logits(self.model(state[:, LAST].contiguous(), layout))
        state[:, LENGTH] += state[:, ENDED] == RUNS
        return self._choose(slots, state, logits)

    def _choose(self, slots: Tensor, state: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row, into its slot's state; [n, 3], see `Outcome`.

        A sequence that has ended, which the host may not know yet, stays as it is.
        """
        steps, runs = state[:, STEP].contiguous(), state[:, ENDED] == RUNS
        seen = None if self.seen is None else self.seen[slots]
        z = constrained(logits, self.sampling, steps, self.stop_columns, seen)
        tokens, logprobs, kept = choose(z, self.sampling, state[:, SAMPLE], steps)
        if self.seen is not None:
            self._mark_seen(slots, tokens)
        if self.kept is not None and kept is not None:
            places = slots * self.kept.size(1) + steps
            self.kept.flatten(0, 1).index_copy_(0, places, pack_bits(kept))
        state[:, LAST] = tokens
        state[:, STEP] += runs
        ended = (state[:, STEP] >= state[:, LIMIT]) * FULL
        ended = ended.masked_fill(self.is_stop[tokens], STOPPED)
        state[:, ENDED] = torch.where(runs, ended, state[:, ENDED])
        self.state.index_copy_(0, slots, state)
        return torch.stack((tokens.double(), logprobs.double(), state[:, ENDED].double()), 1)

    def _mark_seen(self, slots: Tensor, tokens: Tensor) -> None:
        """Mark one token of each slot, [n] and [n]."""
        assert self.seen is not None
        start, stop = vocab_range(self.seen.size(1))
        is_local = (tokens >= start) & (tokens < stop)
        places = slots * self.seen.size(1) + (tokens - start).clamp(0, self.seen.size(1) - 1)
        seen = self.seen.view(-1)
        seen.index_copy_(0, places, seen[places] | is_local)

    def _mark_texts(self, requests: list[Request]) -> None:
        """Mark all that the requests have said, or were asked, so far, and nothing else."""
        assert self.seen is not None
        start, stop = vocab_range(self.seen.size(1))
        for request in requests:
            local = [token - start for token in set(request.text) if start <= token < stop]
            self.seen[request.slot] = False
            self.seen[request.slot].index_fill_(0, self._upload(local), True)

    def masks(self, request: Request) -> list[Tensor]:
        """What was kept at each choice since the request got its slot, if that was asked for."""
        if self.kept is None:
            return []
        first, end = request.resumed_at, len(request.tokens)
        return [self.kept[request.slot, first:end].clone()]

    def _set_rows(self, slots: list[int], size: int) -> None:
        slots = slots + [self.slots] * (size - len(slots))
        if slots != self._rows:
            self._rows = slots
            self.rows[:size] = self._upload(slots)

    def _capture(self, size: int, context: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step for so many rows as a graph, and where its outcome will lie."""
        assert self._graphs is not None
        slots, nobody = self._rows, [self.slots] * size
        self._set_rows(nobody, size)
        # Once without a graph, for what is set up at a first call, over rows that are nobody's.
        side = _capture_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._step(size, context)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        others = next(iter(self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=others and others[0].pool(), stream=side):
            rows = self._step(size, context)
        self._held.append(self.model._rotary)
        self._set_rows(slots, size)
        return graph, rows

    def close(self) -> None:
        """Let go of the graphs, whose memory is theirs alone."""
        if self._graphs is not None:
            self._graphs, self._held = {}, []

    def _upload(self, values: list) -> Tensor:
        """Whole numbers to the device, without waiting for it."""
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=torch.long)
        pinned = torch.tensor(values, dtype=torch.long, pin_memory=True)
        return pinned.to(self.device, non_blocking=True)

    def _to_host(self, requests: list[Request], rows: Tensor) -> Outcome:
        if self.device.type != "cuda":
            return Outcome(requests, rows)
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Outcome(requests, pinned, event)


def can_capture(model: Transformer, parallel: Parallel) -> bool:
    """Whether a decode step can be a CUDA graph, and is the quicker for it."""
    return (
        parallel.device.type == "cuda"
        # Experts' grouped products wait for the host on most devices and dtypes.
        and not model.config.n_experts
        # Layers that come in turn take longer to come than to be launched.
        and model.streamed is None
        and (parallel.mp_size == 1 or dist.get_backend(parallel.mp_group) == "nccl")
    )


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


def _state_of(request: Request) -> list[int]:
    """A slot's state before the next token is chosen."""
    length, step = len(request.text), len(request.tokens)
    return [0, length, step, len(request.prompt), request.limit, request.sample, RUNS]


def _graph_size(n: int) -> int:
    """The least number of rows, n or more, that a graph is captured for."""
    return next((size for size in GRAPH_SIZES if size >= n), n)
