"""Preference learning: a policy learns which of its prompts' responses are better.

What is minimised is a sum of `losses.py`'s functions by weight, each row's mean over its pairs (or
responses), and the mean over the rows of a step.
"""

import random
from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from src.data.encoding import Comparison, Labelled
from src.models.batch import (
    Batch,
    PromptTree,
    Sequence,
    micro_batches,
    packed,
    pieces_of,
    response_loss,
    weighted_balance_loss,
)
from src.models.transformer import Transformer
from src.parallel.setup import Parallel
from src.trainer.losses import PAIR_LOSSES, RESPONSE_LOSSES, SFT, Knobs, Sides
from src.trainer.objective import Objective
from src.trainer.optimizer import idle_forward
from src.trainer.passes import passes_of
from src.trainer.reference import Groups, Reference, scored, sums

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Row:
    """A prompt's responses, its pairs of them (better, worse), and which are good."""

    responses: list[Sequence]
    pairs: list[tuple[int, int]]
    labels: list[bool]

    @classmethod
    def of(cls, row: Comparison | Labelled) -> "Row":
        """Of a comparison a response is good when it is better than another."""
        if isinstance(row, Labelled):
            good, n = row.labels, len(row.labels)
            pairs = [(i, j) for i in range(n) for j in range(n) if good[i] and not good[j]]
            return cls(row.responses, pairs, good)
        better = set(row.chosen)
        return cls(row.responses, row.pairs, [i in better for i in range(len(row.responses))])


@dataclass(frozen=True)
class Totals:
    """What a step's averages are over: counts of all ranks' rows, and KTO's reference point."""

    good: int
    bad: int
    responses: int
    good_tokens: int
    kl: float = 0.0


