"""Queries and responses as one packed batch, and what is read off the model at their tokens."""

from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, repeat
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.models.attention import Packed
from src.models.context import Divided
from src.models.transformer import Transformer
from src.parallel.context import ALONE, ContextGroup, Share
from src.parallel.divergence import LogitsOf, distilled
from src.parallel.mappings import copy_to_model_parallel_region
from src.parallel.setup import Parallel
from src.parallel.vocab import LossOf, rows_at_once, target_loss, token_logprobs

T = TypeVar("T")
Ranges = tuple[tuple[int, int], ...]  # [start, stop) of tokens in a sequence, in order


@dataclass(frozen=True)
class Sequence:
    """Token ids of a prompt followed by its response's, `tokens[prompt_length:]`.

    spans: of a response between whose tokens others stand, such as a conversation's: its tokens
    are those of the ranges [start, stop), in order, the first of which begins at prompt_length.
    """

    tokens: list[int] | array
    prompt_length: int
    spans: Ranges | None = None

    @classmethod
    def of_spans(cls, tokens: list[int] | array, spans: Iterable[tuple[int, int]]) -> "Sequence":
        """A sequence whose response is the tokens of some ranges, in order.

        Not its very first token, which nothing predicts; ranges that touch are one.
        """
        whole: list[tuple[int, int]] = []
        for start, stop in spans:
            start = max(start, whole[-1][1] if whole else 1)
            if whole and start == whole[-1][1]:
                start = whole.pop()[0]
            if start < stop:
                whole.append((start, stop))
        if not whole:
            return cls(tokens, len(tokens))
        is_end = len(whole) == 1 and whole[0][1] == len(tokens)
        return cls(tokens, whole[0][0], None if is_end else tuple(whole))

    @property
    def ranges(self) -> Ranges:
        """The response's tokens, as ranges [start, stop)."""
        return ((self.prompt_length, len(self.tokens)),) if self.spans is None else self.spans

    @property
    def response(self) -> list[int]:
        """The response's token ids."""
        return [i for start, stop in self.ranges for i in self.tokens[start:stop]]

    @property
    def response_length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


class Batch:
    """N tokens of some sequences end to end, R of them response tokens.

    whole: where each sequence lies; rows: [R], for each response token the row *before* it, whose
    hidden state predicts it; targets: [R], the response tokens themselves; responses: each
    sequence's response length. Of these tokens a rank has its share, all where it is alone:
    tokens, [m], and layout, for the model.
    """

    source: Tensor | None = None  # which of `rows` predicts each response token; None: its own

    def __init__(
        self,
        tokens: Tensor,
        lengths: list[int],
        ranges: list[Ranges],
        context: ContextGroup = ALONE,
    ) -> None:
        """ranges: of each sequence's response tokens; context: the ranks that divide the tokens."""
        self.whole = Packed(lengths, tokens.device)
        self.responses = [sum(stop - start for start, stop in x) for x in ranges]
        starts = [end - length for end, length in zip(accumulate(lengths), lengths)]
        self.rows = rows_before(starts, ranges).to(tokens.device)
        self.targets = tokens[self.rows + 1]
        self.share = Share(len(tokens), context)
        self.tokens, self.layout = self.share.of(tokens), divided(self.whole, self.share)

    @classmethod
    def of(
        cls, sequences: list[Sequence], device: torch.device, context: ContextGroup = ALONE
    ) -> "Batch":
        tokens = torch.tensor([token for s in sequences for token in s.tokens], device=device)
        return cls(
            tokens, [len(s.tokens) for s in sequences], [s.ranges for s in sequences], context
        )

    @property
    def ends(self) -> Tensor:
        """The row of each sequence's last token, [sequences]."""
        return self.whole.ends

    @cached_property
    def own(self) -> slice:
        """The response tokens that this rank's rows predict."""
        return self.share.within(self.rows)


def divided(whole: Packed, share: Share) -> Packed | Divided:
    """The layout of a rank's share."""
    return whole if share.size == 1 else Divided(whole, share)


def shared_prompt(sequences: list[Sequence]) -> int:
    """How many tokens the prompt has that all of them go on from.

    0 where that is not one, or there is only one sequence.
    """
    first = sequences[0]
    length = first.prompt_length
    is_shared = all(
        s.prompt_length == length and s.tokens[:length] == first.tokens[:length] for s in sequences
    )
    return length if is_shared and len(sequences) > 1 else 0


