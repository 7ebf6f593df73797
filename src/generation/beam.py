"""Beam search: the likeliest responses by score, for evaluation.

transformers' rules, with its defaults. A hypothesis ends at a stop token (or at the limit) if it is
among the best `num_beams` continuations then; its score is its log-probability over its length to
the `length_penalty`. A search ends when no running beam can beat the worst of `num_beams` ended
ones at its present length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from src.generation.cache import PAGE, Cache, Chunk, Decode, pages_for
from src.generation.engine import Completion, Engine, OnTokens, Stop
from src.generation.sampling import Sampling, gather_ranks, logsumexp
from src.models.transformer import Transformer
from src.parallel.layers import packed_weights
from src.parallel.setup import Parallel
from src.parallel.vocab import vocab_range

NEVER = -1e9  # the score of a beam that is none


@dataclass
class Beam:
    """A response so far: its log-probability, its tokens and theirs."""

    score: float = 0.0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class BeamSearch(Engine):
    """An engine whose completions are the best of `num_beams` beams.

    It takes no notice of how to sample.
    """

    def __init__(
        self,
        model: Transformer,
        parallel: Parallel,
        max_batch_size: int,
        max_seq_len: int,
        kv_cache_gb: float | None = None,
        num_beams: int = 4,
        length_penalty: float = 1.0,
    ) -> None:
        super().__init__(model, parallel, max_batch_size, max_seq_len, kv_cache_gb)
        self.num_beams, self.length_penalty = num_beams, length_penalty

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
        """The best response to each prompt, in their order; a stop string cuts nothing short here.

        keep_masks changes nothing: no token is left out.
        """
        stops = stop.ids if isinstance(stop, Stop) else stop
        limits = [
            min(sampling.max_new_tokens, self.max_seq_len - len(prompt)) for prompt in prompts
        ]
        # Prompts that leave no room for a response are done.
        done = {i: Completion([], [], "length") for i, limit in enumerate(limits) if limit <= 0}
        for i, completion in done.items():
            if on_completion:
                on_completion(i, completion)
        order = [i for i in range(len(prompts)) if i not in done]
        order.sort(key=lambda i: -len(prompts[i]))
        with packed_weights(self.model, self.parallel):
            while order:
                # As many prompts together as their beams fit the cache.
                length = max(len(prompts[i]) + limits[i] for i in order)
                at_once = max(1, min(len(order), self.max_batch_size // self.num_beams))
                of_prompt = self.num_beams * pages_for(length)
                together = self.pages_that_fit(at_once * of_prompt, of_prompt) // of_prompt
                now, order = order[:together], order[together:]
                best = self._search(
                    [prompts[i] for i in now], [limits[i] for i in now], stops, on_tokens
                )
                for i, completion in zip(now, best):
                    done[i] = completion
                    if on_completion:
                        on_completion(i, completion)
        return [done[i] for i in range(len(prompts))]

    def _search(
        self,
        prompts: list[list[int]],
        limits: list[int],
        stops: frozenset[int] | set[int],
        on_tokens: OnTokens | None,
    ) -> list[Completion]:
        """The best response to each prompt, all searched side by side.

        Beams of prompt p lie in slots p · num_beams …; prompts that are done stay there, and are
        not looked at again.
        """
        width, count, device = self.num_beams, len(prompts), self.parallel.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        # Every beam has pages of its own, as many as it can fill.
        each = pages_for(max(len(p) + limit for p, limit in zip(prompts, limits)))
        cache = Cache(self.model, 1 + count * width * each)
        table = 1 + torch.arange(count * width * each, device=device, dtype=torch.int32)
        table = table.view(-1, each)  # [beams, pages]
        # Each prompt once, and its cache for all its beams. These are still the same: the first
        # alone counts.
        chunk = Chunk(
            cache,
            lengths.tolist(),
            [0] * count,
            table[::width].tolist(),
            lengths.tolist(),
            device,
        )
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        logits = self.model.logits(self.model(tokens, chunk, chunk.ends))
        source = torch.arange(count, device=device).repeat_interleave(width)

        def take_over(parents: Tensor, length: int) -> None:
            """Each beam gets what its parent has in the cache."""
            used = table[:, : pages_for(length)].long()
            cache.copy(used[parents].flatten(), used.flatten())

        take_over(source * width, int(lengths.max()))
        logits, prompt_lengths = logits[source], lengths[source]
        running = [[Beam(score=0.0 if b == 0 else NEVER) for b in range(width)] for _ in prompts]
        ended: list[list[tuple[float, Beam]]] = [[] for _ in prompts]
        # Enough that `width` go on even where all stop tokens are among them.
        n_candidates = width * max(2, 1 + len(stops))
        open_prompts, step = set(range(count)), 0
        while open_prompts:
            step += 1
            n_open = len(open_prompts)
            values, next_tokens = self._candidates(logits, n_candidates)
            parents = list(range(count * width))  # the slot that each beam goes on from
            for p in sorted(open_prompts):
                rows = range(p * width, (p + 1) * width)
                candidates = [
                    (beam.score + value, row, token, value)
                    for beam, row in zip(running[p], rows)
                    for value, token in zip(values[row], next_tokens[row])
                ]
                candidates.sort(key=lambda candidate: -candidate[0])
                # The best end, or run on.
                kept: list[tuple[int, Beam]] = []
                for place, (score, row, token, value) in enumerate(candidates[:n_candidates]):
                    parent = running[p][row - rows.start]
                    beam = Beam(score, [*parent.tokens, token], [*parent.logprobs, value])
                    if token in stops or step == limits[p]:
                        if place < width:
                            ended[p].append((score / step**self.length_penalty, beam))
                    elif len(kept) < width:
                        kept.append((row, beam))
                ended[p] = sorted(ended[p], key=lambda pair: -pair[0])[:width]
                if kept:
                    row, best = kept[0]
                    kept += [(row, Beam(NEVER, best.tokens, best.logprobs))] * (width - len(kept))
                    parents[rows.start : rows.stop] = [row for row, _ in kept]
                    running[p] = [beam for _, beam in kept]
                # Done when no running beam can beat the worst that ended.
                worst = ended[p][-1][0] if len(ended[p]) == width else NEVER
                if not kept or running[p][0].score / step**self.length_penalty <= worst:
                    open_prompts.discard(p)
            if on_tokens:
                on_tokens([step] * (n_open - len(open_prompts)), [step] * len(open_prompts))
            if open_prompts:
                # Each beam takes over its parent's cache, and its new token goes through the model.
                take_over(torch.tensor(parents, device=device), int(lengths.max()) + step - 1)
                last = torch.tensor(
                    [beam.tokens[-1] for beams in running for beam in beams], device=device
                )
                positions = prompt_lengths + step - 1
                context = int(lengths.max()) + step
                # of prompts that are done there may be no further place
                positions = positions.clamp_max(each * PAGE - 1)
                layout = Decode(cache, table, positions, prompt_lengths, context)
                logits = self.model.logits(self.model(last, layout))
        return [self._best(hypotheses, stops) for hypotheses in ended]

    def _candidates(self, logits: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
        """Each row's k largest log-probabilities of every rank, and their tokens."""
        z = logits.float()
        values, local = z.topk(min(k, z.size(-1)))
        values = torch.cat(gather_ranks(values - logsumexp(z).unsqueeze(-1)), -1)
        tokens = torch.cat(gather_ranks(local + vocab_range(z.size(-1))[0]), -1)
        return values.tolist(), tokens.tolist()

    @staticmethod
    def _best(hypotheses: list[tuple[float, Beam]], stops: frozenset[int] | set[int]) -> Completion:
        _, beam = hypotheses[0]
        reason = "stop" if beam.tokens[-1] in stops else "length"
        return Completion(beam.tokens, beam.logprobs, reason)