class PreferenceObjective(Objective):
    """Rows of one or several good and bad responses.

    Chosen and rejected go through the model in one packed forward, and each prompt once. (Not with
    experts, whose balance is each sequence's own.)
    """

    def __init__(
        self,
        rows: list[Comparison] | list[Labelled],
        losses: list[tuple[float, str]],
        knobs: Knobs,
        reference: Reference | None,
        parallel: Parallel,
        share_prompts: bool = True,
        mismatched: "Mismatched | None" = None,
    ) -> None:
        """losses: (weight, name); reference: None where none of them needs one.

        mismatched: what KTO's reference point is found of.
        """
        self.rows = [Row.of(row) for row in rows]
        self.losses, self.knobs, self.reference = losses, knobs, reference
        self.parallel, self.share_prompts, self.mismatched = parallel, share_prompts, mismatched
        self.frozen = reference.model if reference is not None else None
        self.held = () if self.frozen is None else (self.frozen,)
        self.lengths = [sum(length for length, _ in self.pieces(i)) for i in range(len(rows))]
        self.weights = [1] * len(rows)
        self.needed = [sum(s.response_length for s in row.responses) for row in self.rows]
        self.stats = ("loss", *(f"loss/{name}" for _, name in losses if len(losses) > 1))
        self.stats += ("accuracy", "margin") if any(row.pairs for row in self.rows) else ()
        self.stats += tuple(
            f"{kind}/{side}"
            for kind in ("reward", "logprob", "logprob_per_token")
            for side in SIDES
        )
        self.stats += ("kl",) if reference is not None else ()
        self.totals = Totals(1, 1, 1, 1)
        # Of a step's rows, each response's log-probability by the reference.
        self.of_reference: dict[int, Tensor] = {}

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return pieces_of(self.rows[row].responses, self.share_prompts)

    def begin(self, number: int, batch: list[int], model: Transformer) -> None:
        labels = [label for i in batch for label in self.rows[i].labels]
        good_tokens = sum(
            s.response_length
            for i in batch
            for s, label in zip(self.rows[i].responses, self.rows[i].labels)
            if label
        )
        kl = 0.0
        if self.mismatched is not None:
            kl = self.mismatched(batch, model)
            self.noted = {"kl_reference_point": kl}
        good, bad = sum(labels), labels.count(False)
        self.totals = Totals(max(1, good), max(1, bad), good + bad, max(1, good_tokens), kl)

    def consult(self, turns: list[list[int]]) -> None:
        if self.reference is None:
            return
        parts = [[self.rows[i].responses for i in rows] for rows in turns]
        found = self.reference(turns, parts)
        self.of_reference = {
            i: of_row
            for rows, groups, of_rows in zip(turns, parts, found)
            for i, of_row in zip(rows, of_rows.split([len(group) for group in groups]))
        }

    def batch(self, rows: list[int]) -> Batch | PromptTree:
        groups = [self.rows[i].responses for i in rows]
        return packed(groups, self.share_prompts, self.parallel.device, self.parallel.context)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.parallel.device
        chosen = [self.rows[i] for i in rows]
        groups = [row.responses for row in chosen]
        responses = [len(group) for group in groups]
        batch = self.batch(rows)
        reference = torch.zeros(sum(responses), dtype=torch.float64, device=device)
        if self.reference is not None:
            reference = torch.cat([self.of_reference[i] for i in rows])
        stats: dict[str, Tensor] = {}

        def loss_of(logprobs: Tensor, entropy: Tensor | None, tokens: slice) -> Tensor:
            """Of the rows whose response tokens these are."""
            first, last = (ends.index(end) for end in (tokens.start, tokens.stop))
            of_responses = slice(sum(responses[:first]), sum(responses[:last]))
            lengths = batch.responses[of_responses]
            sides = _Logprobs(logprobs, sums(logprobs, lengths), reference[of_responses], lengths)
            total, more = self._loss(chosen[first:last], sides, denominator)
            for name, value in more.items():
                stats[name] = stats[name] + value if name in stats else value
            return total

        # Each row's response tokens are one group, and `ends` is where the groups begin and end.
        sizes = [sum(s.response_length for s in group) for group in groups]
        ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        loss = response_loss(model, batch, loss_of, groups=sizes)
        weights = [1 / len(group) for group in groups for _ in group]
        balance = weighted_balance_loss(model, batch, weights, denominator)
        return loss + balance, {**stats, "balance_loss": balance.detach()}

    def _loss(
        self, rows: list[Row], x: "_Logprobs", denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses of some rows, and what is logged of them."""
        device = x.sums.device
        counts = [len(row.responses) for row in rows]
        firsts = [sum(counts[:i]) for i in range(len(rows))]
        # The places of pairs' sides among the responses; what each pair and response weighs.
        pairs = [(f + a, f + b) for f, row in zip(firsts, rows) for a, b in row.pairs]
        of_pair = torch.tensor([1 / len(row.pairs) for row in rows for _ in row.pairs]).to(x.sums)
        of_response = torch.tensor([1 / n for n in counts for _ in range(n)]).to(x.sums)
        labels = torch.tensor([label for row in rows for label in row.labels], device=device)
        better, worse = (
            torch.tensor([p[i] for p in pairs], device=device, dtype=torch.long) for i in (0, 1)
        )
        tokens = torch.tensor(x.lengths, device=device).to(x.sums)
        sides = Sides(
            x.sums[better], x.sums[worse], x.reference[better], x.reference[worse],
            tokens[better], tokens[worse],
        )  # fmt: skip

        total, stats = torch.zeros((), dtype=torch.float64, device=device), {}
        for weight, name in self.losses:
            if name in PAIR_LOSSES:
                part = (PAIR_LOSSES[name](sides, self.knobs) * of_pair).sum() / denominator
            elif name == SFT:
                good_tokens = labels.repeat_interleave(tokens.long())
                part = -x.tokens[good_tokens].double().sum() / self.totals.good_tokens
            else:
                kl = torch.tensor(self.totals.kl).to(x.sums)
                of_each = RESPONSE_LOSSES[name](x.sums - x.reference, labels, kl, self.knobs)
                part = (of_each * of_response).sum() / denominator
            total = total + weight * part
            if len(self.losses) > 1:
                stats[f"loss/{name}"] = part.detach()
        logged = self._logged(x, labels, tokens, (better, worse), of_pair / denominator)
        return total.float(), {**stats, **logged}

    @torch.no_grad()
    def _logged(
        self,
        x: "_Logprobs",
        labels: Tensor,
        tokens: Tensor,
        pairs: tuple[Tensor, Tensor],
        of_pair: Tensor,
    ) -> dict[str, Tensor]:
        """Shares of the step's means: over rows' pairs, and over the responses of each side."""
        better, worse = pairs
        ratios, means = x.sums - x.reference, x.sums / tokens
        rewards = self.knobs.beta * (means if self.reference is None else ratios)
        margins = rewards[better] - rewards[worse]
        out = {"accuracy": ((margins > 0) * of_pair).sum(), "margin": (margins * of_pair).sum()}
        good, bad = labels / self.totals.good, ~labels / self.totals.bad
        for side, share in zip(SIDES, (good, bad)):
            out[f"reward/{side}"] = (rewards * share).sum()
            out[f"logprob/{side}"] = (x.sums * share).sum()
            out[f"logprob_per_token/{side}"] = (means * share).sum()
        out["kl"] = ratios.sum() / self.totals.responses
        return out


@dataclass(frozen=True)
class _Logprobs:
    """Of some responses: log π of every token, their sums, the reference's, and the lengths."""

    tokens: Tensor
    sums: Tensor
    reference: Tensor
    lengths: list[int]


def mismatched(
    rows: list[Comparison] | list[Labelled], seed: int, max_seq_len: int
) -> list[Sequence]:
    """For each row its prompt with a response of another row, of another prompt if there is one.

    The next row's in an order that is drawn once for all epochs; cut at max_seq_len.
    """
    order = list(range(len(rows)))
    random.Random(f"{seed}/mismatched").shuffle(order)
    firsts = [row.responses[0] for row in rows]
    prompts = [[*s.tokens[: s.prompt_length]] for s in firsts]
    out: dict[int, Sequence] = {}
    for place, row in enumerate(order):
        following = (order[(place + k) % len(order)] for k in range(1, len(order)))
        other = next((i for i in following if prompts[i] != prompts[row]), order[place - 1])
        answer, n = firsts[other], len(prompts[row])
        whole = [*prompts[row], *answer.tokens[answer.prompt_length :]][: max(max_seq_len, n + 1)]
        shift, most = n - answer.prompt_length, len(whole)
        ranges = [(a + shift, min(b + shift, most)) for a, b in answer.ranges if a + shift < most]
        out[row] = Sequence.of_spans(array("i", whole), ranges)
    return [out[row] for row in range(len(rows))]


class Mismatched:
    """KTO's reference point: the mean log-ratio of prompts' answers to other prompts.

    max(0, mean of log π(y') / π_ref(y')) over a step's rows, all ranks' together, without gradient
    (arXiv 2402.01306, section 4.2). Each row has one such answer, the same in every epoch.
    """

    def __init__(
        self,
        responses: list[Sequence],
        reference: Reference,
        parallel: Parallel,
        max_batch_size: int,
    ) -> None:
        """responses: of each row, an answer to another prompt; see `mismatched`."""
        self.responses, self.reference, self.parallel = responses, reference, parallel
        self.max_batch_size = max_batch_size

    @torch.no_grad()
    def __call__(self, batch: list[int], model: Transformer) -> float:
        rows = sorted(batch)[self.parallel.data_rank :: self.parallel.data_size]
        lengths = [len(self.responses[i].tokens) for i in rows]
        turns = [[rows[i] for i in part] for part in micro_batches(lengths, self.max_batch_size)]
        parts: list[Groups] = [[[self.responses[i]] for i in turn] for turn in turns]
        passes = passes_of(model, self.parallel)
        logprobs = scored(model, passes, parts, False, self.parallel, self.parallel.context)
        ratios = [x - y for x, y in zip(logprobs, self.reference(turns, parts))]
        total = torch.tensor([0.0, len(rows)], dtype=torch.float64, device=self.parallel.device)
        total[0] = sum(x.sum() for x in ratios)
        if model.shard_stage:  # ranks that share weights take part as often as any of them
            most = -(-len(batch) // self.parallel.data_size)
            for _ in range(-(-most // self.max_batch_size) - len(parts)):
                idle_forward(model, self.parallel.device)
        torch.distributed.all_reduce(total, group=self.parallel.data_group)
        return max(0.0, float(total[0] / total[1]))