def pieces_of(responses: list[Sequence], share_prompts: bool) -> list[tuple[int, int]]:
    """(tokens, tokens before them that they see too) of each piece that a prompt's responses are.

    share_prompts: whether the prompt is a piece of its own, where it can be.
    """
    prompt = shared_prompt(responses) if share_prompts else 0
    return [(prompt, 0)] * bool(prompt) + [(len(s.tokens) - prompt, prompt) for s in responses]


class PromptTree:
    """Groups of sequences, each group's prompt only once before its responses.

    ends: the row of each sequence's last token, group after group, [sequences]. And what `Batch`
    has of the N tokens and of the R response tokens: rows, each once, since a group's first
    response tokens are predicted by one row; source: [R], which of them predicts each token.
    """

    def __init__(
        self,
        groups: list[list[Sequence]],
        device: torch.device,
        context: ContextGroup = ALONE,
    ) -> None:
        """context: the ranks that divide the tokens."""
        self.groups, self.device = groups, device
        pieces: list[list[int] | array] = []
        prefixes: list[int | None] = []  # the piece that each goes on from
        ending: list[int] = []  # the pieces that end a sequence
        for group in groups:
            shared = shared_prompt(group)
            prompt = len(pieces) if shared else None
            if shared:
                pieces.append(group[0].tokens[:shared])
                prefixes.append(None)
            for sequence in group:
                ending.append(len(pieces))
                pieces.append(sequence.tokens[shared:])
                prefixes.append(prompt)
        tokens = torch.tensor([token for piece in pieces for token in piece], device=device)
        self.whole = Packed(list(map(len, pieces)), device, prefixes)
        self.ending = torch.tensor(ending)
        self.share = Share(len(tokens), context)
        self.tokens, self.layout = self.share.of(tokens), divided(self.whole, self.share)

    @property
    def ends(self) -> Tensor:
        """The row of each sequence's last token, [sequences]."""
        return self.whole.ends[self.ending.to(self.device)]

    @property
    def responses(self) -> list[int]:
        """Each sequence's response length."""
        return [s.response_length for group in self.groups for s in group]

    @cached_property
    def targets(self) -> Tensor:
        """The response tokens, [R]."""
        ids = [i for group in self.groups for s in group for i in s.response]
        return torch.tensor(ids, device=self.device)

    @property
    def rows(self) -> Tensor:
        return self._predicting[0]

    @property
    def source(self) -> Tensor:
        return self._predicting[1]

    @cached_property
    def own(self) -> slice | Tensor:
        """The response tokens that this rank's rows predict."""
        if self.share.size == 1:
            return slice(0, len(self.targets))
        rows = self.share.within(self.rows)
        return ((self.source >= rows.start) & (self.source < rows.stop)).nonzero().squeeze(1)

    @cached_property
    def _predicting(self) -> tuple[Tensor, Tensor]:
        """(rows, source): of each response token the row before it, or its prompt's last one."""
        size = self.whole.size.tolist()
        starts = [end - length for end, length in zip(accumulate(size), size)]
        # What ends a sequence begins behind its prompt's piece, wherever that is.
        prompts = [self.whole.prefixes[piece] for piece in self.ending.tolist()]
        begins = [
            starts[piece] - (0 if prompt is None else size[prompt])
            for piece, prompt in zip(self.ending.tolist(), prompts)
        ]
        sequences = [s for group in self.groups for s in group]
        rows = rows_before(begins, [s.ranges for s in sequences])  # [R]
        first = list(accumulate(self.responses, initial=0))
        for i, prompt in enumerate(prompts):
            if prompt is not None and self.responses[i]:
                rows[first[i]] = starts[prompt] + size[prompt] - 1
        rows, source = rows.unique(return_inverse=True)
        return rows.to(self.device), source.to(self.device)


def packed(
    groups: list[list[Sequence]],
    share_prompts: bool,
    device: torch.device,
    context: ContextGroup = ALONE,
) -> Batch | PromptTree:
    """Groups of responses as one batch, each group's prompt once where that is asked for."""
    if share_prompts:
        return PromptTree(groups, device, context)
    return Batch.of([sequence for group in groups for sequence in group], device, context)


def rows_before(starts: list[int], ranges: list[Ranges]) -> Tensor:
    """The row before each response token, [R], which predicts it. On the host.

    starts: the row of each sequence's first token; ranges: of each sequence's response tokens.
    """
    first = [start + begin - 1 for start, of_one in zip(starts, ranges) for begin, _ in of_one]
    sizes = [stop - begin for of_one in ranges for begin, stop in of_one]
    return end_to_end(torch.tensor(first, dtype=torch.long), sizes)


