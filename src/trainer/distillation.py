"""Distillation: a student's distributions of the next token move towards a teacher's.

On given outputs, on the student's own samples, or a share of each (GKD, arXiv 2306.13649).
"""

import random
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.data.kept import Sequences
from src.models.batch import (
    Batch,
    Sequence,
    predicting,
    response_distances,
    response_loss,
    weighted_balance_loss,
)
from src.models.transformer import Transformer, evaluating
from src.parallel.clock import clock
from src.parallel.divergence import coarse_divergence, head_logits
from src.parallel.setup import Parallel
from src.ppo.roles import Stage
from src.trainer.objective import Objective
from src.trainer.passes import from_last_stage
from src.trainer.sampling import Sample


class Teacher(Protocol):
    """What the student is held to."""

    @property
    def model(self) -> Transformer | None:
        """The one that computes at each step, if any does."""
        ...

    @property
    def held(self) -> tuple[nn.Module, ...]:
        """What lies on the device for it."""
        ...

    def consult(self, turns: list[list[int]], parts: list[list[Sequence]]) -> None:
        """What it has to be asked before the student's micro-batches. parts: of rows, `turns`."""
        ...

    def distance(
        self, student: Transformer, batch: Batch, rows: list[int], sequences: list[Sequence]
    ) -> Tensor:
        """Σ over the batch's response tokens of the divergence between student and teacher.

        rows: the numbers of the sequences, which make up the batch.
        """
        ...


@dataclass(frozen=True)
class Distance:
    """Which divergence: see `divergence`."""

    beta: float
    temperature: float = 1.0


class LiveTeacher:
    """A frozen model: its trunk at a degree of its own, its output layer cut like the student's."""

    def __init__(self, stage: Stage, head: Tensor, distance: Distance, whole: Parallel) -> None:
        """stage: with the role "teacher"; whole: the run's division.

        head: the output layer's rows of this rank's part of the student's vocabulary,
        [vocabulary / n, dim].
        """
        self.stage, self.head, self.of, self.whole = stage, head, distance, whole
        self.role = stage.roles["teacher"]
        self.model = self.role.model
        self.kept: dict[tuple[int, ...], Tensor] = {}  # hidden states by their rows
        output = nn.ParameterList([nn.Parameter(head, requires_grad=False)])
        self.held = (output,) if stage.host is not None else (output, self.model)

    def consult(self, turns: list[list[int]], parts: list[list[Sequence]]) -> None:
        """A pipeline's last stage keeps a step's hidden states: no stage can ask in between."""
        if self.model.stages.count > 1:
            self.kept = dict(zip(map(tuple, turns), self.hidden(parts)))

    def distance(
        self, student: Transformer, batch: Batch, rows: list[int], sequences: list[Sequence]
    ) -> Tensor:
        hidden = self.kept.pop(tuple(rows)) if self.kept else self.hidden([sequences])[0]
        teacher = head_logits(hidden, self.head)
        return response_distances(student, batch, teacher, self.of.beta, self.of.temperature)

    def hidden(self, parts: list[list[Sequence]]) -> list[Tensor]:
        """The teacher's last hidden state before each response token, [R, dim] of each micro-batch.

        Of a pipeline on its last stage, zeros before. Where ranks divide its tokens, zeros for
        those of others, which they have from the student, too.
        """
        device, role = self.whole.device, self.role
        lengths = [[s.response_length for s in sequences] for sequences in parts]
        size = self.head.size(1)
        hidden = [self.head.new_zeros(sum(of_part), size) for of_part in lengths]
        # Several smaller models share the sequences, and their parts are put together.
        models = self.whole.mp_size // role.parallel.mp_size
        first = self.whole.mp_rank // role.parallel.mp_size
        places = [list(range(first, len(sequences), models)) for sequences in parts]

        def batch_of(part: int) -> Batch:
            sequences = [parts[part][i] for i in places[part]]
            return Batch.of(sequences, device, role.parallel.context)

        def read(part: int) -> None:
            batch, of_part = batch_of(part), lengths[part]
            starts = [sum(of_part[:i]) for i in places[part]]
            index = [k for i, s in zip(places[part], starts) for k in range(s, s + of_part[i])]
            rows = torch.tensor(index, device=device)[batch.own]
            hidden[part][rows] = predicting(self.model, batch)

        with self.stage.at_work("teacher"), evaluating(self.model), role.parallel.active():
            role.passes.score([i for i in range(len(parts)) if places[i]], batch_of, read)
        with self.stage.at_work():  # with --offload_teacher it makes room
            if self.model.stages.count > 1:
                return hidden
            return [self._collected(x) for x in hidden]

    def _collected(self, x: Tensor) -> Tensor:
        """What each of several smaller models filled in, on all of them; the rest of x is 0."""
        if self.role.parallel.mp_size != self.whole.mp_size:
            if self.role.parallel.mp_rank:
                x.zero_()  # the first rank of each model speaks for it
            dist.all_reduce(x, group=self.whole.mp_group)
        return from_last_stage(x, self.role.parallel)