def end_to_end(starts: Tensor, lengths: list[int]) -> Tensor:
    """The ranges [start, start + length) laid end to end: [n] → [Σ lengths]. On the host."""
    size = torch.tensor(lengths, dtype=torch.long)
    offset = starts - (size.cumsum(0) - size)
    return torch.arange(int(size.sum())) + offset.repeat_interleave(size)


def hidden_at(model: Transformer, batch: Batch | PromptTree, rows: Tensor) -> tuple[Tensor, slice]:
    """The last hidden states of this rank's rows, [r, dim], and which of the wanted these are.

    rows: those that are wanted of the batch, each once; where ranks divide it, in ascending order.
    """
    own = batch.share.within(rows)
    count = own.stop - own.start
    # A rank that has none of them computes one for nothing.
    wanted = rows[own] - batch.share.first if count else rows.new_zeros(1)
    return model(batch.tokens, batch.layout, wanted)[:count], own


def predicting(model: Transformer, batch: Batch | PromptTree) -> Tensor:
    """The hidden state that predicts each response token of `batch.own`: [r, dim]."""
    hidden, rows = hidden_at(model, batch, batch.rows)
    return hidden if batch.source is None else hidden[batch.source[batch.own] - rows.start]


def response_logprobs(
    model: Transformer,
    batch: Batch | PromptTree,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token, and its distribution's entropy; [R] each, fp32.

    kept: [R, bytes], which tokens that distribution is over; see `token_logprobs`. The logits live
    a chunk at a time, and are computed again in backward. For training see `response_loss`.
    """
    hidden, own = predicting(model, batch), batch.own
    size = rows_at_once(len(hidden), model.vocabulary_weight)

    def of(hidden: Tensor, targets: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        return token_logprobs(model.logits(hidden), targets, temperature, kept)

    if torch.is_grad_enabled():
        of = partial(checkpoint, of, use_reentrant=False)
    chunks = zip(
        hidden.split(size),
        batch.targets[own].split(size),
        repeat(None) if kept is None else kept[own].split(size),
    )
    logprobs, entropies = map(torch.cat, zip(*[of(*chunk) for chunk in chunks]))
    share, n = batch.share, len(batch.targets)
    return share.joined(logprobs, own, n), share.joined(entropies, own, n)


def response_loss(
    model: Transformer,
    batch: Batch | PromptTree,
    loss_of: LossOf,
    temperature: float = 1.0,
    entropy: bool = False,
    kept: Tensor | None = None,
    groups: list[int] | None = None,
    targets: Tensor | None = None,
) -> Tensor:
    """A loss that every response token, or every group of them, has for itself: `target_loss`.

    Its log-probabilities are those of `response_logprobs`, bit for bit. targets: others than the
    response tokens, [R], or several for each, [R, k].
    """
    share, own, n = batch.share, batch.own, len(batch.targets)

    def of_own(logprobs: Tensor, entropies: Tensor | None, rows: slice) -> Tensor:
        """Of tokens that have their loss for themselves, by their places in the batch."""
        assert isinstance(own, slice)
        return loss_of(logprobs, entropies, shifted(rows, own.start))

    def of_groups(logprobs: Tensor, entropies: Tensor | None, rows: slice) -> Tensor:
        """Of groups, whose tokens several ranks may have: of all, on each rank alike."""
        entropies = None if entropies is None else share.joined(entropies, own, n)
        return loss_of(share.joined(logprobs, own, n), entropies, slice(0, n))

    hidden = copy_to_model_parallel_region(predicting(model, batch))
    weight, real, holes = model.vocabulary_weight, model.vocabulary, model.holes
    targets = (batch.targets if targets is None else targets)[own]
    kept = None if kept is None else kept[own]
    if share.size > 1 and groups is not None:
        loss_of_rows, groups = of_groups, [len(hidden)]
    else:
        loss_of_rows = of_own
    options = temperature, entropy, kept, holes, groups
    loss = target_loss(hidden, weight, real, targets, loss_of_rows, *options)
    return share.summed(loss) if groups is None else loss


def shifted(rows: slice, by: int) -> slice:
    """A range of rows so many further on."""
    return slice(rows.start + by, rows.stop + by)


def response_distances(
    model: Transformer, batch: Batch, teacher: LogitsOf, beta: float, temperature: float = 1.0
) -> Tensor:
    """Σ over response tokens of how far the model's distribution is from a teacher's: `distilled`.

    teacher: its logits of the response tokens.
    """

    def of_own(rows: slice) -> Tensor:
        return teacher(shifted(rows, batch.own.start))

    hidden = copy_to_model_parallel_region(predicting(model, batch))
    weight, real, holes = model.vocabulary_weight, model.vocabulary, model.holes
    loss = distilled(hidden, weight, real, of_own, beta, temperature, holes)
    return batch.share.summed(loss)


def response_values(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores before each response token, [R], and at each sequence's end, [sequences]; fp32.

    Of a batch that no ranks divide.
    """
    scores = model.scores(model(batch.tokens, batch.layout, torch.cat((batch.rows, batch.ends))))
    return scores[: len(batch.rows)], scores[len(batch.rows) :]


def sequence_scores(model: Transformer, batch: Batch | PromptTree) -> Tensor:
    """The score head at each sequence's last token, [sequences], fp32."""
    return scores_at(model, batch, batch.ends)


def scores_at(model: Transformer, batch: Batch | PromptTree, rows: Tensor) -> Tensor:
    """The score head at some rows, [M], fp32. rows: see `hidden_at`."""
    hidden, own = hidden_at(model, batch, rows)
    return batch.share.joined(model.scores(hidden), own, len(rows))


def place_scores(model: Transformer, batch: Batch, places: list[list[int]]) -> Tensor:
    """The score head at some tokens of each sequence, one after the other, [places], fp32.

    places: of each sequence, within it.
    """
    size = batch.whole.size
    starts = (size.cumsum(0) - size).tolist()
    rows = [start + place for start, of_sequence in zip(starts, places) for place in of_sequence]
    # Each row once, though two steps may end in one token.
    unique, source = torch.tensor(rows).unique(return_inverse=True)
    index, source = (x.to(batch.tokens.device) for x in (unique, source))
    return scores_at(model, batch, index)[source]


def weighted_balance_loss(
    model: Transformer,
    batch: Batch | PromptTree,
    weights: Collection[float],
    denominator: float,
) -> Tensor:
    """The experts' load-balancing loss of a batch that went through the model; 0 without experts.

    It is Σ over sequences of weight × loss, over the denominator, times the model's coefficient.
    Each sequence has its own loss, so that no cut into batches changes it.
    """
    if batch.layout.balance_loss is None:
        return torch.zeros((), device=batch.tokens.device)
    weight = torch.tensor(weights, device=batch.tokens.device)
    return model.router_aux_loss_coef * (batch.layout.balance_loss * weight).sum() / denominator


def micro_batches(
    lengths: list[int], max_batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` in groups of at most `max_batch_size`, as few as come easily.

    And of at most `max_tokens` tokens; a row that is longer by itself stands alone. Without
    max_tokens the rows of a group are alike in length, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if max_tokens is None:
        return [order[i : i + max_batch_size] for i in range(0, len(order), max_batch_size)]
    groups: list[list[int]] = []
    room: list[int] = []  # tokens that each group still takes
    for i in order:  # first fit, the longest first
        fitting = (
            g
            for g, group in enumerate(groups)
            if room[g] >= lengths[i] and len(group) < max_batch_size
        )
        g = next(fitting, None)
        if g is None:
            g = len(groups)
            groups.append([])
            room.append(max_tokens)
        groups[g].append(i)
        room[g] -= lengths[i]
    return groups


def cut_by_tokens(rows: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows in their order, in parts of at most `max_tokens` tokens; a longer row stands alone."""
    parts: list[list[int]] = []
    room = 0
    for i in rows:
        if not parts or lengths[i] > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(i)
        room -= lengths[i]
    return parts


def over_ranks(
    compute: Callable[[list[int]], list[T]],
    lengths: list[int],
    max_batch_size: int,
    parallel: Parallel,
    progress,
    max_tokens: int | None = None,
) -> list[T]:
    """A result for every row, in the rows' order: every rank gets all results.

    compute: is given micro-batches of row numbers, shared among the data-parallel ranks;
    lengths: tokens of each row; progress: a `Progress` whose work is tokens; max_tokens: of a
    micro-batch, at most, but for one longer row.
    """
    results: dict[int, T] = {}
    groups = micro_batches(lengths, max_batch_size)
    if max_tokens is not None:
        groups = [part for group in groups for part in cut_by_tokens(group, lengths, max_tokens)]
    for number, rows in enumerate(groups):
        if number % parallel.dp_size == parallel.dp_rank:
            results.update(zip(rows, compute(rows)))
        tokens = sum(lengths[i] for i in rows)
        progress.update(len(rows), tokens=tokens, work=tokens)
    if parallel.dp_size > 1:
        parts: list[dict[int, T]] = [{}] * parallel.dp_size
        dist.all_gather_object(parts, results, group=parallel.dp_group)
        results = {i: result for part in parts for i, result in part.items()}
    return [results[i] for i in range(len(lengths))]