class KeptTeacher:
    """What `solver_score.py --top_k_logprobs` wrote of each response token: its likeliest tokens.

    Everything else counts as one token more (`coarse_divergence`).
    """

    model = None
    held: tuple[nn.Module, ...] = ()

    def __init__(
        self,
        ids: list[Tensor],
        logprobs: list[Tensor],
        distance: Distance,
        device: torch.device,
    ) -> None:
        """ids, logprobs: of each row's response tokens, [tokens, k] each."""
        self.ids, self.logprobs, self.of, self.device = ids, logprobs, distance, device

    def consult(self, turns: list[list[int]], parts: list[list[Sequence]]) -> None:
        """It was asked before the run."""

    def distance(
        self, student: Transformer, batch: Batch, rows: list[int], sequences: list[Sequence]
    ) -> Tensor:
        ids = torch.cat([self.ids[i] for i in rows]).long().to(self.device)  # [R, k]
        log_q = torch.cat([self.logprobs[i] for i in rows]).to(self.device)

        def loss_of(log_p: Tensor, entropy: Tensor | None, chunk: slice) -> Tensor:
            return coarse_divergence(log_p, log_q[chunk], self.of.beta).sum()

        return response_loss(student, batch, loss_of, self.of.temperature, targets=ids)


class DistillationObjective(Objective):
    """The mean over a step's response tokens of the divergence from the teacher."""

    stats: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        sequences: Sequences,
        teacher: Teacher,
        parallel: Parallel,
        sample: Sample | None = None,
        on_policy: float = 0.0,
        rows_per_step: int = 1,
        seed: int = 0,
    ) -> None:
        """sample: what the student answers; on_policy: the share of rows that it answers itself."""
        self.given, self.sequences = sequences, list(sequences)
        self.teacher, self.parallel, self.frozen = teacher, parallel, teacher.model
        self.held = teacher.held
        self.sample, self.on_policy, self.rows_per_step, self.seed = (
            sample,
            on_policy,
            rows_per_step,
            seed,
        )
        self.lengths = [len(s.tokens) for s in sequences]
        self.weights = [s.response_length for s in sequences]
        self.needed = list(self.weights)

    def pieces(self, row: int) -> list[tuple[int, int]]:
        return [(self.lengths[row], 0)]

    def begin(self, number: int, batch: list[int], model: Transformer) -> None:
        if self.sample is None:
            return
        # Which rows are the student's own is drawn for each step, and the same on all ranks.
        rng = random.Random(f"{self.seed}/on policy/{number}")
        own = [i for i in batch if rng.random() < self.on_policy]
        prompts = [[*self.given[i].tokens[: self.given[i].prompt_length]] for i in own]
        numbers = [number * self.rows_per_step + batch.index(i) for i in own]
        tokens = 0
        if own:
            with clock.phase("generate"), evaluating(model):
                completions = self.sample(prompts, numbers)
            answers = dict(zip(own, completions))
            tokens = sum(len(completion.tokens) for completion in completions)
        for i in batch:
            sequence, n = self.given[i], self.given[i].prompt_length
            if i in own:
                sequence = Sequence([*sequence.tokens[:n], *answers[i].tokens], n)
            self.sequences[i] = sequence
            self.lengths[i] = len(sequence.tokens)
            self.weights[i] = self.needed[i] = sequence.response_length
        share = {"on_policy": len(own) / len(batch), "generated_tokens": tokens}
        self.noted = {**share, "response_length": tokens / max(1, len(own))}

    def consult(self, turns: list[list[int]]) -> None:
        self.teacher.consult(turns, [[self.sequences[i] for i in rows] for rows in turns])

    def batch(self, rows: list[int]) -> Batch:
        sequences = [self.sequences[i] for i in rows]
        return Batch.of(sequences, self.parallel.device, self.parallel.context)

    def loss(
        self, model: Transformer, rows: list[int], denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sequences = [self.sequences[i] for i in rows]
        batch = self.batch(rows)
        loss = self.teacher.distance(model, batch, rows, sequences) / denominator
        balance = weighted_balance_loss(model, batch, batch.responses, denominator)
        return loss + balance, {"balance_loss": balance.detach()}
